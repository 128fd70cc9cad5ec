"""Max-pooling."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.cpu import native


def max_pool(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch _ _ channels"]:
    """Torch's `max_pool2d(x, kernel_size=3, stride=2, padding=1)`: pads with -inf on all sides.

    The result has (height + 1) // 2 rows and (width + 1) // 2 columns. Of equal numbers in a
    window the first takes the gradient, as in torch. No forward-mode derivatives (`jax.jvp`) on
    CPUs.
    """
    return _max_pool(x)


def _max_pool_xla(x: Array) -> Array:
    padding: Any = ((1, 1), (1, 1))  # Flax's annotation knows only its string forms
    return nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=padding)


_max_pool = Operation(
    "max_pool",
    xla=_max_pool_xla,
    cpu=Kernel(
        cpu.differentiable(cpu.max_pool, cpu.max_pool_gradient, _max_pool_xla),
        takes=native.takes,
    ),
)
