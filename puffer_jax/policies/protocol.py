"""What the trainer, the weight exchange and `Recurrent` ask of a policy."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from puffer_jax.nn.cores.core import Rows
from puffer_jax.nn.distributions import Normal

Logits = Array | tuple[Array, ...] | Normal

State = dict[str, Any]  # arrays (batch, ...)


@runtime_checkable
class Policy(Protocol):
    """A policy without memory. Any `nnx.Module` with these attributes is one.

    Attributes:
        hidden_size: width of the encoding.
        is_continuous: whether actions are a Box.
    """

    hidden_size: int
    is_continuous: bool

    def encode_observations(self, observations: PyTree, state: State | None = None) -> Array:
        """Hidden vectors (batch, hidden_size)."""
        ...

    def decode_actions(self, hidden: Array) -> tuple[Logits, Array]:
        """Logits, and values (batch, 1)."""
        ...


@runtime_checkable
class RecurrentPolicy(Protocol):
    """A policy that carries a state from step to step; `Recurrent` is one.

    Attributes:
        is_continuous: whether actions are a Box.
    """

    is_continuous: bool

    def initial_state(self, batch_size: Rows) -> State:
        """The zero state of a new episode."""
        ...

    def forward_eval(
        self, observations: PyTree, state: State | None = None
    ) -> tuple[Logits, Array, State]:
        """One step: logits, values (batch, 1) and the new state."""
        ...

    def forward(
        self, observations: PyTree, state: State | None = None, done: ArrayLike | None = None
    ) -> tuple[Logits, Array, State]:
        """Segments (batch, time, *obs): logits (batch * time, ...), values (batch, time), state."""
        ...


def is_recurrent(policy: object) -> bool:
    """Whether the policy carries a state from step to step, that is, has `initial_state`."""
    return hasattr(policy, "initial_state")


def masked_by(policy: Any, logits: PyTree, observations: PyTree) -> PyTree:
    """The logits that a policy decoded, as its method `masked(logits, observations)` leaves them.

    The two halves of a policy pass no observations to the heads, so whoever calls them passes
    them here. A policy without the method masks nothing.
    """
    masked = getattr(policy, "masked", None)
    return masked(logits, observations) if callable(masked) else logits


def forward_of(policy: Any, *names: str) -> Callable[..., Any]:
    """How a policy is called: its first method of `names`, else whatever else it has.

    Args:
        policy: the policy.
        names: of `forward_eval`, `forward` and `__call__`, those to be preferred.

    Raises:
        TypeError: it has none of them, nor `encode_observations` and `decode_actions`.
    """
    for name in (*names, "forward_eval", "forward", "__call__"):
        method = getattr(policy, name, None)
        if callable(method):
            return method
    if hasattr(policy, "encode_observations") and hasattr(policy, "decode_actions"):

        def halves(x: PyTree, state: State | None = None) -> tuple[Logits, Array]:
            logits, values = policy.decode_actions(policy.encode_observations(x))
            return masked_by(policy, logits, x), values

        return halves
    raise TypeError(
        f"{type(policy).__name__} cannot be called: a policy has `forward_eval(observations, state)"
        "`, `forward` or `__call__`, or `encode_observations` and `decode_actions`, and gives "
        "(logits, values)"
    )
