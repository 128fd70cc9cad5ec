"""Environments of navix: MiniGrid in JAX."""

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from puffer_jax.base.spaces import Box, Discrete, Env
from puffer_jax.environments.adapters import Adapted, Tree


def recognises(env: Env) -> bool:
    """Whether an environment has navix's interface."""
    return all(hasattr(env, name) for name in ("termination_fn", "transitions_fn", "max_steps"))


def adapt(env: Env) -> Adapted:
    """An environment of navix with the functions and spaces of a `JaxEnv`."""

    def reset(key: PRNGKeyArray) -> tuple[Tree, Tree]:
        timestep = env.reset(key)
        return timestep.observation, timestep

    def step(key: PRNGKeyArray, timestep: Tree, action: Tree) -> tuple[Tree, ...]:
        del key  # the state has its own
        # Its `step` resets in the step after the last one, and under vmap pays for that each time.
        after = env._step(timestep, action)
        ends = after.is_termination(), after.is_truncation()
        return after.observation, after, after.reward, *ends, {}

    shown = jax.eval_shape(reset, jax.random.key(0))[0]
    declared = env.observation_space
    low, high = np.asarray(declared.minimum).item(), np.asarray(declared.maximum).item()
    space = Box(low, high, tuple(shown.shape), np.dtype(shown.dtype))
    return Adapted(space, Discrete(int(env.action_space.n)), reset, step)
