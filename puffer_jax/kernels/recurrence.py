"""A linear recurrence, from the last step to the first."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.cpu import library


def recurrence(
    a: Float[Array, "rows time"], b: Float[Array, "rows time"]
) -> Float[Array, "rows time"]:
    """The y with y[:, t] = a[:, t] + b[:, t] * y[:, t + 1], from the last on.

    On a CPU, in float32 and float64, it is `puffer_jax.kernels.cpu.recurrence`, where that can be
    built, and has no forward-mode derivatives (`jax.jvp`). Elsewhere it is XLA's.
    """

    def by_xla(a: Array, b: Array) -> Array:
        def backward(y: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
            y = x[0] + x[1] * y
            return y, y

        last = jnp.zeros_like(a, shape=a.shape[:1])
        return jax.lax.scan(backward, last, (a.T, b.T), reverse=True, unroll=8)[1].T

    if not library.serves(a, b):
        return by_xla(a, b)
    return jax.lax.platform_dependent(a, b, cpu=cpu.recurrence, default=by_xla)
