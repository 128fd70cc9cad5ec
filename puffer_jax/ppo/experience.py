"""What a rollout leaves for the update, and what the update changes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

Params = dict[str, Any]

Hypers = Mapping[str, Any]


class Last(NamedTuple):
    """What followed the last action of each segment; arrays (segments,)."""

    rewards: Array
    terminals: Array
    values: Array
    final_values: Array | None


class Experience(NamedTuple):
    """What a rollout leaves for the update; arrays (segments, time, ...).

    Attributes:
        observations: an array or a tree of them.
        actions: as `sample_logits` gives them.
        logprobs: of the actions.
        values: of the observations.
        rewards: that came with the observations.
        terminals: 1.0 where the episode had ended when the observation came, else 0.0.
        starts: whether the observation is the first of an episode; None: states are not reset.
        mask: whether the step was played; None: all were.
        final_values: the value of the last observation of an episode that was truncated when this
            one came, else 0; None: truncation is ignored.
        state: the recurrent state before each segment, (segments, hidden); None: zeros.
        last: None: the last step of a segment has advantage 0.
    """

    observations: Any
    actions: Array
    logprobs: Array
    values: Array
    rewards: Array
    terminals: Array
    starts: Array | None = None
    mask: Array | None = None
    final_values: Array | None = None
    state: dict[str, Array] | None = None
    last: Last | None = None


class TrainState(NamedTuple):
    """What an update changes.

    Attributes:
        params: as `puffer_jax.split` gives them.
        opt_state: the optimizer's.
        epoch: int32, updates of the whole batch so far.
        nonfinite: int32, minibatches whose loss or gradient was not finite.
        culprit: int32, index into `Learner.names` of the first array that was not; -1: none.
    """

    params: Params
    opt_state: Any
    epoch: Array
    nonfinite: Array
    culprit: Array


class Details(NamedTuple):
    """The arrays of an update, for whoever wants to look: after its last minibatch."""

    advantages: Float[Array, "segments time"]
    ratio: Float[Array, "segments time"]
    values: Float[Array, "segments time"]
    priorities: Float[Array, " segments"]
    indices: Int[Array, "minibatches rows"] | None
