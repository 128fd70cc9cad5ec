"""Environments of jumanji."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from puffer_jax.base.spaces import Box, Dict, Discrete, Env, MultiDiscrete, Space
from puffer_jax.environments.adapters import Adapted, Tree, unbounded

_RESET_BY_THEMSELVES = ("AutoResetWrapper", "VmapAutoResetWrapper")


def recognises(env: Env) -> bool:
    """Whether an environment has jumanji's interface."""
    return all(hasattr(env, name) for name in ("observation_spec", "action_spec", "discount_spec"))


def adapt(env: Env) -> Adapted:
    """An environment of jumanji with the functions and spaces of a `JaxEnv`.

    Observations are dicts by the names of their fields; legal actions are "action_mask", as there.
    Actions of several axes are a vector here.
    Where it rewards several agents of its own, one policy acts for all: the reward is the sum, and
    the episode terminates if no agent's discount is left, as with jumanji's MultiToSingleWrapper.

    Raises:
        ValueError: it is wrapped with automatic resets; its actions do not begin at 0.
    """
    inner: Any = env
    while inner is not None:
        if type(inner).__name__ in _RESET_BY_THEMSELVES:
            raise ValueError(
                f"{type(env).__name__} resets by itself (jumanji's {type(inner).__name__}), which "
                "hides the last observation of an episode; pass the environment without that "
                "wrapper"
            )
        inner = inner.__dict__.get("_env")

    def reset(key: PRNGKeyArray) -> tuple[Tree, Tree]:
        state, timestep = env.reset(key)
        return _shown(env.observation_spec, timestep.observation), state

    def step(key: PRNGKeyArray, state: Tree, action: Tree) -> tuple[Tree, ...]:
        del key  # the state has its own
        action = jnp.reshape(action, env.action_spec.shape).astype(env.action_spec.dtype)
        state, timestep = env.step(state, action)
        last, going_on = timestep.last(), jnp.max(timestep.discount) > 0
        ends = last & ~going_on, last & going_on
        extras = timestep.extras or {}
        obs = _shown(env.observation_spec, timestep.observation)
        return obs, state, jnp.sum(timestep.reward), *ends, dict(extras)

    return Adapted(_space(env.observation_spec), _actions(env), reset, step)


def _parts(spec: Any) -> Mapping[str, Any]:
    return getattr(spec, "_specs", {})


def _space(spec: Any) -> Space:
    parts = _parts(spec)
    if parts:
        return Dict({name: _space(part) for name, part in parts.items()})
    if not hasattr(spec, "minimum"):
        return unbounded(tuple(spec.shape), spec.dtype)
    low, high = np.asarray(spec.minimum), np.asarray(spec.maximum)
    return Box(low, high, tuple(spec.shape), np.dtype(spec.dtype))


def _shown(spec: Any, observation: Any) -> Tree:
    parts = _parts(spec)
    if not parts:
        return observation
    return {name: _shown(part, getattr(observation, name)) for name, part in parts.items()}


def _actions(env: Env) -> Space:
    spec = env.action_spec
    low, high = (np.broadcast_to(bound, spec.shape) for bound in (spec.minimum, spec.maximum))
    if np.issubdtype(spec.dtype, np.floating):
        return Box(low.ravel(), high.ravel(), (low.size,), np.dtype(spec.dtype))
    if low.any():
        raise ValueError(f"{type(env).__name__}: its actions must begin at 0; got {spec!r}")
    sizes = (high.ravel().astype(int) + 1).tolist()
    return MultiDiscrete(tuple(sizes)) if spec.shape else Discrete(*sizes)
