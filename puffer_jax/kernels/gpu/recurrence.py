"""The recurrence of advantages for NVIDIA's GPUs: one launch, a thread for each row."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_ROWS = 64  # in a block: two warps, so that a few thousand rows keep all multiprocessors busy


def recurrence(
    a: Float[Array, "rows time"], b: Float[Array, "rows time"], interpret: bool = False
) -> Float[Array, "rows time"]:
    """The y with y[:, t] = a[:, t] + b[:, t] * y[:, t + 1], from the last step to the first.

    Args:
        a: float32 or float64.
        b: of the same shape and dtype.
        interpret: run in Pallas's interpreter, which is slow and runs anywhere: for tests.
    """
    return _recurrence(interpret, a, b)


def takes(a: Array, b: Array) -> bool:
    """Whether the kernel computes with these arguments."""
    same = a.shape == b.shape and a.dtype == b.dtype
    # Triton's offsets have 32 bits.
    return same and a.dtype.name in ("float32", "float64") and 0 < a.size < 2**31 - 2**20


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(interpret: bool, a: Array, b: Array) -> Array:
    # Imported by those who have use for it: it takes half a second.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    call = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(a.shape, a.dtype),
        grid=(-(-a.shape[0] // _ROWS),),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_ROWS // 32),
        name="recurrence",
    )
    return call(a, b)


def _kernel(a, b, y) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    count, time = a.shape
    first = pl.program_id(0) * _ROWS
    rows = pl.ds(first, _ROWS)
    mask = first + jnp.arange(_ROWS, dtype=jnp.int32) < count

    def step(s: Array, after: Array) -> Array:
        t = (time - 1 - s).astype(jnp.int32)  # as the grid's numbers, also with those of 64 bits on
        now_a, now_b = (triton.load(x.at[rows, t], mask=mask, other=0) for x in (a, b))
        now = now_a + now_b * after
        triton.store(y.at[rows, t], now, mask=mask)
        return now

    jax.lax.fori_loop(0, time, step, jnp.zeros(_ROWS, a.dtype))


def _forward(interpret: bool, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    y: Any = _recurrence(interpret, a, b)
    return y, (b, y)


def _backward(interpret: bool, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    b, y = residuals
    # The same recurrence forward in time: what reaches a step comes from the one before.
    before = jnp.pad(b[:, :-1], ((0, 0), (1, 0)))
    reversed_da: Any = _recurrence(interpret, dy[:, ::-1], before[:, ::-1])
    da = reversed_da[:, ::-1]
    return da, da * jnp.pad(y[:, 1:], ((0, 0), (0, 1)))


_recurrence.defvjp(_forward, _backward)
