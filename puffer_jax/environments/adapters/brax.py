"""Environments of brax, and of MuJoCo Playground, which has its interface."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from puffer_jax.base.spaces import Box, Dict, Env
from puffer_jax.environments.adapters import Adapted, Tree, split_end

MAX_STEPS = 1000
"""After how many steps brax's own training cuts an episode off."""


def recognises(env: Env) -> bool:
    """Whether an environment has brax's interface."""
    return hasattr(env, "observation_size") and hasattr(env, "action_size")


def adapt(env: Env) -> Adapted:
    """A brax environment with the functions and spaces of a `JaxEnv`.

    Raises:
        ValueError: it is wrapped with automatic resets.
    """
    info = jax.eval_shape(env.reset, jax.random.key(0)).info
    if any(str(key).endswith("first_obs") for key in info):
        raise ValueError(
            f"{type(env).__name__} resets by itself (an AutoResetWrapper), which hides the last "
            "observation of an episode; pass the environment without that wrapper"
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
    return Adapted(space, actions, reset, step, None if "truncation" in info else _limit(env))


def _limit(env: Env) -> int:
    """How long its authors let an episode last; Playground's environments have a config of it."""
    return int(getattr(getattr(env, "_config", None), "episode_length", MAX_STEPS))
