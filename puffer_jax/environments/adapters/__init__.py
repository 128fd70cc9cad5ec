"""Environments of other packages as JAX-native ones, one package a file.

An adapter recognises its package's environments by their attributes, so that no package is
imported here, and says what they observe, how they are acted in, and how their episodes end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from puffer_jax.base.spaces import Box, Space

Tree = Any
"""An array, or a dict, tuple or dataclass of trees: an observation, an action, a state."""


@dataclass(frozen=True, eq=False)
class Adapted:
    """An environment of another package with what `puffer_jax.jaxenv.JaxEnv` asks for.

    Attributes:
        observation_space: the space of one agent's observations.
        action_space: the space of one agent's actions.
        reset: see `JaxEnv`.
        step: see `JaxEnv`.
        max_steps: after how many steps its users cut an episode off; None: after none, or it does
            so itself.
        num_agents: see `JaxEnv`; None: one agent, whose arrays have no axis for agents.
        playing: see `JaxEnv`.
    """

    observation_space: Space
    action_space: Space
    reset: Callable[..., tuple[Tree, Tree]]
    step: Callable[..., tuple[Tree, ...]]
    max_steps: int | None = None
    num_agents: int | None = None
    playing: Callable[[Tree], Array] | None = None


def unbounded(shape: tuple[int, ...], dtype: Any) -> Box:
    """The space of all arrays of a shape and dtype."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return Box(0, 1, shape, dtype)
    if dtype.kind in "iu":
        return Box(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype)
    return Box(-np.inf, np.inf, shape, dtype)


def split_end(done: ArrayLike, truncated: ArrayLike) -> tuple[Array, Array]:
    """(terminated, truncated) of a step, from whether it is done and whether by truncation."""
    truncated = jnp.asarray(truncated, bool)
    return jnp.asarray(done, bool) & ~truncated, truncated


def casts(actual: Any, declared: Any) -> bool:
    """Whether an array of one dtype will do where a space declares the other."""
    # x64 mode widens what an environment leaves open, so a difference in width is not an error.
    return np.can_cast(actual, declared, "same_kind")
