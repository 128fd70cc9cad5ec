"""The gates of the MinGRU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def highway_gates(u: Array, g: Array, p: Array) -> tuple[Array, Array, Array, Array, Array]:
    """z, 1 - z, the candidate and its slope, and the sigmoid of p; see `mingru_layer`."""
    positive, low = u >= 0, jax.nn.sigmoid(u)
    candidate, slope = jnp.where(positive, u + 0.5, low), jnp.where(positive, 1, low * (1 - low))
    # 1 - z as it stands would round to zero, or to few digits, where the gate is wide open.
    return jax.nn.sigmoid(g), jax.nn.sigmoid(-g), candidate, slope, jax.nn.sigmoid(p)
