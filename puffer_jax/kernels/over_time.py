"""The LSTM over time, whoever runs its loop: the large products before and after it.

Only h @ weight_hh.T needs the step before. The inputs' part of the gates is one product before the
loop; the gradients of weights and inputs are products after the backward loop.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Function


class Loops(NamedTuple):
    """The loops over time for one kind of device.

    Everything as wide as the four gates, (..., 4 * hidden) in the order i, f, g, o, has the dtype
    of the products, and so has `weight_hh`; the rest has that of the states.

    Attributes:
        forward: (keep, projected, weight_hh, bias, h, c, done) -> (outputs, h, c), kept.
            `projected` is x @ weight_ih.T without the bias; `done` may be None. With `keep`, kept
            is (gates, cs, h_before): of each step the gates after their non-linearities, c, and
            the h that it read, zero where `done` is set; otherwise it is ().
        backward: (weight_hh, c, gates, cs, d_outputs, dh, dc, done) -> (d_projected, d_bias, dh,
            dc), where d_bias has any number of rows (..., 4 * hidden), to be summed.
        time_first: sequences, but for `done`, are (time, batch, ...), not (batch, time, ...).
        sizes: (batch, hidden, dtype of the products) -> those that the loops can compute with,
            none of them smaller. Rows and columns are filled with zeros.
    """

    forward: Function
    backward: Function
    time_first: bool
    sizes: Callable[[int, int, np.dtype], tuple[int, int]]


def lstm_over_time(
    loops: Loops, plain: Function, *arrays: PyTree, dtype: DTypeLike | None
) -> tuple[Array, Array, Array]:
    """`puffer_jax.layers.lstm_scan` by these loops.

    Args:
        loops: hashable.
        plain: the same function in XLA's operations, for derivatives beyond the first.
        arrays: weight_ih, weight_hh, bias, x, h, c, and done or None.
        dtype: of the products, None: that of the weights.
    """
    *floats, done = arrays
    x, h, c = floats[3:]
    dtype = jnp.dtype(floats[0].dtype if dtype is None else dtype)
    rows, columns = h.shape
    batch, hidden = loops.sizes(rows, columns, dtype)
    gates = [_widen(array, columns, hidden) for array in floats[:3]]
    gates[1] = _fill(gates[1], 1, hidden)
    x, done = _fill(x, 0, batch), None if done is None else _fill(done, 0, batch)
    h_0, c_0 = (_fill(_fill(part, 0, batch), 1, hidden) for part in (h, c))
    outputs, *last = _function(loops, plain)(*gates, x, h_0, c_0, done, dtype=dtype)
    return outputs[:rows, :, :columns], *(part[:rows, :columns] for part in last)


def _fill(array: Array, axis: int, size: int) -> Array:
    """The array, with zeros after its end along one axis."""
    missing = size - array.shape[axis]
    if missing == 0:
        return array
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])


def _widen(array: Array, hidden: int, wider: int) -> Array:
    """The array, with zeros after each of the four gates."""
    if hidden == wider:
        return array
    gates = array.reshape(4, hidden, *array.shape[1:])
    return _fill(gates, 1, wider).reshape(4 * wider, *array.shape[1:])


@cache
def _function(loops: Loops, plain: Function) -> Function:
    def forward(keep: bool, *arrays: PyTree, dtype: DTypeLike) -> tuple[PyTree, PyTree]:
        weight_ih, weight_hh, bias, x, h, c, done = arrays
        x, weight_hh = _turned(loops, x).astype(dtype), weight_hh.astype(dtype)
        projected = x @ weight_ih.astype(dtype).T
        (outputs, *last), kept = loops.forward(keep, projected, weight_hh, bias, h, c, done)
        return (_turned(loops, outputs), *last), kept

    def backward(
        arrays: PyTree, kept: PyTree, cotangents: PyTree, dtype: DTypeLike
    ) -> tuple[Array, ...]:
        weight_ih, weight_hh, bias, x, h, c, done = arrays
        gates, cs, h_before = kept
        d_outputs, dh, dc = cotangents
        d_gates, d_bias, dh, dc = loops.backward(
            weight_hh.astype(dtype), c, gates, cs, _turned(loops, d_outputs), dh, dc, done
        )
        flat, *rows = (
            part.astype(dtype).reshape(-1, part.shape[2])
            for part in (d_gates, _turned(loops, x), h_before)
        )
        d_ih, d_hh = (jnp.matmul(flat.T, part, preferred_element_type=bias.dtype) for part in rows)
        dx = _turned(loops, (d_gates @ weight_ih.astype(dtype)).astype(x.dtype))
        d_bias = d_bias.reshape(-1, d_bias.shape[-1]).sum(0, dtype=_wide(bias.dtype))
        return d_ih, d_hh, d_bias.astype(bias.dtype), dx, dh.astype(h.dtype), dc.astype(c.dtype)

    return cpu.differentiable(forward, backward, plain)


def _turned(loops: Loops, sequence: Array) -> Array:
    """The sequence as the loops take it, or back."""
    return jnp.swapaxes(sequence, 0, 1) if loops.time_first else sequence


def _wide(dtype: DTypeLike) -> DTypeLike:
    """The dtype of sums: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def activate(sums: tuple[Array, ...]) -> tuple[Array, Array, Array, Array]:
    """The gates (i, f, g, o) after their non-linearities."""
    i, f, g, o = sums
    return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def d_activate(
    gates: tuple[Array, ...], c: Array, c_before: Array, dh: Array, dc: Array
) -> tuple[tuple[Array, Array, Array, Array], Array]:
    """A step backwards through h = o * tanh(c), c = f * c_before + i * g.

    Returns:
        The gradients of the gates before their non-linearities, and that of c_before.
    """
    i, f, g, o = gates
    tanh_c = jnp.tanh(c)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    parts = (
        dc * g * i * (1 - i),
        dc * c_before * f * (1 - f),
        dc * i * (1 - g * g),
        dh * tanh_c * o * (1 - o),
    )
    return parts, dc * f
