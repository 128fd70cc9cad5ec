"""Automatic resets of many JAX-native environments, a few at a time.

Under `vmap` a condition computes both of its sides, so each environment computes a reset in every
step, although hardly any needs one. Where a reset costs more than a step, that is most of a
rollout. Here a step computes few resets, for those whose episode ended.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from puffer_jax.environments.adapters import Tree
from puffer_jax.environments.jax_native import AdaptedEnv, Step, autoreset
from puffer_jax.nn import random


def autoreset_all(
    env: AdaptedEnv, num_envs: int, reset_ratio: int | None
) -> Callable[[Array, Tree, Tree], Step]:
    """`autoreset` for all copies of an environment at once.

    Args:
        env: the environment.
        num_envs: the number of copies.
        reset_ratio: how many copies share one computed reset, see `PuffeRLConfig`; None: none do.

    Returns:
        `step(keys, states, actions) -> Step`, all of them (num_envs, ...). As long as no more
        episodes end in a step than resets are computed, it gives what `autoreset` gives.
    """
    if reset_ratio is None:
        return jax.vmap(autoreset(env))
    count = resets_of(num_envs, reset_ratio)

    def step(keys: Array, state: Tree, action: Tree) -> Step:
        keys = jax.vmap(random.split)(keys)
        final_obs, state, reward, terminated, truncated, info = jax.vmap(env.step)(
            keys[:, 0], state, action
        )
        several = env.num_agents is not None
        done = state.over.all(axis=1) if several else jnp.logical_or(terminated, truncated)
        obs, state = begin_where(done, env.reset, keys[:, 1], (final_obs, state), count)
        playing = None if env.playing is None else jax.vmap(env.playing)(state)
        return Step(obs, state, reward, terminated, truncated, final_obs, info, done, playing)

    return step


def resets_of(num_envs: int, reset_ratio: int) -> int:
    """How many resets a step computes; a ValueError if the ratio is not positive."""
    if reset_ratio < 1:
        raise ValueError(f"reset_ratio must be at least 1; got {reset_ratio}")
    return -(-num_envs // reset_ratio)


def begin_where(
    over: Bool[Array, " envs"],
    reset: Callable[[Array], tuple[Tree, Tree]],
    keys: Array,
    running: tuple[Tree, Tree],
    count: int,
) -> tuple[Tree, Tree]:
    """New episodes where the last ones are over, of at most `count` resets.

    Those that are over take turns: if they are more than `count`, the first `count` have a start of
    their own, each from its own key, and the others the start of one of these.

    Args:
        over: which environments begin an episode.
        reset: of a single environment.
        keys: one for each environment, (envs, ...).
        running: the observations and states of all, (envs, ...).
        count: the number of resets to compute; none is if no episode is over.
    """
    first = jnp.nonzero(over, size=count, fill_value=0)[0]
    fresh = jax.lax.cond(
        over.any(),
        lambda: jax.vmap(reset)(keys[first]),
        lambda: jax.tree.map(lambda x: x[first], running),
    )
    turn = (jnp.cumsum(over) - 1) % count

    def choose(over: Array, turn: Array, running: Tree) -> Tree:
        return jax.tree.map(lambda new, old: jnp.where(over, new[turn], old), fresh, running)

    return jax.vmap(choose)(over, turn, running)
