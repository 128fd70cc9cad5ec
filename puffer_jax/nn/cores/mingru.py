"""PufferLib 4's MinGRU."""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from puffer_jax.kernels.mingru import mingru_layer
from puffer_jax.nn.cores.core import Rows, State
from puffer_jax.nn.cores.stack import Layered, count
from puffer_jax.nn.initializers import torch_init
from puffer_jax.nn.params import Shape, shape_of


class MinGRU(Layered):
    """Layers of a gated recurrence whose gates do not read the state, each with a highway.

    A state has "mingru_h" (batch, layers, hidden). Each layer has one weight, `layers.{i}.weight`
    (3 * hidden, hidden) in torch, and no bias. With (u, g, p) = W x, each of the width of x:

        z = sigmoid(g)    c = u + 0.5 where u >= 0, else sigmoid(u)
        h' = (1 - z) * h + z * c
        y = sigmoid(p) * h' + (1 - sigmoid(p)) * x

    y is the next layer's x. As no gate reads h, a segment is one linear recurrence in h. The
    original trains it in log space, from the zero state only; here it is computed as it stands,
    which cannot overflow, from any state. Its gradient is written out; there are no forward-mode
    derivatives (`jax.jvp`).

    Deviation: where `done` is set, the state is zeroed before that very step. The original's
    trainer does so one step late.

    Args:
        hidden_size: width of the inputs, the state and the outputs.
        num_layers: how many.
        rngs: draws a key for each layer from the stream `params`; weights are
            U(-1/sqrt(hidden), +), torch's default.
        dtype: of the matmuls; None: that of the parameters.
        param_dtype: of parameters, gates, states and outputs.

    Raises:
        ValueError: there are fewer than one layer.

    Reference: `MinGRU` in PufferLib 4's `pufferlib/models.py`; Feng et al. 2024,
    arXiv:2410.01201.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> core = puffer_jax.MinGRU(16, num_layers=2, rngs=nnx.Rngs(0))
        >>> outputs, state = core.scan(jax.numpy.ones((3, 8, 16)), core.initial_state(3))
        >>> outputs.shape, state["mingru_h"].shape
        ((3, 8, 16), (3, 2, 16))
    """

    name: ClassVar = "mingru"
    cell_names: ClassVar[Mapping[str, str]] = {}

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

        def layer() -> nnx.Linear:
            linear = nnx.Linear(
                hidden_size,
                3 * hidden_size,
                use_bias=False,
                kernel_init=jax.nn.initializers.zeros,
                rngs=rngs,
                dtype=dtype,
                param_dtype=param_dtype,
            )
            return torch_init(linear, rngs=rngs)

        self.layers = nnx.List([layer() for _ in range(num_layers)])

    def initial_state(self, batch_size: Rows) -> State:
        """The zero state of a new episode."""
        return {"mingru_h": self._zeros(batch_size)}

    def step(self, x: Float[Array, "batch input"], state: State) -> tuple[Array, State]:
        """One step: its output and the new state."""
        y, state = self.scan(x[:, None], state)
        return y[:, 0], state

    def scan(
        self,
        x: Float[Array, "batch time input"],
        state: State,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], State]:
        """All steps: their outputs and the last state, see `Core.scan`."""
        first = jnp.asarray(state["mingru_h"], self.param_dtype)
        starts = None if done is None else done.T
        y, last = jnp.swapaxes(jnp.asarray(x, self.param_dtype), 0, 1), []
        time, batch, hidden = y.shape
        for i, layer in enumerate(self.layers):
            # Of two axes in front, XLA:CPU makes a slow product for the weight's gradient.
            projected = layer(y.reshape(time * batch, hidden)).astype(self.param_dtype)
            y, h = mingru_layer(y, projected.reshape(time, batch, -1), first[:, i], starts)
            last.append(h)
        return jnp.swapaxes(y, 0, 1), {"mingru_h": jnp.stack(last, axis=1)}

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape]) -> dict[str, int] | None:
        """The sizes of the core in a policy's checkpoint; None if it has no such core."""
        return cls.sizes_under(f"{cls.name}.", shapes)

    @classmethod
    def sizes_under(cls, prefix: str, shapes: Mapping[str, Shape]) -> dict[str, int] | None:
        """The sizes of the core whose keys begin with `prefix`; None if there is none."""
        layers = count(pattern := f"{prefix}layers.{{}}.weight", shapes)
        if layers == 0:
            return None
        return {"hidden_size": shape_of(shapes, pattern.format(0), 2)[1], "num_layers": layers}
