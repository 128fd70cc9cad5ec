"""What stands between encoder and decoder: cores of several layers, and layers without memory."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from puffer_jax.kernels.lstm import lstm_scan, lstm_step
from puffer_jax.kernels.perceptron import gelu
from puffer_jax.nn.cores.core import State
from puffer_jax.nn.cores.gru import gru_scan, gru_step
from puffer_jax.nn.cores.mingru import MinGRU as MinGRU
from puffer_jax.nn.initializers import reset_orthogonal, torch_init
from puffer_jax.nn.params import Shape, shape_of
from puffer_jax.policies.base import Dtypes, zeros

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Sized(nnx.Module):
    """What all of them are given; the arguments are those of the subclasses."""

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


class MLP(_Sized):
    """Linear layers, each followed by the exact GELU; without memory, so its state is empty.

    Args:
        hidden_size: width of inputs, layers and outputs.
        num_layers: how many.
        rngs: stream `params`; the weights are torch's default.
        dtype: of the matmuls; None: that of the parameters.
        param_dtype: of parameters and outputs.

    Raises:
        ValueError: there are fewer than one layer.

    Reference: `MLP` in PufferLib 4's `pufferlib/models.py`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from puffer_jax import v4
        >>> network = v4.MLP(16, num_layers=2, rngs=nnx.Rngs(0))
        >>> y, state = network.step(jax.numpy.ones((3, 16)), network.initial_state(3))
        >>> y.shape, state
        ((3, 16), {})
    """

    name: ClassVar = "net"

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
        dtypes = Dtypes(dtype=dtype, param_dtype=param_dtype)
        layers = []
        for _ in range(num_layers):
            layer = nnx.Linear(hidden_size, hidden_size, kernel_init=zeros, rngs=rngs, **dtypes)
            layers += [torch_init(layer, rngs=rngs), gelu]
        self.net = nnx.Sequential(*layers)

    def initial_state(self, batch_size: int) -> State:
        """Nothing."""
        return {}

    def step(self, x: Float[Array, "batch input"], state: State) -> tuple[Array, State]:
        """Outputs (batch, hidden), and nothing."""
        return self.net(x).astype(self.param_dtype), {}

    def scan(
        self,
        x: Float[Array, "batch time input"],
        state: State,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], State]:
        """The outputs of all steps, each for itself, and nothing."""
        return self.net(x).astype(self.param_dtype), {}

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
        """The sizes of the network with these keys; None if they are not its."""
        count = _count("net.{}.weight", shapes, step=2)
        if count == 0:
            return None
        return {"hidden_size": shape_of(shapes, "net.0.weight", 2)[1], "num_layers": count}


class _Layers(nnx.Module):
    """The parameters of torch's recurrent layers of one width, under torch's names."""

    def __init__(self, gates: int, hidden_size: int, num_layers: int, param_dtype: DTypeLike):
        self.num_layers = num_layers
        rows = gates * hidden_size
        shapes = (rows, hidden_size), (rows, hidden_size), (rows,), (rows,)
        for i in range(num_layers):
            for name, shape in zip(_NAMES, shapes, strict=True):
                setattr(self, f"{name}_l{i}", nnx.Param(jnp.zeros(shape, param_dtype)))

    @property
    def torch_names(self) -> dict[str, str]:
        """Torch's order, layer by layer."""
        names = (f"{name}_l{i}" for i in range(self.num_layers) for name in _NAMES)
        return {name: name for name in names}

    def of(self, i: int) -> tuple[Array, Array, Array, Array]:
        """The arrays of a layer."""
        a, b, c, d = (getattr(self, f"{name}_l{i}")[...] for name in _NAMES)
        return a, b, c, d


class _Gated(_Sized):
    """What LSTM and GRU share.

    Args:
        hidden_size: width of inputs, states and outputs.
        num_layers: how many.
        rngs: stream `params`; weights are orthogonal, biases zero.
        dtype: of the matmuls; None: that of the parameters.
        param_dtype: of parameters, gates, states and outputs.

    Raises:
        ValueError: there are fewer than one layer.
    """

    name: ClassVar[str]
    gates: ClassVar[int]

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
        setattr(self, self.name, _Layers(self.gates, hidden_size, num_layers, param_dtype))
        reset_orthogonal(self._layers, rngs=rngs)

    @property
    def _layers(self) -> _Layers:
        return getattr(self, self.name)

    @property
    def torch_aliases(self) -> dict[str, str]:
        """The original lists the parameters twice: for segments and for steps."""
        return {
            f"cell.{i}.{name}": f"{self.name}.{name}_l{i}"
            for i in range(self.num_layers)
            for name in _NAMES
        }

    def _zeros(self, batch_size: int) -> Float[Array, "batch layers hidden"]:
        return jnp.zeros((batch_size, self.num_layers, self.hidden_size), self.param_dtype)

    def _cast(self, part: ArrayLike) -> Array:
        # A carried state never changes its dtype.
        return jnp.asarray(part, self.param_dtype)

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
        """The sizes of the network with these keys; None if they are not its."""
        # One of two tied keys is enough, but `cell` does not say which core it belongs to.
        for pattern in (f"{cls.name}.weight_hh_l{{}}", "cell.{}.weight_hh"):
            count = _count(pattern, shapes)
            if count:
                rows, hidden = shape_of(shapes, pattern.format(0), 2)
                fits = rows == cls.gates * hidden
                return {"hidden_size": hidden, "num_layers": count} if fits else None
        return None


class LSTM(_Gated):
    """Torch's LSTM of several layers.

    A state has "lstm_h" and "lstm_c", both (batch, layers, hidden).

    Args:
        hidden_size: width of inputs, states and outputs.
        num_layers: how many.
        rngs: stream `params`; weights are orthogonal, biases zero.
        dtype: of the matmuls; None: that of the parameters.
        param_dtype: of parameters, gates, states and outputs.

    Reference: `LSTM` in PufferLib 4's `pufferlib/models.py`.

    Example:
        >>> from flax import nnx
        >>> from puffer_jax import v4
        >>> network = v4.LSTM(16, num_layers=2, rngs=nnx.Rngs(0))
        >>> network.initial_state(3)["lstm_h"].shape
        (3, 2, 16)
    """

    name: ClassVar = "lstm"
    gates: ClassVar = 4
    lstm: _Layers

    def initial_state(self, batch_size: int) -> State:
        """The zero state of a new episode."""
        return {"lstm_c": self._zeros(batch_size), "lstm_h": self._zeros(batch_size)}

    def step(self, x: Float[Array, "batch input"], state: State) -> tuple[Array, State]:
        """One step: its output and the new state."""
        h, c = self._cast(state["lstm_h"]), self._cast(state["lstm_c"])
        new = []
        for i in range(self.num_layers):
            x, cell = lstm_step(*self.lstm.of(i), x, h[:, i], c[:, i], self.dtype)
            new.append((x, cell))
        return x, self._stacked(new)

    def scan(
        self,
        x: Float[Array, "batch time input"],
        state: State,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], State]:
        """All steps: their outputs and the last state, see `Core.scan`."""
        h, c = self._cast(state["lstm_h"]), self._cast(state["lstm_c"])
        last = []
        for i in range(self.num_layers):
            weight_ih, weight_hh, bias_ih, bias_hh = self.lstm.of(i)
            bias = bias_ih + bias_hh
            x, *ends = lstm_scan(weight_ih, weight_hh, bias, x, h[:, i], c[:, i], done, self.dtype)
            last.append(ends)
        return x, self._stacked(last)

    def _stacked(self, layers: list[Any]) -> State:
        h, c = (jnp.stack(parts, axis=1) for parts in zip(*layers, strict=True))
        return {"lstm_h": h, "lstm_c": c}


class GRU(_Gated):
    """Torch's GRU of several layers, each added to its inputs and normalised.

    A state has "gru_h" (batch, layers, hidden). Of each layer the output is norm(x + h), with one
    `norm` for all, in acting and in training.

    Deviation: the original adds and normalises after every layer when it acts, but only once,
    after the last one, when it trains. With one layer both are the same; with more, what it trains
    is not what acts. `norm_in_training="last"` does so, too.

    Args:
        hidden_size: width of inputs, states and outputs.
        num_layers: how many.
        norm_in_training: "each" layer, or only the "last", as the original does.
        rngs: stream `params`; weights are orthogonal, biases zero, the norm's scale one.
        dtype: of the matmuls; None: that of the parameters.
        param_dtype: of parameters, gates, states and outputs.

    Raises:
        ValueError: `norm_in_training` is neither.

    Reference: `GRU` in PufferLib 4's `pufferlib/models.py`.

    Example:
        >>> from flax import nnx
        >>> from puffer_jax import v4
        >>> network = v4.GRU(16, num_layers=2, rngs=nnx.Rngs(0))
        >>> network.initial_state(3)["gru_h"].shape
        (3, 2, 16)
    """

    name: ClassVar = "gru"
    gates: ClassVar = 3
    sizes: ClassVar = {**_Gated.sizes, "norm_in_training": str}
    gru: _Layers
    torch_names: ClassVar = {"gru": "gru", "norm": "norm"}

    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 1,
        *,
        norm_in_training: str = "each",
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(hidden_size, num_layers, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        if norm_in_training not in ("each", "last"):
            raise ValueError(f"norm_in_training is 'each' or 'last'; got {norm_in_training!r}")
        self.norm_in_training = norm_in_training
        self.norm = nnx.RMSNorm(
            hidden_size,
            epsilon=float(jnp.finfo(param_dtype).eps),  # torch's, if none is given
            rngs=rngs,
            param_dtype=param_dtype,
        )

    def initial_state(self, batch_size: int) -> State:
        """The zero state of a new episode."""
        return {"gru_h": self._zeros(batch_size)}

    def step(self, x: Float[Array, "batch input"], state: State) -> tuple[Array, State]:
        """One step: its output and the new state."""
        h, x, new = self._cast(state["gru_h"]), self._cast(x), []
        for i in range(self.num_layers):
            new.append(gru_step(*self.gru.of(i), x, h[:, i], self.dtype))
            x = self.norm(x + new[-1])
        return x, {"gru_h": jnp.stack(new, axis=1)}

    def scan(
        self,
        x: Float[Array, "batch time input"],
        state: State,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], State]:
        """All steps: their outputs and the last state, see `Core.scan`."""
        h, x, last = self._cast(state["gru_h"]), self._cast(x), []
        each, y = self.norm_in_training == "each", x
        for i in range(self.num_layers):
            outputs, end = gru_scan(*self.gru.of(i), y, h[:, i], done, self.dtype)
            last.append(end)
            y = self.norm(y + outputs) if each else outputs
        return y if each else self.norm(x + y), {"gru_h": jnp.stack(last, axis=1)}

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
        """The sizes of the network with these keys; None if they are not its."""
        sizes = super().from_keys(shapes)
        return None if sizes is None else {**sizes, "norm_in_training": "each"}


def _count(pattern: str, shapes: Mapping[str, Shape], step: int = 1) -> int:
    """How many of the names that `pattern` makes of 0, `step`, 2 * `step`, ... there are."""
    i = 0
    while pattern.format(i * step) in shapes:
        i += 1
    return i
