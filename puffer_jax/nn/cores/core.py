"""What every core has."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float

from puffer_jax.nn.params import Shape

State = dict[str, Array]

Rows = Any
"""A number of rows: an int, or a symbolic one of `jax.export`."""


@runtime_checkable
class Core(Protocol):
    """A recurrent layer with its state outside it.

    A state is a dict of arrays (batch, ...), so that it can be the carry of `jax.lax.scan`;
    that of a new episode is zero.

    Attributes:
        name: the attribute of the policy that holds the core, and so the prefix of its keys.
        input_size: width of its inputs.
        hidden_size: width of its outputs.
        param_dtype: dtype of its states and outputs.
    """

    name: ClassVar[str]
    input_size: int
    hidden_size: int
    param_dtype: Any

    def initial_state(self, batch_size: Rows) -> State:
        """The zero state of a new episode."""
        ...

    def step(
        self, x: Float[Array, "batch input"], state: State
    ) -> tuple[Float[Array, "batch hidden"], State]:
        """One step: its output and the new state."""
        ...

    def scan(
        self,
        x: Float[Array, "batch time input"],
        state: State,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], State]:
        """All steps: their outputs and the last state.

        Where `done[:, t]` is set, the state is zeroed before step t: `x[:, t]` begins an episode.
        """
        ...


@runtime_checkable
class KnownCore(Core, Protocol):
    """A core that checkpoints and the command line know by name, in `puffer_jax.nn.cores.CORES`.

    Attributes:
        sizes: the constructor's arguments that a checkpoint has to name, with their types.
        cell_names: parameters that torch lists a second time, under `cell.`: that name -> ours.
    """

    sizes: ClassVar[Mapping[str, type]]
    cell_names: ClassVar[Mapping[str, str]]

    # The sizes, then keyword-only `rngs`, `dtype` and `param_dtype`.
    def __init__(self, *sizes: Any, **options: Any): ...

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape]) -> dict[str, int] | None:
        """The sizes of the core in a policy's checkpoint; None if it has no such core."""
        ...
