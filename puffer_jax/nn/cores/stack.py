"""Layers of one width on top of each other: what they share, and stacks of torch's."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from puffer_jax.nn.cores.core import Rows, State
from puffer_jax.nn.cores.gated import WEIGHTS, GatedCore, Parts, weight_shapes, weights_of
from puffer_jax.nn.initializers import reset_orthogonal
from puffer_jax.nn.params import Shape, shape_of


class Layered(nnx.Module):
    """Layers as wide as their inputs.

    Args:
        hidden_size: width of inputs, layers and outputs.
        num_layers: how many.
        dtype: of the matmuls; None: that of the parameters.
        param_dtype: of parameters, states and outputs.

    Raises:
        ValueError: there are fewer than one layer.
    """

    sizes: ClassVar[Mapping[str, type]] = {"hidden_size": int, "num_layers": int}

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
    ):
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; there must be at least one")
        self.input_size = self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.dtype = dtype
        self.param_dtype = param_dtype

    def _zeros(self, batch_size: Rows) -> Float[Array, "batch layers hidden"]:
        return jnp.zeros((batch_size, self.num_layers, self.hidden_size), self.param_dtype)


def count(pattern: str, shapes: Mapping[str, Shape], step: int = 1) -> int:
    """How many of the names that `pattern` makes of 0, `step`, 2 * `step`, ... there are."""
    i = 0
    while pattern.format(i * step) in shapes:
        i += 1
    return i


class _Weights(nnx.Module):
    """The parameters of torch's recurrent layers of one width, under torch's names."""

    def __init__(self, gates: int, hidden_size: int, num_layers: int, param_dtype: DTypeLike):
        self.num_layers = num_layers
        for i in range(num_layers):
            for name, shape in weight_shapes(gates, hidden_size, hidden_size).items():
                setattr(self, f"{name}_l{i}", nnx.Param(jnp.zeros(shape, param_dtype)))

    @property
    def torch_names(self) -> dict[str, str]:
        """Torch's order, layer by layer."""
        names = (f"{name}_l{i}" for i in range(self.num_layers) for name in WEIGHTS)
        return {name: name for name in names}


class Stack(Layered):
    """Several layers of a `GatedCore`, each reading the outputs of the one below.

    The parts of a state are the core's, (batch, layers, hidden). Weights are orthogonal, biases
    zero; torch lists them twice, under the core's name and under `cell.{i}`.

    Args:
        hidden_size: width of inputs, states and outputs.
        num_layers: how many.
        rngs: stream `params`.
        dtype: of the matmuls; None: that of the parameters.
        param_dtype: of parameters, gates, states and outputs.

    Raises:
        ValueError: there are fewer than one layer.

    Attributes:
        core: what each layer is.
        name: the attribute that holds the parameters, the core's name.
    """

    core: ClassVar[type[GatedCore]]
    name: ClassVar[str]

    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 1,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(hidden_size, num_layers, dtype, param_dtype)
        weights = _Weights(self.core.gates, hidden_size, num_layers, param_dtype)
        reset_orthogonal(weights, rngs=rngs)
        setattr(self, self.name, weights)

    @property
    def torch_aliases(self) -> dict[str, str]:
        """The original lists the parameters twice: for segments and for steps."""
        return {
            f"cell.{i}.{name}": f"{self.name}.{name}_l{i}"
            for i in range(self.num_layers)
            for name in WEIGHTS
        }

    def initial_state(self, batch_size: Rows) -> State:
        """The zero state of a new episode."""
        # An array each: donating one buffer twice is an error.
        return {name: self._zeros(batch_size) for name in sorted(self.core.state_names)}

    def step(self, x: Float[Array, "batch input"], state: State) -> tuple[Array, State]:
        """One step: its output and the new state."""
        x, new = jnp.asarray(x, self.param_dtype), []
        for i, parts in enumerate(self._layers_of(state)):
            new.append(self.core.layer_step(self._weights(i), x, parts, self.dtype))
            x = self._between(x, new[-1][0])
        return x, self._stacked(new)

    def scan(
        self,
        x: Float[Array, "batch time input"],
        state: State,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], State]:
        """All steps: their outputs and the last state, see `Core.scan`."""
        return self._scanned(x, state, done, self._between)

    def _scanned(
        self, x: Array, state: State, done: Array | None, between: Callable[[Array, Array], Array]
    ) -> tuple[Array, State]:
        x, last = jnp.asarray(x, self.param_dtype), []
        for i, parts in enumerate(self._layers_of(state)):
            h, end = self.core.layer_scan(self._weights(i), x, parts, done, self.dtype)
            last.append(end)
            x = between(x, h)
        return x, self._stacked(last)

    def _between(
        self, x: Float[Array, "*batch hidden"], h: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch hidden"]:
        """What follows a layer that made `h` of `x`."""
        return h

    def _weights(self, i: int) -> tuple[Array, Array, Array, Array]:
        return weights_of(getattr(self, self.name), i)

    def _layers_of(self, state: State) -> list[Parts]:
        # A carried state never changes its dtype.
        parts = [jnp.asarray(state[name], self.param_dtype) for name in self.core.state_names]
        return [tuple(part[:, i] for part in parts) for i in range(self.num_layers)]

    def _stacked(self, layers: list[Parts]) -> State:
        parts = (jnp.stack(part, axis=1) for part in zip(*layers, strict=True))
        return dict(zip(self.core.state_names, parts, strict=True))

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
        """The sizes of the network with these keys; None if they are not its."""
        # One of two tied keys is enough, but `cell` does not say which core it belongs to.
        for pattern in (f"{cls.name}.weight_hh_l{{}}", "cell.{}.weight_hh"):
            layers = count(pattern, shapes)
            if layers:
                rows, hidden = shape_of(shapes, pattern.format(0), 2)
                fits = rows == cls.core.gates * hidden
                return {"hidden_size": hidden, "num_layers": layers} if fits else None
        return None
