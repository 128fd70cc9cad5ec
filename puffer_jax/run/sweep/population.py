"""Trials of a JAX-native environment that run at once, as one program."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.training import make_train

METRICS = {"score": "episode_return", "return": "episode_return"}
"""What PufferLib's names for a metric mean for an environment that has no such number."""


class Population(NamedTuple):
    """What trials gave: scores (trials,), curves (trials, epochs), and parameters (trials, ...)."""

    scores: Float[np.ndarray, "trials"]
    curves: Float[np.ndarray, "trials epochs"]
    params: PyTree


def make_population(
    config: PuffeRLConfig, env: Any, make_policy: Callable[..., Any], metric: str
) -> Callable[[Sequence[dict[str, float]], int], Population]:
    """A function that trains as many policies at once as it is given hyper-parameters.

    Args:
        config: all else that they have in common.
        env: JAX-native, see `puffer_jax.as_jax_env`.
        make_policy: see `puffer_jax.make_train`.
        metric: "episode_return" or "episode_length", or a name in `METRICS`.

    Returns:
        (hypers, seed) -> `Population`; compiled for each number of trials. `hypers` are, for each
        trial, any of `config.hypers()`, the same names in all. A trial in which an update was not
        finite has a score of NaN.

    Raises:
        ValueError: there is no such metric.
    """
    metric = METRICS.get(metric, metric)
    if metric not in ("episode_return", "episode_length"):
        raise ValueError(
            f"[sweep] metric is {metric}; of JAX-native environments it is score, episode_return "
            "or episode_length"
        )
    train = jax.jit(jax.vmap(make_train(config, env, make_policy)))

    def run(hypers: Sequence[dict[str, float]], seed: int) -> Population:
        keys = jax.random.split(jax.random.key(seed), len(hypers))
        traced = {name: jnp.array([h[name] for h in hypers]) for name in hypers[0]}
        params, metrics = jax.block_until_ready(train(keys, traced))
        curves, episodes = metrics[metric], metrics["episodes"]
        scores = np.where(metrics["nonfinite"][:, -1] > 0, np.nan, last_tenth(curves, episodes))
        return Population(scores, np.asarray(curves), params)

    return run


def last_tenth(
    curves: Float[Array, "trials epochs"], episodes: Num[Array, "trials epochs"]
) -> Float[np.ndarray, "trials"]:
    """Means over the episodes in the last tenth of the epochs.

    Where none ended there, over those of the last epoch in which one did; NaN where none ever did.

    Args:
        curves: means of each epoch's episodes, NaN without.
        episodes: how many ended.
    """
    counts, means = np.asarray(episodes, np.float64), np.asarray(curves, np.float64)
    last = max(1, round(counts.shape[1] / 10))
    scores = np.full(len(counts), np.nan)
    for row, (count, mean) in enumerate(zip(counts, means, strict=True)):
        ended = np.flatnonzero(count)
        if ended.size:
            late = ended[ended >= min(len(count) - last, ended[-1])]
            scores[row] = np.average(mean[late], weights=count[late])
    return scores
