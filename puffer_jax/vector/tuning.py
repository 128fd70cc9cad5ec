"""How fast a vecenv is, and which settings make it fastest."""

import time
from typing import Any, NamedTuple

import numpy as np

from puffer_jax.vector.making import make
from puffer_jax.vector.multiprocessing import Multiprocessing
from puffer_jax.vector.pool import available_cores
from puffer_jax.vector.serial import Serial


def measure(vecenv: Any, seconds: float = 1.0, think: float = 0.0) -> float:
    """Agent steps per second, with random actions.

    Args:
        vecenv: ours, the reference's, or a `gymnasium.vector.VectorEnv`. It is not closed.
        seconds: how long to measure.
        think: seconds to sleep for each batch, as long as a policy on an accelerator would take.
    """
    vecenv.action_space.seed(0)
    actions = [vecenv.action_space.sample() for _ in range(16)]
    if hasattr(vecenv, "async_reset"):
        actions = [a.astype(np.int32) if a.dtype == np.int64 else a for a in actions]
        vecenv.async_reset(0)

        def step(action: object) -> None:
            vecenv.recv()
            time.sleep(think) if think else None
            vecenv.send(action)
    else:
        vecenv.reset(seed=0)

        def step(action: object) -> None:
            time.sleep(think) if think else None
            vecenv.step(action)

    batches = -max(8, 2 * vecenv.num_envs // len(actions[0]))  # negative ones warm up
    began = time.perf_counter()
    while batches < 0 or time.perf_counter() - began < seconds:
        step(actions[batches % len(actions)])
        batches += 1
        if batches == 0:
            began = time.perf_counter()
    rate = batches * len(actions[0]) / (time.perf_counter() - began)
    if hasattr(vecenv, "async_reset"):
        vecenv.recv()
    return rate


class Trial(NamedTuple):
    """How fast a vecenv is.

    Attributes:
        options: arguments of `make`: backend, num_envs and the backend's own.
        steps_per_second: agent steps per second, see `measure`.
    """

    options: dict[str, Any]
    steps_per_second: float


def autotune(
    env_creator: Any,
    batch_size: int,
    max_envs: int | None = None,
    cores: int | None = None,
    think: float = 0.0,
    seconds: float = 1.0,
    **kwargs: Any,
) -> list[Trial]:
    """Find by trial what is fastest here; `puffer-jax autotune` prints it as a table.

    It tries `Serial`, and `Multiprocessing` with and without a local worker, with one batch of
    environments and with several, so that the others step while one is acted on.

    Args:
        env_creator: see `make`.
        batch_size: how many environments act at once.
        max_envs: most environments in total; by default, twice `batch_size`.
        cores: most workers; by default, one for each core.
        think: seconds that acting on a batch takes.
        seconds: how long each trial takes.
        kwargs: other arguments of `make`.

    Returns:
        All trials, the fastest first.

    Raises:
        ValueError: `batch_size` is not between 1 and `max_envs`; or as in `make`.

    Example:
        >>> from puffer_jax import vector
        >>> trials = vector.autotune("CartPole-v1", batch_size=2, cores=1, seconds=0.01)
        >>> with vector.make("CartPole-v1", **trials[0].options) as vecenv:
        ...     obs, infos = vecenv.reset(seed=0)
        >>> len(trials), obs.shape
        (2, (2, 4))
    """
    max_envs = 2 * batch_size if max_envs is None else max_envs
    if not 1 <= batch_size <= max_envs:
        raise ValueError(f"batch_size must be 1 .. max_envs ({max_envs}); got {batch_size}")
    cores = available_cores() if cores is None else cores
    choices: list[dict[str, Any]] = [{"backend": Serial, "num_envs": batch_size}]
    for num_envs in range(batch_size, max_envs + 1, batch_size):
        for num_workers in range(1, min(cores, num_envs) + 1):
            choice: dict[str, Any] = {
                "backend": Multiprocessing,
                "num_envs": num_envs,
                "num_workers": num_workers,
                "batch_size": batch_size,
                "overwork": num_workers > available_cores(),
            }
            if not num_envs % num_workers and not batch_size % (num_envs // num_workers):
                choices.append(choice)
            if 1 < num_workers <= batch_size:
                choices.append(choice | {"local_worker": True})
    trials: list[Trial] = []
    for choice in choices:
        with make(env_creator, **choice, **kwargs) as vecenv:
            trials.append(Trial(choice, measure(vecenv, seconds, think)))
    return sorted(trials, key=lambda trial: -trial.steps_per_second)
