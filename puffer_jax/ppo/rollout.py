"""Collecting experience: from JAX-native environments within one program, or step by step.

Both store what the reference's `PuffeRL.evaluate` stores, in its order: row `r * agents + i` is the
r-th segment of agent i, and a step's reward is the one that came with its observation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base import spaces
from puffer_jax.nn.params import merge, split
from puffer_jax.nn.sampling import sample_logits
from puffer_jax.policies.protocol import is_recurrent
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.experience import Experience, Last, Params

State = dict[str, Array]


class Arrival(NamedTuple):
    """What an environment hands to the agents at one step; arrays (agents, ...).

    Environments on the host leave out what the options do not ask for: None.

    Attributes:
        obs: an array or a tree of them.
        reward: float32, for the action before.
        terminated: whether the episode ended.
        truncated: whether it was cut off.
        start: whether `obs` is the first of an episode.
        mask: False where an action on `obs` is not played.
        final_value: the value of the last observation of an episode cut off just now, else 0.
    """

    obs: Any
    reward: Any  # JAX's arrays, or NumPy's on their way to the device
    terminated: Any
    truncated: Any
    start: Any
    mask: Any
    final_value: Any


class Actor(NamedTuple):
    """A policy in an environment, as pure functions of its parameters; see `make_actor`.

    Attributes:
        initial_state: agents -> the zero state, None for a feed-forward policy.
        act: (params, obs, state, start, key) -> (action, logprob, values, state).
        value: (params, obs, state) -> values (agents,).
        playable: the environment's action for a sampled one: within the bounds of a Box.
    """

    initial_state: Callable[[int], State | None]
    act: Callable[..., tuple[Array, Array, Array, State | None]]
    value: Callable[..., Array]
    playable: Callable[[Array], Array]


def make_actor(config: PuffeRLConfig, policy: nnx.Module, action_space: Any) -> Actor:
    """The actor of policies like `policy`."""
    graphdef, _ = split(policy)
    recurrent = is_recurrent(policy)

    def initial_state(agents: int) -> State | None:
        return policy.initial_state(agents) if recurrent else None  # type: ignore[attr-defined]

    def forward(params: Params, obs: Any, state: State | None) -> tuple[Any, Array, State | None]:
        outputs = merge(graphdef, params).forward_eval(obs, state)
        logits, values = outputs[:2]
        return logits, values.reshape(-1), outputs[2] if recurrent else None

    def act(
        params: Params, obs: Any, state: State | None, start: Array | None, key: PRNGKeyArray
    ) -> tuple[Array, Array, Array, State | None]:
        if config.reset_on_done:
            assert start is not None
            state = jax.tree.map(lambda s: jnp.where(start[:, None], 0, s), state)
        logits, values, state = forward(params, obs, state)
        action, logprob, _ = sample_logits(logits, key=key)
        return action, logprob, values, state

    def value(params: Params, obs: Any, state: State | None) -> Array:
        return forward(params, obs, state)[1]

    def playable(action: Array) -> Array:
        if spaces.kind_of(action_space) != "box":
            return action
        low, high = (jnp.asarray(b, action.dtype) for b in (action_space.low, action_space.high))
        return jnp.clip(action, low, high)

    return Actor(initial_state, act, value, playable)


def stored(config: PuffeRLConfig, arrival: Arrival, masked: bool) -> dict[str, Any]:
    """What of an arrival goes into the `Experience`, as the options say."""
    bound, reward = config.reward_clip, arrival.reward * config.reward_scale
    terminal = arrival.terminated
    if config.bootstrap_truncation:
        terminal = terminal | arrival.truncated
    return {
        "observations": arrival.obs,
        "rewards": reward if bound is None else jnp.clip(reward, -bound, bound),
        "terminals": terminal.astype(reward.dtype),
        "starts": arrival.start if config.reset_on_done else None,
        "mask": arrival.mask if masked else None,
        "final_values": arrival.final_value if config.bootstrap_truncation else None,
    }


def with_own_value(arrival: Arrival, values: Array) -> Arrival:
    """The arrival where the observation at an episode's end is the episode's last one."""
    cut = arrival.truncated & ~arrival.terminated
    return arrival._replace(final_value=jnp.where(cut, values, 0))


def last_of(config: PuffeRLConfig, arrival: Arrival, values: Array) -> Last:
    """What followed the last actions, from the arrival after them and its values."""
    row = stored(config, arrival, masked=False)
    return Last(row["rewards"], row["terminals"], values, row["final_values"])


def _with_following(experience: Experience, after: Last, agents: int) -> Last:
    """What followed each row: the first step of the agent's next row, or `after`."""
    first = Last(
        experience.rewards[:, 0],
        experience.terminals[:, 0],
        experience.values[:, 0],
        None if experience.final_values is None else experience.final_values[:, 0],
    )
    return jax.tree.map(lambda row, end: jnp.concatenate([row[agents:], end]), first, after)


def _owned(tree: Any) -> Any:
    """A copy to donate: of nobody else's arrays, and of each only once."""
    return jax.tree.map(jnp.copy, tree)
