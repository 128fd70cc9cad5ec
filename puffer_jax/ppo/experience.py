"""What a rollout leaves for the update, and what the update changes."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array, Float, Int, PyTree

from puffer_jax.ppo.moments import Normalization

# A Python number, or a traced scalar.
Number = float | int | Array

# As `puffer_jax.split` returns them.
Params = dict[str, PyTree]

# `PuffeRLConfig.hypers()`.
Hypers = Mapping[str, Number]

Metrics = dict[str, Array]

# Of a recurrent policy: arrays (agents, hidden) by name.
RecurrentState = dict[str, Array]


class Last(NamedTuple):
    """What followed the last action of each segment; arrays (segments,).

    Attributes:
        rewards: the rewards for the last action.
        terminals: 1.0 where it ended the episode.
        values: the values of the observations it led to.
        final_values: see `Experience`.
    """

    rewards: Array
    terminals: Array
    values: Array
    final_values: Array | None


class Experience(NamedTuple):
    """What a rollout leaves for the update; arrays (segments, time, ...).

    Attributes:
        observations: an array or a tree of them.
        actions: the actions, as `sample_logits` gives them.
        logprobs: the log-probabilities of the actions.
        values: the values of the observations.
        rewards: the rewards that came with the observations.
        terminals: 1.0 where the episode had ended when the observation came, else 0.0.
        starts: whether the observation is the first of an episode; None: that resets no state.
        mask: whether the step was played; None: all were.
        final_values: where an episode was truncated when this observation came, the value of its
            last one, else 0; None: truncation is ignored.
        state: the recurrent state before each segment, (segments, hidden); None: zeros.
        last: what followed each segment; None: its last step has advantage 0.
        waits: whether the step was not played because it was for others to act: what the agent gets
            until it plays again belongs to its last action; None: no agent waits.
    """

    observations: PyTree
    actions: Array
    logprobs: Array
    values: Array
    rewards: Array
    terminals: Array
    starts: Array | None = None
    mask: Array | None = None
    final_values: Array | None = None
    state: RecurrentState | None = None
    last: Last | None = None
    waits: Array | None = None


class TrainState(NamedTuple):
    """What an update changes.

    Attributes:
        params: the policy's parameters, as `puffer_jax.split` returns them.
        opt_state: the optimizer's state.
        epoch: int32, how many batches have been learned from.
        nonfinite: int32, in how many optimizer steps an array in `Learner.names` was not finite.
        culprit: int32, index into `Learner.names` of the first such array of the last update that
            had one; -1 if none had.
        normalization: what is known about observations and rewards; None: neither is normalised.
        unplayed: float32, how many batches the steps would fill that were not played (see
            `Experience.mask`); None counts as 0.
        lost: what rounding took from `unplayed`; None counts as 0.
    """

    params: Params
    opt_state: PyTree
    epoch: Array
    nonfinite: Array
    culprit: Array
    normalization: Normalization | None = None
    unplayed: Array | None = None
    lost: Array | None = None


class Details(NamedTuple):
    """The arrays of an update after its last minibatch, for inspection.

    Attributes:
        advantages: the advantages that the last minibatch was drawn by.
        ratio: the ratio of the new policy to the acting one where a minibatch has visited, else 1.
        values: the new values where a minibatch has visited, else the rollout's.
        priorities: how likely each row was to be in the last minibatch.
        indices: the rows of each minibatch: segments, or steps (see `PuffeRLConfig.sampling`).
    """

    advantages: Float[Array, "segments time"]
    ratio: Float[Array, "segments time"]
    values: Float[Array, "segments time"]
    priorities: Float[Array, " segments"]
    indices: Int[Array, "minibatches rows"] | None
