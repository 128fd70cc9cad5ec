"""What stands between encoder and decoder: cores of several layers, and layers without memory."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from puffer_jax.kernels.perceptron import gelu
from puffer_jax.nn.cores import gru, lstm
from puffer_jax.nn.cores.core import Rows, State
from puffer_jax.nn.cores.mingru import MinGRU as MinGRU
from puffer_jax.nn.cores.stack import Layered, Stack, count
from puffer_jax.nn.initializers import torch_init
from puffer_jax.nn.params import Shape, shape_of
from puffer_jax.policies.base import Dtypes, zeros


class MLP(Layered):
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

    def initial_state(self, batch_size: Rows) -> State:
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
        layers = count("net.{}.weight", shapes, step=2)
        if layers == 0:
            return None
        return {"hidden_size": shape_of(shapes, "net.0.weight", 2)[1], "num_layers": layers}


class LSTM(Stack):
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

    core: ClassVar = lstm.LSTM
    name: ClassVar = core.name


class GRU(Stack):
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

    core: ClassVar = gru.GRU
    name: ClassVar = core.name
    sizes: ClassVar = {**Stack.sizes, "norm_in_training": str}
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

    def scan(
        self,
        x: Float[Array, "batch time input"],
        state: State,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], State]:
        """All steps: their outputs and the last state, see `Core.scan`."""
        if self.norm_in_training == "each":
            return super().scan(x, state, done)
        y, state = self._scanned(x, state, done, lambda x, h: h)
        return self._between(jnp.asarray(x, self.param_dtype), y), state

    def _between(
        self, x: Float[Array, "*batch hidden"], h: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch hidden"]:
        return self.norm(x + h)

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
        """The sizes of the network with these keys; None if they are not its."""
        sizes = super().from_keys(shapes)
        return None if sizes is None else {**sizes, "norm_in_training": "each"}
