"""Linear layers and perceptrons of `nnx.Linear`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from puffer_jax.kernels.cpu import library
from puffer_jax.kernels.perceptron import (
    _linear_by_us,
    _linear_by_xla,
    _perceptron_by_us,
    _perceptron_by_xla,
)


def perceptron(
    x: Float[Array, "batch inputs"], first: Any, heads: Sequence[Any] = ()
) -> tuple[Float[Array, "batch outputs_or_hidden"], ...]:
    """The outputs of each of the heads for `gelu(first(x))`; that itself if there are none.

    All are `nnx.Linear` with bias.

    On a CPU, in float32 and float64, it is `puffer_jax.kernels.cpu.perceptron`, where that can be
    built, and has no forward-mode derivatives (`jax.jvp`). Elsewhere it is XLA's.
    """
    dtype = first.param_dtype if first.dtype is None else first.dtype
    layers = [array for layer in (first, *heads) for array in (layer.kernel[...], layer.bias[...])]
    arrays = [jnp.asarray(array, dtype) for array in (x, *layers)]
    if not library.serves(*arrays):
        return _perceptron_by_xla(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=_perceptron_by_us, default=_perceptron_by_xla)


def linear(x: Float[Array, "batch inputs"], layers: Sequence[Any]) -> tuple[Array, ...]:
    """The outputs of each of some `nnx.Linear` for the same vectors.

    On a CPU, in float32 and float64, they are `puffer_jax.kernels.cpu.linear`, where that can be
    built, and have no forward-mode derivatives (`jax.jvp`). Elsewhere they are XLA's.
    """
    if not all(type(layer) is nnx.Linear and layer.bias is not None for layer in layers):
        return tuple(layer(x) for layer in layers)
    weights = [array for layer in layers for array in (layer.kernel[...], layer.bias[...])]
    arrays = [jnp.asarray(array) for array in (x, *weights)]
    dtypes = {layer.dtype or x.dtype for layer in layers}
    if dtypes != {x.dtype} or not library.serves(*arrays):
        return tuple(layer(x) for layer in layers)
    return jax.lax.platform_dependent(*arrays, cpu=_linear_by_us, default=_linear_by_xla)
