"""What torch's recurrent layers share: parameters, their names and initialisation."""

import math
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from puffer_jax.nn.initializers import uniform
from puffer_jax.nn.params import Shape, shape_of


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
    sizes: ClassVar[Mapping[str, type]] = {"input_size": int, "hidden_size": int}
    cell_names: ClassVar[Mapping[str, str]] = {
        name: f"{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
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
        rows = self.gates * hidden_size

        def parameter(*shape: int) -> nnx.Param:
            return nnx.Param(uniform(rngs, shape, bound, param_dtype))

        self.weight_ih_l0 = parameter(rows, input_size)
        self.weight_hh_l0 = parameter(rows, hidden_size)
        self.bias_ih_l0 = parameter(rows)
        self.bias_hh_l0 = parameter(rows)

    def _weights(self) -> tuple[Array, Array, Array, Array]:
        biases = self.bias_ih_l0[...], self.bias_hh_l0[...]
        return self.weight_ih_l0[...], self.weight_hh_l0[...], *biases

    def _zeros(self, batch_size: int) -> Float[Array, "batch hidden"]:
        return jnp.zeros((batch_size, self.hidden_size), self.param_dtype)

    def _cast(self, part: ArrayLike) -> Array:
        # A carried state never changes its dtype.
        return jnp.asarray(part, self.weight_hh_l0.dtype)

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
