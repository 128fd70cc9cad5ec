"""What torch's recurrent layers share: parameters, their names and initialisation, the steps."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from puffer_jax.nn.cores.core import Rows, State
from puffer_jax.nn.initializers import uniform
from puffer_jax.nn.params import Shape, shape_of

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""Torch's names of a layer's parameters, without the layer's number."""

Weights = tuple[Array, Array, Array, Array]
"""The arrays of `WEIGHTS`."""

Parts = tuple[Float[Array, "batch hidden"], ...]
"""The state of one layer: an array for each of `GatedCore.state_names`, its output first."""


def weights_of(module: nnx.Module, layer: int) -> Weights:
    """The arrays of a layer that the module holds under torch's names."""
    a, b, c, d = (getattr(module, f"{name}_l{layer}")[...] for name in WEIGHTS)
    return a, b, c, d


def weight_shapes(gates: int, input_size: int, hidden_size: int) -> dict[str, Shape]:
    """The shapes of `WEIGHTS`."""
    rows = gates * hidden_size
    shapes = (rows, input_size), (rows, hidden_size), (rows,), (rows,)
    return dict(zip(WEIGHTS, shapes, strict=True))


class GatedCore(nnx.Module):
    """The parameters of one of torch's recurrent layers: its names, shapes and initialisation.

    They are stored as torch stores them: `weight_ih_l0` (gates*hidden, input), `weight_hh_l0`
    (gates*hidden, hidden), `bias_ih_l0` and `bias_hh_l0` (gates*hidden,), all
    U(-1/sqrt(hidden), +). Both biases are kept: each gets a gradient of its own, so with only
    their sum as a parameter an optimizer like Adam would move it at half the speed.

    Args:
        input_size: width of the inputs.
        hidden_size: width of the state and of the outputs.
        rngs: draws four keys from the stream `params`.
        dtype: of the matmuls; None: that of the parameters.
        param_dtype: of parameters, gates and states.
    """

    name: ClassVar[str]
    gates: ClassVar[int]
    state_names: ClassVar[tuple[str, ...]]
    sizes: ClassVar[Mapping[str, type]] = {"input_size": int, "hidden_size": int}
    cell_names: ClassVar[Mapping[str, str]] = {name: f"{name}_l0" for name in WEIGHTS}
    # Flax's own merge and clone sort attributes; this order is that of a .bin file.
    torch_names: ClassVar = {name: name for name in cell_names.values()}

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.param_dtype = param_dtype
        bound = 1 / math.sqrt(hidden_size)
        for name, shape in weight_shapes(self.gates, input_size, hidden_size).items():
            setattr(self, f"{name}_l0", nnx.Param(uniform(rngs, shape, bound, param_dtype)))

    @classmethod
    @abstractmethod
    def layer_step(
        cls,
        weights: Weights,
        x: Float[Array, "batch input"],
        parts: Parts,
        dtype: DTypeLike | None,
    ) -> Parts:
        """One step of a layer: its new state, the output first."""

    @classmethod
    @abstractmethod
    def layer_scan(
        cls,
        weights: Weights,
        x: Float[Array, "batch time input"],
        parts: Parts,
        done: Bool[Array, "batch time"] | None,
        dtype: DTypeLike | None,
    ) -> tuple[Float[Array, "batch time hidden"], Parts]:
        """All steps of a layer: the outputs and the last state; see `Core.scan`."""

    def initial_state(self, batch_size: Rows) -> State:
        """The zero state of a new episode."""
        shape = batch_size, self.hidden_size
        # An array each: donating one buffer twice is an error.
        return {name: jnp.zeros(shape, self.param_dtype) for name in sorted(self.state_names)}

    def step(self, x: Float[Array, "batch input"], state: State) -> tuple[Array, State]:
        """One step: its output and the new state."""
        parts = self.layer_step(weights_of(self, 0), x, self._parts(state), self.dtype)
        return parts[0], self._named(parts)

    def scan(
        self,
        x: Float[Array, "batch time input"],
        state: State,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], State]:
        """All steps: their outputs and the last state, see `Core.scan`."""
        weights, parts = weights_of(self, 0), self._parts(state)
        outputs, parts = self.layer_scan(weights, x, parts, done, self.dtype)
        return outputs, self._named(parts)

    def _parts(self, state: State) -> Parts:
        # A carried state never changes its dtype.
        dtype = weights_of(self, 0)[1].dtype
        return tuple(_cast(state[name], dtype) for name in self.state_names)

    def _named(self, parts: Sequence[Array]) -> State:
        return dict(zip(self.state_names, parts, strict=True))

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape]) -> dict[str, int] | None:
        """The sizes of the core in a policy's checkpoint; None if it has no such core."""
        name = f"{cls.name}.weight_ih_l0"
        if name not in shapes:
            # One of two tied keys is enough, but `cell` does not say which core it belongs to.
            name = "cell.weight_ih"
            rows, hidden = (*shapes.get("cell.weight_hh", ()), 0, 0)[:2]
            if name not in shapes or rows != cls.gates * hidden:
                return None
        rows, inputs = shape_of(shapes, name, 2)
        return {"input_size": inputs, "hidden_size": rows // cls.gates}


def _cast(part: ArrayLike, dtype: DTypeLike) -> Array:
    return jnp.asarray(part, dtype)
