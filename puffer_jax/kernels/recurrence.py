"""A linear recurrence from the last step to the first."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.cpu import native


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
    "recurrence", xla=_recurrence_xla, cpu=Kernel(cpu.recurrence, takes=native.takes)
)
