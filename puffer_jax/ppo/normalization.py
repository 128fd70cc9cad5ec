"""Running means and deviations that bring observations and rewards to a common scale.

Observations are normalised by the policy's own first layers, (x - mean) / deviation being linear:
the rollout, the update and every exported file see an ordinary policy with folded weights. What
the optimizer changes are the weights before folding.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array

from puffer_jax.nn.params import GraphDef, merge, split
from puffer_jax.policies.protocol import is_recurrent
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.devices import ALONE, Share
from puffer_jax.ppo.experience import Experience, Params
from puffer_jax.ppo.moments import Moments, Normalization


def initial(config: PuffeRLConfig, policy: nnx.Module, agents: int) -> Normalization | None:
    """Before the first batch; None if nothing is normalised.

    Raises:
        ValueError: observations shall be normalised, but the policy has no first layers for it.
    """
    observations = returns = discounted = None
    if _normalizes_observations(config, policy):
        layer, *_ = input_layers(policy)
        observations = Moments.none(layer.kernel[...].shape[:1], layer.kernel[...].dtype)
    if config.normalize_rewards:
        returns, discounted = Moments.none((), jnp.dtype("float32")), jnp.zeros(agents, jnp.float32)
    if observations is None and returns is None:
        return None
    return Normalization(observations, returns, discounted)


def input_layers(policy: nnx.Module) -> tuple[nnx.Linear, ...]:
    """The layers that read the observations as (batch, features); () if there are none such."""
    find = getattr(_encoder_of(policy), "input_layers", None)
    return () if find is None else tuple(find())


def _encoder_of(policy: Any) -> Any:
    return getattr(policy, "policy", policy) if is_recurrent(policy) else policy


def _normalizes_observations(config: PuffeRLConfig, policy: nnx.Module) -> bool:
    layers = input_layers(policy)
    if config.normalize_observations == "auto":
        return bool(layers) and bool(getattr(policy, "is_continuous", False))
    if config.normalize_observations and not layers:
        raise ValueError(
            f"normalize_observations needs a policy that says by `input_layers()` which Linear "
            f"layers read its observations as flat vectors; {type(policy).__name__} does not"
        )
    return bool(config.normalize_observations)


def fold(graphdef: GraphDef, params: Params, normalization: Normalization | None) -> Params:
    """Parameters of the policy that takes observations as they come.

    Args:
        graphdef: the policy's static half.
        params: those of the policy that takes normalised observations.
        normalization: see there.
    """
    if normalization is None or normalization.observations is None:
        return params
    moments = normalization.observations
    policy = merge(graphdef, params)
    for layer in input_layers(policy):
        kernel, deviation = layer.kernel[...], moments.deviation
        scaled = kernel / deviation[:, None].astype(kernel.dtype)
        layer.kernel[...] = scaled
        assert layer.bias is not None
        layer.bias[...] = layer.bias[...] - moments.mean.astype(kernel.dtype) @ scaled
    return split(policy)[1]


def normalize_rewards(
    experience: Experience,
    normalization: Normalization | None,
    gamma: ArrayLike,
    share: Share = ALONE,
) -> tuple[Experience, Normalization | None]:
    """Divide rewards by the deviation of the discounted return, as far as it is known with them.

    Episodes end where `terminals` says so. The running returns are those of this device's agents,
    the deviation is that of all devices'.

    Returns:
        The batch with its rewards scaled, and what is known after it.

    Reference: `NormalizeReward` of gymnasium; Engstrom et al. 2020, "Implementation Matters".
    """
    if normalization is None or normalization.returns is None:
        return experience, normalization
    running, terminals = normalization.discounted, experience.terminals
    assert running is not None
    agents = running.shape[0]
    played = _played(experience)
    # (rounds * agents, time) -> (rounds * time, agents)
    steps = jax.tree.map(
        lambda x: x.reshape(-1, agents, x.shape[1]).swapaxes(1, 2).reshape(-1, agents),
        (experience.rewards.astype(running.dtype), terminals, played),
    )

    def step(running: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, terminal, was_played = now
        # A step that was not played has the reward 0.
        later = running * jnp.where(was_played > 0, gamma, 1) + reward
        return jnp.where(terminal > 0, 0, later).astype(running.dtype), later.astype(running.dtype)

    running, discounted = jax.lax.scan(step, running, steps)
    returns = normalization.returns.including(discounted.reshape(-1), steps[2].reshape(-1), share)
    scale = 1 / returns.deviation
    experience = experience._replace(rewards=experience.rewards * scale)
    if experience.last is not None:
        last = experience.last
        experience = experience._replace(last=last._replace(rewards=last.rewards * scale))
    return experience, normalization._replace(returns=returns, discounted=running)


def observed(
    policy: nnx.Module,
    experience: Experience,
    normalization: Normalization | None,
    share: Share = ALONE,
) -> Normalization | None:
    """What is known about observations after a batch; the policy tells what it reads of them."""
    if normalization is None or normalization.observations is None:
        return normalization
    before = normalization.observations
    count = math.prod(experience.rewards.shape)
    read = getattr(_encoder_of(policy), "input_features", None)
    flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), experience.observations)
    features = (
        jnp.asarray(flat).reshape(count, -1) if read is None else read(flat, before.mean.dtype)
    )
    features = features.astype(before.mean.dtype)
    weights = _played(experience).reshape(-1).astype(before.mean.dtype)
    return normalization._replace(observations=before.including(features, weights, share))


def _played(experience: Experience) -> Array:
    mask = experience.mask
    return (
        jnp.ones_like(experience.rewards)
        if mask is None
        else jnp.asarray(mask, experience.rewards.dtype)
    )
