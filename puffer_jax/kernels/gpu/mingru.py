"""A layer of the MinGRU over time for NVIDIA's GPUs: one launch forward, one backward.

A block of threads computes some columns of one row of the batch, from the first step to the last or
back; the state stays in registers, and every number is read and written once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from puffer_jax.kernels.gates import highway_gates

_COLUMNS = 128  # of a block: four warps


def takes(x: Array, projected: Array, h: Array, starts: Array) -> bool:
    """Whether the kernels compute with these arguments of `mingru_layer`."""
    same = x.dtype == projected.dtype == h.dtype
    # Triton's offsets have 32 bits.
    return same and x.dtype.name in ("float32", "float64") and 0 < 3 * x.size < 2**31 - 2**20


def mingru(
    keep: bool, x: Array, projected: Array, h: Array, starts: Array, *, interpret: bool = False
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """Forward of `mingru_layer`, see there.

    Args:
        keep: whether to keep the states of all steps.
        x: float32 or float64.
        projected: see `mingru_layer`.
        h: the same.
        starts: the same; empty if there are none.
        interpret: run in Pallas's interpreter, which is slow and runs anywhere: for tests.
    """
    results = (x, h, x) if keep else (x, h)
    y, last, *states = _call(_forward, interpret, results, x, projected, h, starts)
    return (y, last), tuple(states)


def mingru_gradient(
    arrays: tuple[Array, ...],
    states: tuple[Array, ...],
    cotangents: tuple[Array, Array],
    *,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """Backward of `mingru`: the gradients of x, projected and h."""
    *floating, starts = arrays
    operands = *floating, *states, *cotangents, starts
    return _call(_backward, interpret, floating, *operands)


def _call(
    kernel: Callable[..., None], interpret: bool, results: Sequence[Array], *operands: Array
) -> tuple[Array, ...]:
    # Imported by those who have use for it: it takes half a second.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    _, batch, hidden = operands[0].shape
    *arrays, starts = operands
    if starts.size:
        arrays.append(starts)
    columns = min(_COLUMNS, pl.next_power_of_2(hidden))
    call = pl.pallas_call(
        partial(kernel, bool(starts.size), columns),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        grid=(batch, pl.cdiv(hidden, columns)),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=max(1, columns // 32)),
        name=f"mingru{kernel.__name__}",
    )
    return tuple(call(*arrays))


def _columns(hidden: int, columns: int) -> tuple[Any, Callable[..., Any], Callable[..., None]]:
    """The row of this block, and how its columns are loaded and stored."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    row, first = pl.program_id(0), pl.program_id(1) * columns
    mask = first + jnp.arange(columns, dtype=jnp.int32) < hidden

    def load(ref: Any, *at: Any, part: int = 0) -> Array:
        where = ref.at[(*at, pl.ds(first + part * hidden, columns))]
        return triton.load(where, mask=mask, other=0)

    def store(ref: Any, value: Array, *at: Any, part: int = 0) -> None:
        triton.store(ref.at[(*at, pl.ds(first + part * hidden, columns))], value, mask=mask)

    return row, load, store


def _forward(starting: bool, columns: int, *refs: Any) -> None:
    x, projected, h, *rest = refs
    starts = rest.pop(0) if starting else None
    y, last, *states = rest
    time, _, hidden = x.shape
    row, load, store = _columns(hidden, columns)

    def step(t: Any, state: Array) -> Array:
        t = t.astype(jnp.int32)  # as the grid's numbers, also with those of 64 bits on
        z, closed, candidate, _, passed = highway_gates(
            *(load(projected, t, row, part=part) for part in range(3))
        )
        kept = closed if starts is None else jnp.where(starts[t, row], 0, closed)
        state = kept * state + z * candidate
        for ref in states:
            store(ref, state, t, row)
        store(y, passed * state + (1 - passed) * load(x, t, row), t, row)
        return state

    store(last, jax.lax.fori_loop(0, time, step, load(h, row)), row)


def _backward(starting: bool, columns: int, *refs: Any) -> None:
    x, projected, h, states, d_y, d_last, *rest = refs
    starts = rest.pop(0) if starting else None
    dx, d_projected, dh = rest
    time, _, hidden = x.shape
    row, load, store = _columns(hidden, columns)

    def step(s: Any, d_state: Array) -> Array:
        t = (time - 1 - s).astype(jnp.int32)
        z, closed, candidate, slope, passed = highway_gates(
            *(load(projected, t, row, part=part) for part in range(3))
        )
        before = jnp.where(t > 0, load(states, jnp.maximum(t - 1, 0), row), load(h, row))
        kept = closed
        if starts is not None:
            begins = starts[t, row]
            before, kept = jnp.where(begins, 0, before), jnp.where(begins, 0, closed)
        d_out = load(d_y, t, row)
        d_state = d_state + d_out * passed
        store(dx, d_out * (1 - passed), t, row)
        store(d_projected, d_state * z * slope, t, row)
        d_gate = d_state * (candidate - before) * (z * closed)
        store(d_projected, d_gate, t, row, part=1)
        d_passed = d_out * (load(states, t, row) - load(x, t, row)) * (passed * (1 - passed))
        store(d_projected, d_passed, t, row, part=2)
        return d_state * kept

    store(dh, jax.lax.fori_loop(0, time, step, load(d_last, row)), row)
