"""Torch's LSTM."""

from typing import ClassVar

from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from puffer_jax.kernels.lstm import lstm_scan, lstm_step
from puffer_jax.nn.cores.gated import GatedCore, Parts, Weights


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
    state_names: ClassVar = ("lstm_h", "lstm_c")

    @classmethod
    def layer_step(
        cls,
        weights: Weights,
        x: Float[Array, "batch input"],
        parts: Parts,
        dtype: DTypeLike | None,
    ) -> Parts:
        """One step of a layer: its new h and c."""
        h, c = parts
        return lstm_step(*weights, x, h, c, dtype)

    @classmethod
    def layer_scan(
        cls,
        weights: Weights,
        x: Float[Array, "batch time input"],
        parts: Parts,
        done: Bool[Array, "batch time"] | None,
        dtype: DTypeLike | None,
    ) -> tuple[Float[Array, "batch time hidden"], Parts]:
        """All steps of a layer: the outputs, the last h and c."""
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        bias = bias_ih + bias_hh
        h, c = parts
        outputs, h, c = lstm_scan(weight_ih, weight_hh, bias, x, h, c, done, dtype)
        return outputs, (h, c)
