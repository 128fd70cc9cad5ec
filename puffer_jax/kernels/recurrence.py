"""Linear recurrences, from the last step to the first or from the first to the last."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.cpu import native
from puffer_jax.kernels.gpu import recurrence as gpu


def recurrence(
    a: Float[Array, "rows time"], b: Float[Array, "rows time"]
) -> Float[Array, "rows time"]:
    """The y with y[:, t] = a[:, t] + b[:, t] * y[:, t + 1], from the last step to the first.

    After the last step y is zero. No forward-mode derivatives (`jax.jvp`) on CPUs.
    """
    return _recurrence(a, b)


def _recurrence_xla(a: Array, b: Array) -> Array:
    def step(y_next: Array, a_and_b: tuple[Array, Array]) -> tuple[Array, Array]:
        a_t, b_t = a_and_b
        y_t = a_t + b_t * y_next
        return y_t, y_t

    after_last = jnp.zeros_like(a, shape=a.shape[:1])
    return jax.lax.scan(step, after_last, (a.T, b.T), reverse=True, unroll=8)[1].T


_recurrence = Operation(
    "recurrence",
    xla=_recurrence_xla,
    cpu=Kernel(cpu.recurrence, takes=native.takes),
    gpu=Kernel(gpu.recurrence, takes=gpu.takes),
)


# Up to so many steps a loop is no longer than the scan over pairs, and rounds less.
_FEW = 8


def recurrence_onwards(
    a: Float[Array, "time *rest"], b: Float[Array, "time *rest"], first: Float[Array, "*rest"]
) -> Float[Array, "time *rest"]:
    """The y with y[t] = a[t] * y[t - 1] + b[t], from the first step to the last.

    Before the first step y is `first`; where a[t] is zero, y starts anew.
    """
    return _recurrence_onwards(a, b, first)


def _step_by_step(a: Array, b: Array, first: Array) -> Array:
    def step(y_before: Array, a_and_b: tuple[Array, Array]) -> tuple[Array, Array]:
        a_t, b_t = a_and_b
        y_t = a_t * y_before + b_t
        return y_t, y_t

    return jax.lax.scan(step, first, (a, b), unroll=min(a.shape[0], _FEW) or 1)[1]


def _pair_by_pair(a: Array, b: Array, first: Array) -> Array:
    if a.shape[0] <= _FEW:
        return _step_by_step(a, b, first)

    def joined(before: tuple[Array, Array], after: tuple[Array, Array]) -> tuple[Array, Array]:
        (a_1, b_1), (a_2, b_2) = before, after
        return a_2 * a_1, a_2 * b_1 + b_2

    factors, sums = jax.lax.associative_scan(joined, (a, b))
    return factors * first + sums


# A CPU gains nothing from a short chain of large operations: it computes each of them in turn.
_recurrence_onwards = Operation(
    "recurrence_onwards", xla=_pair_by_pair, cpu=Kernel(_step_by_step, takes=lambda *_: True)
)
