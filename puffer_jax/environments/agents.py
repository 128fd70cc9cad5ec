"""Several agents in one JAX-native environment: who is there, who plays, and when all are done."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

Tree = Any


class Agents(NamedTuple):
    """State of an environment with several agents.

    Attributes:
        state: the environment's own.
        over: (num_agents,), for whom the episode is over.
    """

    state: Tree
    over: Array


def counted(
    reset: Callable[..., Tree], step: Callable[..., Tree], num_agents: int
) -> tuple[Callable[..., Tree], Callable[..., Tree]]:
    """`reset` and `step` that count each agent's end once, and nothing of an agent after it."""

    def counted_reset(key: PRNGKeyArray) -> tuple[Tree, Agents]:
        obs, state = reset(key)
        return obs, Agents(state, jnp.zeros(num_agents, bool))

    def counted_step(key: PRNGKeyArray, agents: Agents, action: Tree) -> tuple[Tree, ...]:
        obs, state, reward, terminated, truncated, info = step(key, agents.state, action)
        there = ~agents.over
        terminated, truncated = (jnp.asarray(x, bool) & there for x in (terminated, truncated))
        after = Agents(state, agents.over | terminated | truncated)
        return obs, after, jnp.where(there, reward, 0), terminated, truncated, info

    return counted_reset, counted_step


def counted_playing(
    playing: Callable[[Tree], Array] | None,
) -> Callable[[Agents], Array]:
    """Who plays, of those for whom the episode is not over."""
    if playing is None:
        return lambda agents: ~agents.over
    return lambda agents: ~agents.over & playing(agents.state)
