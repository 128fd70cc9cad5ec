"""Environments of gymnax and brax as JAX-native ones."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from puffer_jax.base.spaces import Box, Dict, kind_of

_BRAX_MAX_STEPS = 1000


def _from_gymnax(env: Any, params: Any) -> Any:
    name = type(env).__name__
    if not hasattr(type(env), "step_env"):
        raise ValueError(
            f"{name} is a gymnax wrapper: its `step` resets by itself, which hides the last "
            "observation of an episode; pass the environment inside it"
        )
    params = env.default_params if params is None else params

    def reset(key: Any) -> tuple[Any, Any]:
        return env.reset(key, params)

    def step(key: Any, state: Any, action: Any) -> tuple[Any, ...]:
        values = env.step_env(key, state, action, params)
        if len(values) != 5:
            return values
        obs, state, reward, done, info = values
        # `is_truncated` came with gymnax 1.0, whose step_env leaves the time limit out of `done`.
        if hasattr(env, "is_truncated"):
            return obs, state, reward, done, env.is_truncated(state, params), info
        if hasattr(state, "time") and hasattr(params, "max_steps_in_episode"):
            at_limit = state.time >= params.max_steps_in_episode
            info = {**info, "truncation": jnp.logical_and(done, at_limit)}
        return obs, state, reward, done, info

    space = env.observation_space(params)
    if kind_of(space) == "box":
        given = jax.eval_shape(reset, jax.random.key(0))[0]
        # Some declare what they do not give (gymnax's Catch: int32, and float32 comes).
        if hasattr(given, "dtype") and not _casts(given.dtype, np.dtype(space.dtype)):
            floating = jnp.issubdtype(given.dtype, jnp.floating)
            dtype = np.dtype(np.float32 if floating else given.dtype)
            space = Box(space.low, space.high, tuple(space.shape), dtype)
    return SimpleNamespace(
        observation_space=space, action_space=env.action_space(params), reset=reset, step=step
    )


def _from_brax(env: Any) -> tuple[Any, bool]:
    info = jax.eval_shape(env.reset, jax.random.key(0)).info
    if any(str(key).startswith("first_") for key in info):
        raise ValueError(
            f"{type(env).__name__} resets by itself (brax's AutoResetWrapper), which hides the "
            "last observation of an episode; pass the environment without that wrapper"
        )

    def reset(key: Any) -> tuple[Any, Any]:
        state = env.reset(key)
        return state.obs, state

    def step(key: Any, state: Any, action: Any) -> tuple[Any, ...]:
        del key  # brax keeps its keys in state.info
        # Many environments write into the dict state.info; the copy keeps the caller's as it was.
        state = env.step(jax.tree.map(lambda x: x, state), action)
        terminated, truncated = _split(state.done, state.info.get("truncation", False))
        return state.obs, state, state.reward, terminated, truncated, dict(state.metrics)

    def box(size: Any) -> Box:
        return Box(-np.inf, np.inf, (size,) if isinstance(size, int) else tuple(size))

    size = env.observation_size
    space = Dict({k: box(v) for k, v in size.items()}) if isinstance(size, Mapping) else box(size)
    actions = Box(-1.0, 1.0, (int(env.action_size),))
    inner = SimpleNamespace(observation_space=space, action_space=actions, reset=reset, step=step)
    return inner, "truncation" in info


def _split(done: Any, truncated: Any) -> tuple[Array, Array]:
    truncated = jnp.asarray(truncated, bool)
    return jnp.asarray(done, bool) & ~truncated, truncated


def _casts(given: Any, declared: Any) -> bool:
    # x64 mode widens what an environment leaves open, so a difference in width is no fault.
    return np.can_cast(given, declared, "same_kind")
