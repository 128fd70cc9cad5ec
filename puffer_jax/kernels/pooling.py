"""Max-pooling."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.cpu import library


def max_pool(x: Float[Array, "batch height width channels"]) -> Array:
    """Torch's `max_pool2d(x, kernel_size=3, stride=2, padding=1)`: pads with -inf on all sides.

    Of equal numbers in a window the first one takes the gradient, as in torch. No forward-mode
    derivatives (`jax.jvp`) on CPUs.
    """
    if not library.serves(x):
        return _max_pool_by_xla(x)
    return jax.lax.platform_dependent(x, cpu=_max_pool_by_us, default=_max_pool_by_xla)


def _max_pool_by_xla(x: Array) -> Array:
    padding: Any = ((1, 1), (1, 1))  # Flax's annotation knows only its string forms
    return nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=padding)


_max_pool_by_us = cpu.differentiable(cpu.max_pool, cpu.max_pool_gradient, _max_pool_by_xla)
