"""Environments of gymnax, and of Craftax, which has its interface."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from puffer_jax.base.spaces import Box, Env, kind_of
from puffer_jax.environments.adapters import Adapted, Tree, casts, split_end


def recognises(env: Env) -> bool:
    """Whether an environment has gymnax's interface."""
    return hasattr(env, "step_env") and hasattr(env, "default_params")


def adapt(env: Env, params: Tree = None) -> Adapted:
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
    endless = None
    if hasattr(params, "max_timesteps") and hasattr(env, "is_terminal"):  # Craftax
        endless = params.replace(max_timesteps=np.iinfo(np.int32).max)

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
        if endless is not None:
            truncated = jnp.logical_and(done, ~env.is_terminal(state, endless))
            return obs, state, reward, *split_end(done, truncated), info
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
    return Adapted(space, env.action_space(params), reset, step)
