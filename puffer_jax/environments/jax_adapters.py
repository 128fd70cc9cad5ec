"""Environments of gymnax and brax as JAX-native ones."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base.spaces import Box, Dict, Env, kind_of

Tree = Any
"""An array, or a dict, tuple or dataclass of trees: an observation, an action, a state."""

BRAX_MAX_STEPS = 1000


def from_gymnax(env: Env, params: Tree) -> SimpleNamespace:
    """A gymnax environment with the functions and spaces of a `JaxEnv`.

    Args:
        env: the environment.
        params: its parameters; None: `env.default_params`.

    Raises:
        ValueError: it is a wrapper that resets by itself.
    """
    name = type(env).__name__
    if not hasattr(type(env), "step_env"):
        raise ValueError(
            f"{name} is a gymnax wrapper: its `step` resets by itself, which hides the last "
            "observation of an episode; pass the environment inside it"
        )
    params = env.default_params if params is None else params

    def reset(key: PRNGKeyArray) -> tuple[Tree, Tree]:
        return env.reset(key, params)

    def step(key: PRNGKeyArray, state: Tree, action: Tree) -> tuple[Tree, ...]:
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
        actual = jax.eval_shape(reset, jax.random.key(0))[0]
        # Some declare another dtype than they return (gymnax's Catch: int32, but returns float32).
        if hasattr(actual, "dtype") and not casts(actual.dtype, np.dtype(space.dtype)):
            floating = jnp.issubdtype(actual.dtype, jnp.floating)
            dtype = np.dtype(np.float32 if floating else actual.dtype)
            space = Box(space.low, space.high, tuple(space.shape), dtype)
    return SimpleNamespace(
        observation_space=space, action_space=env.action_space(params), reset=reset, step=step
    )


def from_brax(env: Env) -> tuple[SimpleNamespace, bool]:
    """A brax environment with the functions and spaces of a `JaxEnv`.

    Returns:
        (the environment, whether it has a time limit already).

    Raises:
        ValueError: it is wrapped with automatic resets.
    """
    info = jax.eval_shape(env.reset, jax.random.key(0)).info
    if any(str(key).startswith("first_") for key in info):
        raise ValueError(
            f"{type(env).__name__} resets by itself (brax's AutoResetWrapper), which hides the "
            "last observation of an episode; pass the environment without that wrapper"
        )

    def reset(key: PRNGKeyArray) -> tuple[Tree, Tree]:
        state = env.reset(key)
        return state.obs, state

    def step(key: PRNGKeyArray, state: Tree, action: Tree) -> tuple[Tree, ...]:
        del key  # brax keeps its keys in state.info
        # Many environments write to the dict state.info; the copy keeps the caller's as it was.
        state = env.step(jax.tree.map(lambda x: x, state), action)
        terminated, truncated = split_end(state.done, state.info.get("truncation", False))
        return state.obs, state, state.reward, terminated, truncated, dict(state.metrics)

    def box(size: int | Sequence[int]) -> Box:
        return Box(-np.inf, np.inf, (size,) if isinstance(size, int) else tuple(size))

    size = env.observation_size
    space = Dict({k: box(v) for k, v in size.items()}) if isinstance(size, Mapping) else box(size)
    actions = Box(-1.0, 1.0, (int(env.action_size),))
    inner = SimpleNamespace(observation_space=space, action_space=actions, reset=reset, step=step)
    return inner, "truncation" in info


def split_end(done: ArrayLike, truncated: ArrayLike) -> tuple[Array, Array]:
    """(terminated, truncated) of a step, from whether it is done and whether by truncation."""
    truncated = jnp.asarray(truncated, bool)
    return jnp.asarray(done, bool) & ~truncated, truncated


def casts(actual: Any, declared: Any) -> bool:
    """Whether an array of one dtype will do where a space declares the other."""
    # x64 mode widens what an environment leaves open, so a difference in width is not an error.
    return np.can_cast(actual, declared, "same_kind")
