"""The network of PufferLib 4's native trainer, which is another one than that of its Python."""

import math
from collections.abc import Iterator
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from puffer_jax.nn.initializers import uniform
from puffer_jax.policies.v4.decoder import product
from puffer_jax.policies.v4.encoders import FlatEncoder

PADDING = 8
"""To what multiple of floats the native trainer, built for bfloat16, moves a tensor's start."""

# More than PufferLib's own sweeps try.
_MOST_LAYERS = 16


class NativeEncoder(FlatEncoder):
    """The encoder of PufferLib 4's native trainer: a matrix on the flat observation, no bias.

    Args:
        obs_size: how many numbers an observation has.
        hidden_size: width of the encoding.
        rngs: stream `params`; the weights are U(-sqrt(2/obs_size), +).
        dtype: of the matmul; None: that of the parameters.
        param_dtype: of the parameters.

    Reference: the encoder in PufferLib 4's `src/models.cu`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from puffer_jax import v4
        >>> encoder = v4.NativeEncoder(6, hidden_size=16, rngs=nnx.Rngs(0))
        >>> encoder.weight.shape, encoder(jax.numpy.ones((3, 6))).shape
        ((16, 6), (3, 16))
    """

    weight_name: ClassVar = "weight"

    def __init__(
        self,
        obs_size: int,
        hidden_size: int = 128,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(obs_size, hidden_size, dtype, param_dtype)
        bound = math.sqrt(2 / obs_size)
        self.weight = nnx.Param(uniform(rngs, (hidden_size, obs_size), bound, param_dtype))

    def __call__(self, observations: Array) -> Float[Array, "batch hidden"]:
        """Hidden vectors for observations (batch, *obs).

        Raises:
            ValueError: an observation has another number of numbers.
        """
        return product(self._flat(observations), self.weight[...], self.dtype)


def native_sizes(
    numbers: int, obs_size: int, nvec: tuple[int, ...], padding: int
) -> Iterator[tuple[int, int]]:
    """The (hidden_size, num_layers) whose native file has so many numbers.

    Args:
        numbers: how many float32 numbers the file has.
        obs_size: how many numbers an observation has.
        nvec: see `DefaultDecoder`.
        padding: to what multiple of floats each tensor's start is moved.
    """

    def padded(n: int) -> int:
        return -(-n // padding) * padding

    logstd = padded(len(nvec)) if max(nvec) == 1 else 0
    for hidden in range(1, math.isqrt(numbers // 3) + 1):
        before = padded(hidden * obs_size) + padded((sum(nvec) + 1) * hidden) + logstd
        layer = 3 * hidden * hidden
        for layers in range(1, _MOST_LAYERS + 1):
            end = before + (layers - 1) * padded(layer) + layer
            if numbers in (end, padded(end)):
                yield hidden, layers
