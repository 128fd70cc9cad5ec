"""Torch's LSTM."""

from typing import ClassVar

from jaxtyping import Array, Bool, Float

from puffer_jax.kernels.lstm import lstm_scan, lstm_step
from puffer_jax.nn.cores.core import State
from puffer_jax.nn.cores.gated import GatedCore


class LSTM(GatedCore):
    """One LSTM layer with torch's parameters, gate order (i, f, g, o) and initialisation.

    A state has "lstm_h", which is the output, and "lstm_c", both (batch, hidden).

    Reference: `torch.nn.LSTM` and `torch.nn.LSTMCell`; Hochreiter and Schmidhuber 1997.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> lstm = puffer_jax.LSTM(4, 16, rngs=nnx.Rngs(0))
        >>> lstm.weight_ih_l0.shape
        (64, 4)
    """

    name: ClassVar = "lstm"
    gates: ClassVar = 4

    def initial_state(self, batch_size: int) -> State:
        """The zero state of a new episode."""
        # Two arrays: donating one buffer twice is an error.
        return {"lstm_c": self._zeros(batch_size), "lstm_h": self._zeros(batch_size)}

    def step(self, x: Float[Array, "batch input"], state: State) -> tuple[Array, State]:
        """One step: its output and the new state."""
        h, c = self._cast(state["lstm_h"]), self._cast(state["lstm_c"])
        h, c = lstm_step(*self._weights(), x, h, c, self.dtype)
        return h, {"lstm_h": h, "lstm_c": c}

    def scan(
        self,
        x: Float[Array, "batch time input"],
        state: State,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], State]:
        """All steps: their outputs and the last state, see `Core.scan`."""
        h, c = self._cast(state["lstm_h"]), self._cast(state["lstm_c"])
        weight_ih, weight_hh, bias_ih, bias_hh = self._weights()
        outputs, h, c = lstm_scan(
            weight_ih, weight_hh, bias_ih + bias_hh, x, h, c, done, self.dtype
        )
        return outputs, {"lstm_h": h, "lstm_c": c}
