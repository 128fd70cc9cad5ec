"""The LSTM's kernels."""

import jax
from jaxtyping import Array

from puffer_jax.kernels.cpu.native import call, like


def lstm(keep: bool, *arrays: Array) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    """Forward of `puffer_jax.layers.lstm_scan`.

    It takes the same arrays: weights, x, h and c of one dtype, and `done` bool (batch, time). It
    keeps all h, as rows (batch * time, hidden), and the gates and c of each step.
    """
    *weights, x, h, c, done = arrays
    (batch, time, _), hidden = x.shape, h.shape[1]
    rows = _rows(x)
    outputs = jax.ShapeDtypeStruct((batch * time, hidden), x.dtype)
    gates = jax.ShapeDtypeStruct((time, batch, 5, hidden) if keep else (0,), x.dtype)
    *results, gates = call(
        "puffer_jax_lstm_forward",
        (outputs, *like(h, c), gates),
        *(*weights, rows, h, c, done),
        # A step's input is read before its output is written.
        aliases={3: 0} if not keep and rows.shape == outputs.shape else None,
    )
    outputs = results[0].reshape(batch, time, hidden)
    return (outputs, *results[1:]), (outputs, gates)


def lstm_gradient(
    arrays: tuple[Array, ...], kept: tuple[Array, Array], cotangents: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Backward of `lstm`: the gradients of all arrays but `done`."""
    weight_ih, weight_hh, bias, x, h, c, done = arrays
    (outputs, gates), (d_outputs, *d_states) = kept, cotangents
    rows, d_rows = _rows(x), _rows(d_outputs)
    operands = (weight_ih, weight_hh, rows, h, c, done, _rows(outputs), gates, d_rows, *d_states)
    d_ih, d_hh, d_bias, dx, *d_start = call(
        "puffer_jax_lstm_backward",
        like(weight_ih, weight_hh, bias, rows, h, c),
        *operands,
        # As in `lstm`. The kernel takes rows since XLA would copy what is reshaped behind it.
        aliases={8: 3} if rows.shape == d_rows.shape else None,
    )
    return d_ih, d_hh, d_bias, dx.reshape(x.shape), *d_start


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def lstm_step(*arrays: Array) -> tuple[Array, Array]:
    """`puffer_jax.layers.lstm_step` of arrays of one dtype: the new h and c; no derivatives."""
    return call("puffer_jax_lstm_step", like(*arrays[-2:]), *arrays)
