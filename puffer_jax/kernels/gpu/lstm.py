"""The LSTM's loops over time for NVIDIA's GPUs: one launch forward, one backward.

A block of threads computes some rows of the batch from the first step to the last. The weights do
not fit beside it on a multiprocessor, so each step streams them from the L2 cache, a few columns of
the inner dimension at a time. Registers cannot be cut, so h, c and the gates' gradients go through
memory (that of the results, which the L1 and L2 caches hold), with a barrier between those who
write and those who read. Why so, and at what cost: kernels/README.md.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from puffer_jax.kernels.over_time import Loops, activate, d_activate

# The most bytes of weights that a step may stream: with more, XLA's products win, since they
# divide the weights among all multiprocessors. On paper; see kernels/README.md.
_WEIGHTS = 1 << 20
_PRECISION = "jax_default_matmul_precision"


def takes(*arrays: PyTree, dtype: DTypeLike | None) -> bool:
    """Whether the kernels compute with these arguments of `lstm_scan`, and win on paper."""
    weight_ih, _, bias, x, h, c, _ = arrays
    dtype = jnp.dtype(weight_ih.dtype if dtype is None else dtype)
    batch, hidden = _sizes(h.shape[0], h.shape[1], dtype)
    known = {"float32", "bfloat16"}
    return (
        {dtype.name, weight_ih.dtype.name, bias.dtype.name, h.dtype.name, c.dtype.name} <= known
        and x.size > 0
        and 4 * hidden * hidden * dtype.itemsize <= _WEIGHTS
        and batch * x.shape[1] * 4 * hidden < 1 << 31  # Triton's offsets have 32 bits
    )


class _Tile(NamedTuple):
    """How a kernel is cut. Of the forms tried, these spill no registers.

    Attributes:
        rows: of the batch, in a block; sixteen is the least that a tensor core takes.
        columns: units whose gates are computed at a time.
        inner: of a product's inner dimension, streamed at a time.
        warps: in a block.
    """

    rows: int
    columns: int
    inner: int
    warps: int


def _tile(batch: int, hidden: int, dtype: np.dtype, backward: bool = False) -> _Tile:
    full = dtype == np.float32 and _in_full_precision()
    # The L2 cache feeds about fifty multiprocessors at their full rate: with more blocks than that,
    # it is better to read the weights half as often.
    # (Not by the precision asked for, which may be another one when the gradient is traced.)
    wide = hidden >= 128 if dtype.itemsize == 2 else hidden == 128
    rows = 32 if wide and batch > 16 * 48 else 16
    warps = 8 if hidden >= 128 else 4
    if backward:
        inner = 16 if full else 256 // dtype.itemsize
        return _Tile(rows, min(hidden, 128), min(inner, 4 * hidden), warps)
    # Rows of weights are read along the inner dimension, by whole cache lines of 128 bytes.
    return _Tile(rows, min(hidden, 8 * warps), min(hidden, 128 // dtype.itemsize), warps)


def _in_full_precision() -> bool:
    """Whether float32 is multiplied as it is, not as TF32."""
    asked = getattr(jax.config, _PRECISION)  # which type checkers do not know
    return str(asked) in ("highest", "float32", "F32_F32_F32")


def _sizes(batch: int, hidden: int, dtype: np.dtype) -> tuple[int, int]:
    """The next power of two from 32 on, from 128 on the next multiple of that; whole blocks."""
    hidden = max(32, 1 << (hidden - 1).bit_length()) if hidden <= 128 else -hidden // 128 * -128
    rows = _tile(batch, hidden, dtype).rows
    return -batch // rows * -rows, hidden


def _forward(interpret: bool, keep: bool, *arrays: PyTree) -> tuple[PyTree, PyTree]:
    projected, weight, _, h, *_ = arrays
    batch, time, width = projected.shape
    tile = _tile(batch, width // 4, weight.dtype)
    steps = jax.ShapeDtypeStruct((batch, time, width // 4), h.dtype)
    state = jax.ShapeDtypeStruct(h.shape, h.dtype)
    gates = jax.ShapeDtypeStruct(projected.shape, projected.dtype)
    results = _call(
        partial(_forward_kernel, tile, interpret, arrays[-1] is not None),
        (steps, state, state, gates, steps, steps) if keep else (steps, state, state),
        arrays,
        tile,
        {0: 3} if keep else {},  # the gates take the place of what came in
        interpret,
    )
    return results[:3], results[3:]


def _backward(interpret: bool, *arrays: PyTree) -> tuple[Array, ...]:
    weight, c, gates, *_ = arrays
    (batch, hidden), wide = c.shape, jnp.promote_types(c.dtype, jnp.float32)
    tile = _tile(batch, hidden, weight.dtype, backward=True)
    state = jax.ShapeDtypeStruct(c.shape, wide)
    d_gates = jax.ShapeDtypeStruct(gates.shape, gates.dtype)
    d_bias = [jax.ShapeDtypeStruct((batch // tile.rows, 4 * hidden), wide)]
    if tile.rows * hidden > 16 * 128:
        d_bias = []  # more sums than registers
    d_gates, *d_bias, dh, dc = _call(
        partial(_backward_kernel, tile, interpret, arrays[-1] is not None),
        (d_gates, *d_bias, state, state),
        arrays,
        tile,
        {2: 0},
        interpret,
    )
    return d_gates, d_bias[0] if d_bias else d_gates, dh, dc


def _call(
    kernel: partial,
    results: tuple[jax.ShapeDtypeStruct, ...],
    arrays: tuple[Array | None, ...],
    tile: _Tile,
    aliases: dict[int, int],
    interpret: bool,
) -> tuple[Array, ...]:
    # Imported by those who have use for it: it takes half a second.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    call = pl.pallas_call(
        kernel,
        out_shape=results,
        grid=(results[-1].shape[0] // tile.rows,),
        input_output_aliases=aliases,
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=3),
        name=kernel.func.__name__.strip("_"),
    )
    return tuple(call(*(array for array in arrays if array is not None)))


def _barrier(interpret: bool) -> None:
    """What any thread of the block wrote before can be read by all of them after."""
    from jax.experimental.pallas import triton

    if not interpret:  # which has one thread
        triton.debug_barrier()


def _either(first, first_ref, ref, keep=None) -> Array:
    """`first_ref` if it is the first step, otherwise `ref`; zero in the rows without `keep`."""
    from jax.experimental.pallas import triton

    def masked(ref, condition) -> Array:
        mask = condition if keep is None else keep[:, None] & condition
        return triton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0)

    return masked(first_ref, first) + masked(ref, ~first)


def _rows_kept(done, rows, t) -> Array | None:
    """Which rows go on at step t; None: all."""
    return ~done[0][rows, t] if done else None


def _zeroed(keep: Array | None, part: Array) -> Array:
    return part if keep is None else jnp.where(keep[:, None], part, 0)


def _forward_kernel(tile: _Tile, interpret: bool, resets: bool, *refs) -> None:
    from jax.experimental import pallas as pl

    projected, weight, bias, h_0, c_0, *refs = refs
    done, (outputs, h_last, c_last, *kept) = refs[:resets], refs[resets:]
    (_, time, hidden), wide = outputs.shape, jnp.promote_types(h_0.dtype, jnp.float32)
    rows = pl.ds(pl.program_id(0) * tile.rows, tile.rows)

    def column(j, t) -> None:
        at = [pl.ds(gate * hidden + j * tile.columns, tile.columns) for gate in range(4)]
        units, keep, first = at[0], _rows_kept(done, rows, t), t == 0

        def before(units) -> Array:
            last = outputs.at[rows, jnp.maximum(t - 1, 0), units]
            return _either(first, h_0.at[rows, units], last, keep)

        def product(k, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            inner = pl.ds(k * tile.inner, tile.inner)
            h = before(inner).astype(weight.dtype)
            dims = (((1,), (1,)), ((), ()))
            products = (
                jax.lax.dot_general(h, weight[gate, inner], dims, preferred_element_type=wide)
                for gate in at
            )
            return tuple(map(jnp.add, sums, products))

        sums = tuple(projected[rows, t, gate].astype(wide) + bias[gate][None] for gate in at)
        gates = activate(_loop(hidden // tile.inner, product, sums))
        i, f, g, o = gates
        c = _either(first, c_0.at[rows, units], c_last.at[rows, units], keep)
        c = f * c.astype(wide) + i * g
        h, c = (o * jnp.tanh(c)).astype(outputs.dtype), c.astype(c_last.dtype)
        _barrier(interpret)  # two threads may have read what one of them writes now
        outputs[rows, t, units] = h
        h_last[rows, units] = h
        c_last[rows, units] = c
        if kept:
            for gate, value in zip(at, gates, strict=True):
                kept[0][rows, t, gate] = value.astype(projected.dtype)
            kept[1][rows, t, units] = c
            kept[2][rows, t, units] = before(units)

    def step(t, _) -> None:
        _each(hidden // tile.columns, lambda j: column(j, t))
        _barrier(interpret)

    _loop(time, step)


def _backward_kernel(tile: _Tile, interpret: bool, resets: bool, *refs) -> None:
    from jax.experimental import pallas as pl

    weight, c_0, gates, cs, d_outputs, dh_last, dc_last, *refs = refs
    done, (d_gates, *d_bias, dh_ref, dc_ref) = refs[:resets], refs[resets:]
    (_, time, hidden), wide = cs.shape, dh_ref.dtype
    rows = pl.ds(pl.program_id(0) * tile.rows, tile.rows)

    def elementwise(j, t, keep: Array | None) -> tuple[Array, ...]:
        at = [pl.ds(gate * hidden + j * tile.columns, tile.columns) for gate in range(4)]
        units, last = at[0], t == time - 1
        dh = _either(last, dh_last.at[rows, units], dh_ref.at[rows, units])
        dc = _either(last, dc_last.at[rows, units], dc_ref.at[rows, units])
        before = cs.at[rows, jnp.maximum(t - 1, 0), units]
        c_before = _either(t == 0, c_0.at[rows, units], before, keep).astype(wide)
        parts, dc = d_activate(
            tuple(gates[rows, t, gate].astype(wide) for gate in at),
            cs[rows, t, units].astype(wide),
            c_before,
            dh + d_outputs[rows, t, units].astype(wide),
            dc,
        )
        _barrier(interpret)  # as above
        for gate, part in zip(at, parts, strict=True):
            d_gates[rows, t, gate] = part.astype(d_gates.dtype)
        dc_ref[rows, units] = _zeroed(keep, dc)
        return parts

    def product(j, t, keep: Array | None) -> None:
        units = pl.ds(j * tile.columns, tile.columns)

        def part(k, total: Array) -> Array:
            inner = pl.ds(k * tile.inner, tile.inner)
            return total + jnp.dot(
                d_gates[rows, t, inner], weight[inner, units], preferred_element_type=wide
            )

        total = jnp.zeros((tile.rows, tile.columns), wide)
        total = _loop(4 * hidden // tile.inner, part, total)
        dh_ref[rows, units] = _zeroed(keep, total)

    def step(s, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        t = time - 1 - s
        keep = _rows_kept(done, rows, t)
        if d_bias:
            sums = tuple(map(jnp.add, sums, elementwise(0, t, keep)))
        else:
            _each(hidden // tile.columns, lambda j: elementwise(j, t, keep))
        _barrier(interpret)
        _each(hidden // tile.columns, lambda j: product(j, t, keep))
        _barrier(interpret)
        return sums

    sums = (jnp.zeros((tile.rows, hidden), wide),) * (4 if d_bias else 0)
    for gate, total in enumerate(_loop(time, step, sums)):
        at = pl.ds(gate * hidden, hidden)
        d_bias[0][pl.program_id(0), at] = jnp.sum(total, axis=0)


def _loop(count: int, body: Callable, first: PyTree = None) -> PyTree:
    # With 64-bit numbers switched on, Python's would not go with the grid's.
    return jax.lax.fori_loop(np.int32(0), np.int32(count), body, first)


def _each(count: int, function: Callable) -> None:
    """Call the function with 0, 1, ...; without a loop where there is only 0."""
    if count == 1:
        function(0)
    else:

        def body(j, _) -> None:
            function(j)

        _loop(count, body)


LOOPS = Loops(partial(_forward, False), partial(_backward, False), False, _sizes)
INTERPRETED = Loops(partial(_forward, True), partial(_backward, True), False, _sizes)
"""`LOOPS` in Pallas's interpreter, which runs anywhere: for tests."""
