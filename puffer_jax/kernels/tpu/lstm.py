"""The LSTM's loops over time for TPUs: one launch forward, one backward.

The grid is (blocks of rows, time), computed in this order. Weights and states have the same block
at every step, and so stay in the core's vector memory, where the next step finds the states as
the last one left them; the gates of a step are copied while the step before is computed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from puffer_jax.kernels.over_time import Loops, activate, d_activate

# Of the 128 MiB of a v5e's vector memory, what the kernels may fill.
_MEMORY = 96 << 20
# Rows of a block: more would fill the matrix unit no better.
_ROWS = 256
# The results of the forward kernel that have a step for each time: all but the last h and c.
_STEPS = (0, 3, 4, 5)


def takes(*arrays: PyTree, dtype: DTypeLike | None) -> bool:
    """Whether the kernels compute with these arguments of `lstm_scan`."""
    weight_ih, _, bias, x, h, c, _ = arrays
    dtype = jnp.dtype(weight_ih.dtype if dtype is None else dtype)
    batch, hidden = _sizes(h.shape[0], h.shape[1], dtype)
    known = {"float32", "bfloat16"}
    return (
        {dtype.name, weight_ih.dtype.name, bias.dtype.name, h.dtype.name, c.dtype.name} <= known
        and x.size > 0
        and _bytes(batch, hidden, x.shape[1]) <= _MEMORY
    )


def _sizes(batch: int, hidden: int, dtype: np.dtype) -> tuple[int, int]:
    """Whole tiles: of 16 rows, as bfloat16 has them, and 128 columns; whole blocks of rows."""
    rows = -batch // 16 * -16
    if rows > _ROWS:
        rows = -batch // _ROWS * -_ROWS
    return rows, -hidden // 128 * -128


def _bytes(batch: int, hidden: int, time: int) -> int:
    """At most what the backward kernel holds, everything twice, as it is copied ahead."""
    rows = min(batch, _ROWS)
    gates, others, done = 2 * 4 * hidden, 9 * hidden, -time // 128 * -128
    return 2 * 4 * (4 * hidden * hidden + rows * (gates + others + done))


def _forward(interpret: bool, keep: bool, *arrays: PyTree) -> tuple[PyTree, PyTree]:
    projected, weight, bias, h, c, done = arrays
    time, batch, width = projected.shape
    hidden = width // 4
    at, fixed = _blocks(batch, lambda t: t)
    sizes = (hidden, hidden, hidden, width, hidden, hidden)[: 6 if keep else 3]
    results = _call(
        _forward_kernel,
        (projected, weight, bias[None], h, c, _numbers(done, batch, time)),
        [at(width), _whole(weight), _whole(bias[None]), fixed(hidden), fixed(hidden), fixed(time)],
        [at(n) if i in _STEPS else fixed(n) for i, n in enumerate(sizes)],
        [
            jax.ShapeDtypeStruct(
                (time, batch, n) if i in _STEPS else (batch, n),
                projected.dtype if i == 3 else h.dtype,
            )
            for i, n in enumerate(sizes)
        ],
        {0: 3} if keep else {},
        interpret,
    )
    return results[:3], results[3:]


def _backward(interpret: bool, *arrays: PyTree) -> tuple[Array, ...]:
    from jax.experimental import pallas as pl

    weight, c, gates, cs, d_outputs, dh, dc, done = arrays
    time, batch, width = gates.shape
    hidden = width // 4
    at, fixed = _blocks(batch, lambda s: time - 1 - s)
    before, _ = _blocks(batch, lambda s: jnp.maximum(time - 2 - s, 0))
    wide = jnp.promote_types(c.dtype, jnp.float32)
    state = jax.ShapeDtypeStruct(c.shape, wide)
    d_bias = jax.ShapeDtypeStruct((batch // min(batch, _ROWS), 1, width), wide)
    part = pl.BlockSpec((1, 1, width), lambda i, s: (i, 0, 0))
    return _call(
        _backward_kernel,
        (weight, c, _numbers(done, batch, time), gates, cs, cs, d_outputs, dh, dc),
        [
            *(_whole(weight), fixed(hidden), fixed(time), at(width), at(hidden), before(hidden)),
            *(at(hidden), fixed(hidden), fixed(hidden)),
        ],
        [at(width), part, fixed(hidden), fixed(hidden)],
        [jax.ShapeDtypeStruct(gates.shape, gates.dtype), d_bias, state, state],
        {3: 0},
        interpret,
    )


def _numbers(done: Array | None, *shape: int) -> Array:
    # Zeros where there is none: without them XLA copies more of a loss's arrays than it saves.
    return jnp.zeros(shape, jnp.float32) if done is None else done.astype(jnp.float32)


def _blocks(batch: int, time_of: Callable[[Any], Any]) -> tuple[Callable, Callable]:
    """Blocks of a number of columns: at a step of (time, batch, ...), and of (batch, ...)."""
    from jax.experimental import pallas as pl

    rows = min(batch, _ROWS)
    return (
        lambda n: pl.BlockSpec((1, rows, n), lambda i, s: (time_of(s), i, 0)),
        lambda n: pl.BlockSpec((rows, n), lambda i, s: (i, 0)),
    )


def _whole(array: Array):
    from jax.experimental import pallas as pl

    return pl.BlockSpec(array.shape, lambda i, s: (0, 0))


def _call(
    kernel: Callable,
    arrays: tuple[Array, ...],
    in_specs: list,
    out_specs: list,
    results: list[jax.ShapeDtypeStruct],
    aliases: dict[int, int],
    interpret: bool,
) -> tuple[Array, ...]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    time, batch, _ = results[0].shape
    call = pl.pallas_call(
        kernel,
        out_shape=results,
        grid=(batch // min(batch, _ROWS), time),
        in_specs=in_specs,
        out_specs=out_specs,
        input_output_aliases=aliases,
        interpret=interpret,
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_MEMORY
        ),
        name=kernel.__name__.strip("_"),
    )
    return tuple(call(*arrays))


def _keep(done_ref, t) -> Array:
    """Which rows (rows, 1) go on at step t."""
    done = done_ref[...]
    steps = jax.lax.broadcasted_iota(jnp.int32, done.shape, 1)
    return jnp.sum(jnp.where(steps == t, done, 0), axis=1, keepdims=True) == 0


def _gates(row: Array) -> tuple[Array, ...]:
    return tuple(jnp.split(row, 4, axis=1))


def mosaic_precision(dtype: np.dtype) -> jax.lax.Precision:
    """What Mosaic knows that is no less than was asked for: one pass of bfloat16, or float32."""
    asked = str(jax.config.jax_default_matmul_precision).lower()  # type: ignore[attr-defined]
    one_pass = ("none", "default", "bfloat16", "bf16_bf16_f32")
    if dtype == jnp.bfloat16 or asked in one_pass:
        return jax.lax.Precision.DEFAULT
    return jax.lax.Precision.HIGHEST


def _forward_kernel(projected, weight, bias, h_0, c_0, done, outputs, h_ref, c_ref, *kept) -> None:
    from jax.experimental import pallas as pl

    t, wide = pl.program_id(1), jnp.promote_types(h_0.dtype, jnp.float32)

    @pl.when(t == 0)
    def _() -> None:
        h_ref[...] = h_0[...]
        c_ref[...] = c_0[...]

    keep = _keep(done, t)
    h_before = jnp.where(keep, h_ref[...].astype(wide), 0)
    dims = (((1,), (1,)), ((), ()))
    before = h_before.astype(weight.dtype)
    precision = mosaic_precision(weight.dtype)
    sums = jax.lax.dot_general(before, weight[...], dims, precision, preferred_element_type=wide)
    i, f, g, o = activate(_gates(sums + projected[0].astype(wide) + bias[...].astype(wide)))
    c = f * jnp.where(keep, c_ref[...].astype(wide), 0) + i * g
    h = (o * jnp.tanh(c)).astype(outputs.dtype)
    c = c.astype(c_ref.dtype)
    outputs[0] = h_ref[...] = h
    c_ref[...] = c
    if kept:
        kept[0][0] = jnp.concatenate([i, f, g, o], axis=1).astype(projected.dtype)
        kept[1][0] = c
        kept[2][0] = h_before.astype(outputs.dtype)


def _backward_kernel(
    weight,
    c_0,
    done,
    gates,
    cs,
    cs_before,
    d_outputs,
    dh_last,
    dc_last,
    d_gates,
    d_bias,
    dh_ref,
    dc_ref,
) -> None:
    from jax.experimental import pallas as pl

    s, wide = pl.program_id(1), dh_ref.dtype
    t = pl.num_programs(1) - 1 - s

    @pl.when(s == 0)
    def _() -> None:
        dh_ref[...] = dh_last[...].astype(wide)
        dc_ref[...] = dc_last[...].astype(wide)
        d_bias[...] = jnp.zeros_like(d_bias)

    keep = _keep(done, t)
    c_before = jnp.where(t == 0, c_0[...].astype(wide), cs_before[0].astype(wide))
    parts, dc = d_activate(
        _gates(gates[0].astype(wide)),
        cs[0].astype(wide),
        jnp.where(keep, c_before, 0),
        dh_ref[...] + d_outputs[0].astype(wide),
        dc_ref[...],
    )
    now = jnp.concatenate(parts, axis=1)
    d_bias[0] += jnp.sum(now, axis=0, keepdims=True)
    now = now.astype(d_gates.dtype)
    d_gates[0] = now
    dc_ref[...] = jnp.where(keep, dc, 0)
    precision = mosaic_precision(now.dtype)
    dh = jnp.dot(now, weight[...], precision=precision, preferred_element_type=wide)
    dh_ref[...] = jnp.where(keep, dh, 0)


LOOPS = Loops(partial(_forward, False), partial(_backward, False), True, _sizes)
INTERPRETED = Loops(partial(_forward, True), partial(_backward, True), True, _sizes)
"""`LOOPS` in Pallas's interpreter, which runs anywhere: for tests."""
