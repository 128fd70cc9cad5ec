"""What every rollout does, whether compiled into one program or played step by step.

Both store what the reference's `PuffeRL.evaluate` stores, in its order: row `r * agents + i` is the
r-th segment of agent i, and a step's reward is the one that came with its observation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from puffer_jax.base.actions import way_into
from puffer_jax.base.spaces import Space
from puffer_jax.nn.params import merge, split
from puffer_jax.nn.random import Rows
from puffer_jax.nn.sampling import sample_logits
from puffer_jax.policies.protocol import forward_of, is_recurrent
from puffer_jax.policies.stateful import reset_where
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.experience import Experience, Last, Params, RecurrentState


class Arrival(NamedTuple):
    """What an environment hands to the agents at one step; arrays (agents, ...).

    Checkpoints contain its names. Environments on the host give NumPy arrays, and None for
    whatever the options do not ask for.

    Attributes:
        obs: the observations, an array or a tree of them.
        reward: float32, for the previous action.
        terminated: whether the episode ended.
        truncated: whether it was cut off.
        start: whether `obs` is the first of an episode.
        mask: False where an action on `obs` is not played.
        final_value: the value of the last observation of an episode cut off just now, else 0.
    """

    obs: PyTree
    reward: PyTree
    terminated: PyTree
    truncated: PyTree
    start: PyTree
    mask: PyTree
    final_value: PyTree


class Player:
    """A policy that acts in environments, as pure functions of its parameters.

    Args:
        config: whether an episode's start resets the state.
        policy: a policy with the structure of those that will act.
        action_space: the action space of the environments.

    Raises:
        ValueError: a policy cannot act in the action space, see `playable`.
    """

    def __init__(self, config: PuffeRLConfig, policy: nnx.Module, action_space: Space):
        self._config, self._policy = config, policy
        self._way_into_space = way_into(action_space)
        self._graphdef, self._recurrent = split(policy)[0], is_recurrent(policy)

    def initial_state(self, agents: int) -> RecurrentState | None:
        """The zero state; None for a feed-forward policy."""
        policy: Any = self._policy
        return policy.initial_state(agents) if self._recurrent else None

    def act(
        self,
        params: Params,
        observations: PyTree,
        state: RecurrentState | None,
        start: PyTree,
        key: PRNGKeyArray,
        rows: Rows | None = None,
    ) -> tuple[Array, Array, Array, RecurrentState | None]:
        """Sampled actions, their log-probabilities, the values, and the new state.

        `rows` says which of all agents these are; None: all.
        """
        state = self.at_start(state, start)
        logits, values, state = self._forward(params, observations, state)
        action, logprob, _ = sample_logits(logits, key=key, rows=rows)
        return action, logprob, values, state

    def value(
        self, params: Params, observations: PyTree, state: RecurrentState | None
    ) -> Float[Array, " agents"]:
        """The values of observations."""
        return self._forward(params, observations, state)[1]

    def value_dtype(self, observations: PyTree, state: RecurrentState | None) -> jnp.dtype:
        """The dtype of the values; a float64 policy has float64 values."""
        return jax.eval_shape(self.value, split(self._policy)[1], observations, state).dtype

    def at_start(self, state: RecurrentState | None, start: PyTree) -> RecurrentState | None:
        """The state to act in: with `reset_on_done`, zero where an episode starts."""
        if not self._config.reset_on_done:
            return state
        return reset_where(start, state)

    def playable(self, action: PyTree) -> PyTree:
        """The environments' actions for sampled ones, see `puffer_jax.playable`."""
        return self._way_into_space(action)

    def _forward(
        self, params: Params, observations: PyTree, state: RecurrentState | None
    ) -> tuple[PyTree, Array, RecurrentState | None]:
        outputs = forward_of(merge(self._graphdef, params))(observations, state)
        logits, values = outputs[:2]
        return logits, values.reshape(-1), outputs[2] if self._recurrent else None


def check_fits(config: PuffeRLConfig, policy: nnx.Module) -> None:
    """Check that the policy is what the configuration says.

    Raises:
        TypeError: it has no method to call.
        ValueError: it is recurrent, or not, or of a precision, against the configuration.
    """
    forward_of(policy)
    recurrent = is_recurrent(policy)
    if config.use_rnn is not None and config.use_rnn != recurrent:
        raise ValueError(
            f"use_rnn is {config.use_rnn}, but {type(policy).__name__} has "
            f"{'an' if recurrent else 'no'} initial_state"
        )
    inner = getattr(policy, "policy", policy)
    compute = getattr(inner, "dtype", None)
    is_bfloat16 = compute is not None and jnp.dtype(compute) == jnp.bfloat16
    if (config.precision == "bfloat16") != is_bfloat16:
        raise ValueError(
            f"precision is {config.precision}, but the policy was built with dtype={compute}; "
            "build it with dtype=jnp.bfloat16 for precision='bfloat16', and without dtype for "
            "float32"
        )


def stored(config: PuffeRLConfig, arrival: Arrival, masked: bool) -> dict[str, PyTree]:
    """The parts of an arrival that the options put into the `Experience`."""
    bound, reward = config.reward_clip, arrival.reward * config.reward_scale
    terminal: Array = arrival.terminated
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


def last_of(config: PuffeRLConfig, arrival: Arrival, values: Array) -> Last:
    """What followed the last actions, from the arrival after them and its values."""
    row = stored(config, arrival, masked=False)
    return Last(row["rewards"], row["terminals"], values, row["final_values"])


def with_following(experience: Experience, after: Last, agents: int) -> Experience:
    """The experience with what followed each row: the agent's next row, or `after`."""
    first = Last(
        experience.rewards[:, 0],
        experience.terminals[:, 0],
        experience.values[:, 0],
        None if experience.final_values is None else experience.final_values[:, 0],
    )
    last = jax.tree.map(lambda row, end: jnp.concatenate([row[agents:], end]), first, after)
    return experience._replace(last=last)
