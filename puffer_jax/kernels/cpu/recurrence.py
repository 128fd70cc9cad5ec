"""The kernel of a linear recurrence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puffer_jax.kernels.cpu.native import call, like


@jax.custom_vjp
def recurrence(
    a: Float[Array, "rows time"], b: Float[Array, "rows time"]
) -> Float[Array, "rows time"]:
    """The y with y[:, t] = a[:, t] + b[:, t] * y[:, t + 1], from the last step to the first."""
    return call("puffer_jax_recur", like(a)[0], a, b)


def _recurrence_forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    y = recurrence(a, b)
    return y, (b, y)


def _recurrence_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    b, y = residuals
    # The same recurrence forward in time: what reaches a step comes from the one before.
    before = jnp.pad(b[:, :-1], ((0, 0), (1, 0)))
    da = recurrence(dy[:, ::-1], before[:, ::-1])[:, ::-1]
    return da, da * jnp.pad(y[:, 1:], ((0, 0), (0, 1)))


recurrence.defvjp(_recurrence_forward, _recurrence_backward)
