"""Games of pgx, played in turns: in self-play, or against players that act at random."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base.spaces import Dict, Discrete, Env
from puffer_jax.environments.adapters import Adapted, Tree, unbounded


class Game(NamedTuple):
    """State of a game against others: pgx's state, and a reward that is still to be told."""

    state: Tree
    owed: Array


def recognises(env: Env) -> bool:
    """Whether an environment has pgx's interface."""
    return all(hasattr(env, name) for name in ("init", "observe", "num_players", "step"))


def adapt(env: Env, opponent: str = "self") -> Adapted:
    """A game of pgx with the functions and spaces of a `JaxEnv`.

    Observations are {"observation", "action_mask"}: pgx's own, as the player sees them, and the
    legal actions. An illegal action loses the game, as in pgx.

    Args:
        env: the environment.
        opponent: "self": every player is an agent, and plays where it is its turn; "random": one
            agent plays as player 0, the others choose among their legal actions at random.

    Raises:
        ValueError: `opponent` is neither.
    """
    if opponent not in ("self", "random"):
        raise ValueError(f"opponent must be 'self' or 'random'; got {opponent!r}")
    state = jax.eval_shape(env.init, jax.random.key(0))
    observation, mask = state.observation, state.legal_action_mask
    space = Dict(
        {
            "observation": unbounded(observation.shape, observation.dtype),
            "action_mask": unbounded(mask.shape, mask.dtype),
        }
    )
    actions = Discrete(int(mask.shape[0]))
    if opponent == "self" and env.num_players > 1:
        return _self_play(env, space, actions)
    return _against_random(env, space, actions)


def _seen_by(env: Env, state: Tree, player: int | Array) -> dict[str, Array]:
    # Whoever waits may think of any action.
    mask = state.legal_action_mask | (state.current_player != player)
    return {"observation": env._observe(state, player), "action_mask": mask}


def _self_play(env: Env, space: Dict, actions: Discrete) -> Adapted:
    players = jnp.arange(env.num_players)

    def seen(state: Tree) -> Tree:
        return jax.vmap(lambda player: _seen_by(env, state, player))(players)

    def reset(key: PRNGKeyArray) -> tuple[Tree, Tree]:
        state = env.init(key)
        return seen(state), state

    def step(key: PRNGKeyArray, state: Tree, action: Array) -> tuple[Tree, ...]:
        state = env.step(state, action[state.current_player], key)
        ends = (jnp.broadcast_to(x, players.shape) for x in (state.terminated, state.truncated))
        return seen(state), state, state.rewards, *ends, {}

    def playing(state: Tree) -> Array:
        return state.current_player == players

    return Adapted(space, actions, reset, step, num_agents=env.num_players, playing=playing)


def _against_random(env: Env, space: Dict, actions: Discrete) -> Adapted:
    def is_others_turn(carry: tuple[Game, PRNGKeyArray]) -> Array:
        state = carry[0].state
        return (state.current_player != 0) & ~(state.terminated | state.truncated)

    def move(carry: tuple[Game, PRNGKeyArray]) -> tuple[Game, PRNGKeyArray]:
        (state, owed), key = carry
        key, choice_key, step_key = jax.random.split(key, 3)
        logits = jnp.where(state.legal_action_mask, 0.0, -jnp.inf)
        state = env.step(state, jax.random.categorical(choice_key, logits), step_key)
        return Game(state, owed + state.rewards[0]), key

    def others(state: Tree, owed: Array, key: PRNGKeyArray) -> Game:
        if env.num_players == 1:
            return Game(state, owed)
        return jax.lax.while_loop(is_others_turn, move, (Game(state, owed), key))[0]

    def reset(key: PRNGKeyArray) -> tuple[Tree, Game]:
        key, others_key = jax.random.split(key)
        state = env.init(key)
        game = others(state, jnp.zeros_like(state.rewards[0]), others_key)
        return _seen_by(env, game.state, 0), game

    def step(key: PRNGKeyArray, game: Game, action: Array) -> tuple[Tree, ...]:
        key, others_key = jax.random.split(key)
        state = env.step(game.state, action, key)
        state, reward = others(state, game.owed + state.rewards[0], others_key)
        after = Game(state, jnp.zeros_like(reward))
        return _seen_by(env, state, 0), after, reward, state.terminated, state.truncated, {}

    return Adapted(space, actions, reset, step)
