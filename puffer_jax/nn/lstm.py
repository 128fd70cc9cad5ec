"""Torch's LSTM as a layer."""

import math
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from puffer_jax.kernels.lstm import lstm_scan, lstm_step
from puffer_jax.nn.initializers import _uniform


class LSTM(nnx.Module):
    """One LSTM layer with torch's parameters, gate order (i, f, g, o) and initialisation.

    Both biases are kept: each gets the same gradient, so with only their sum as a parameter an
    optimizer like Adam would move it at half the speed.

    Parameters are stored as torch stores them: `weight_ih_l0` (4*hidden, input), `weight_hh_l0`
    (4*hidden, hidden), `bias_ih_l0` and `bias_hh_l0` (4*hidden,), all U(-1/sqrt(hidden), +).

    Reference: `torch.nn.LSTM` and `torch.nn.LSTMCell`; Hochreiter and Schmidhuber 1997.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> lstm = puffer_jax.LSTM(4, 16, rngs=nnx.Rngs(0))
        >>> lstm.weight_ih_l0.shape
        (64, 4)
    """

    # Flax's own merge and clone sort attributes; the order is that of a .bin file.
    torch_names: ClassVar = {
        name: name for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    }

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.param_dtype = param_dtype
        bound = 1 / math.sqrt(hidden_size)
        rows = 4 * hidden_size

        def parameter(*shape: int) -> nnx.Param:
            return nnx.Param(_uniform(rngs, shape, bound, param_dtype))

        self.weight_ih_l0 = parameter(rows, input_size)
        self.weight_hh_l0 = parameter(rows, hidden_size)
        self.bias_ih_l0 = parameter(rows)
        self.bias_hh_l0 = parameter(rows)

    def _weights(self) -> tuple[Array, Array, Array, Array]:
        biases = self.bias_ih_l0[...], self.bias_hh_l0[...]
        return self.weight_ih_l0[...], self.weight_hh_l0[...], *biases

    def step(
        self, x: Float[Array, "batch input"], h: Float[Array, "batch hidden"], c: Array
    ) -> tuple[Array, Array]:
        """One step: inputs and state (h, c) in, new state (h, c) out; h is the output."""
        return lstm_step(*self._weights(), x, h, c, self.dtype)

    def scan(
        self,
        x: Float[Array, "batch time input"],
        h: Float[Array, "batch hidden"],
        c: Array,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
        """All steps: outputs (batch, time, hidden) and the last state (h, c).

        Where `done[:, t]` is set the state is zeroed before step t: `x[:, t]` begins an episode.
        """
        weight_ih, weight_hh, bias_ih, bias_hh = self._weights()
        return lstm_scan(weight_ih, weight_hh, bias_ih + bias_hh, x, h, c, done, self.dtype)
