"""Initial weights: torch's, and orthogonal ones."""

import math
from functools import partial
from typing import TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from puffer_jax.nn.params import Shape
from puffer_jax.nn.torch_layout import TorchParameter, torch_parameters

Layer = TypeVar("Layer", bound=nnx.Module)


def _affine(layer: nnx.Module, function: str) -> list[TorchParameter]:
    """The weight and, if there is one, the bias."""
    if not isinstance(layer, nnx.Linear | nnx.Conv):
        raise TypeError(f"{function} takes an nnx.Linear or nnx.Conv; got {type(layer).__name__}")
    return torch_parameters(layer)


def layer_init(
    layer: Layer, std: float = math.sqrt(2), bias_const: float = 0.0, *, rngs: nnx.Rngs
) -> Layer:
    """Orthogonal weights of gain `std` and a constant bias, in place; CleanRL's default.

    The kernel is orthogonal as a matrix (out, everything else), as torch flattens it.

    Args:
        layer: `nnx.Linear` or `nnx.Conv` of any number of spatial dimensions; a layer
            without bias is fine.
        std: the gain: all singular values of the flattened kernel.
        bias_const: value of every bias.
        rngs: draws one key from the stream `params`.

    Returns:
        `layer`, for use in one expression.

    Raises:
        TypeError: the layer is of another type.

    Reference: `pufferlib.pytorch.layer_init`; Saxe et al. 2013, arXiv:1312.6120.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layer = puffer_jax.layer_init(nnx.Linear(8, 8, rngs=rngs), std=2.0, rngs=rngs)
        >>> print(f"{jax.numpy.linalg.svd(layer.kernel[...])[1].min():.3f}")
        2.000
    """
    for parameter in _affine(layer, "layer_init"):
        if parameter.name == "weight":
            _set(parameter, _orthogonal(parameter, rngs, std))
        else:
            _fill(parameter, bias_const)
    return layer


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _orthogonal_array(key: Array, std: Array | float, shape: Shape, dtype: jnp.dtype) -> Array:
    rows, columns = shape[0], math.prod(shape[1:])
    # JAX's own initialiser decomposes a square matrix of the longer side, 40 times the work
    # for NatureCNN's Linear.
    tall = jax.random.normal(key, (max(rows, columns), min(rows, columns)), dtype)
    q, r = jnp.linalg.qr(tall)
    # Without the signs the distribution would depend on the decomposition's conventions.
    q *= jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(dtype)
    return (std * (q if rows >= columns else q.T)).reshape(shape)


def _orthogonal(parameter: TorchParameter, rngs: nnx.Rngs, std: float = 1.0) -> Array:
    # There is no QR in half precision.
    dtype = jnp.promote_types(parameter.variables[0].dtype, jnp.float32)
    return _orthogonal_array(rngs.params(), std, parameter.shape, dtype)


def _set(parameter: TorchParameter, value: Array) -> None:
    for variable, array in zip(parameter.variables, parameter.from_torch(value), strict=True):
        variable[...] = array.astype(variable.dtype)


def _fill(parameter: TorchParameter, value: float) -> None:
    for variable in parameter.variables:
        old = variable[...]
        # What is NumPy's takes no program of its own; but it takes memory, even where nothing but
        # shapes is asked for.
        full = jnp.full if isinstance(old, jax.core.Tracer) else np.full
        variable[...] = jnp.asarray(full(old.shape, value, old.dtype))


def torch_init(layer: Layer, *, rngs: nnx.Rngs) -> Layer:
    """Torch's default for Linear and Conv, in place: weights and bias U(-1/sqrt(fan_in), +).

    Args:
        layer: `nnx.Linear` or `nnx.Conv`.
        rngs: draws two keys from the stream `params`.

    Raises:
        TypeError: the layer is of another type.

    Reference: `torch.nn.Linear.reset_parameters`.

    Example:
        >>> import puffer_jax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layer = puffer_jax.torch_init(nnx.Linear(16, 8, rngs=rngs), rngs=rngs)
        >>> bool((abs(layer.kernel[...]) <= 0.25).all())
        True
    """
    weight, *bias = _affine(layer, "torch_init")
    bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
    for parameter in (weight, *bias):
        _set(parameter, uniform(rngs, parameter.shape, bound, parameter.variables[0].dtype))
    return layer


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float, dtype: DTypeLike) -> Array:
    """U(-bound, +), drawn with one key of the stream `params`."""
    return jax.random.uniform(rngs.params(), shape, dtype, -bound, bound)


def reset_orthogonal(module: nnx.Module, *, rngs: nnx.Rngs) -> None:
    """Give every weight of `module` an orthogonal value of gain 1 and zero every bias, in place.

    It goes by torch's names, as the reference does: parameters with `layer_norm` in their name are
    left alone, those with `bias` are zeroed, those with `weight` and at least two dimensions become
    orthogonal, and the rest (a learned log-std, say) keep their values.

    Reference: the loop in `pufferlib.models.LSTMWrapper.__init__`.
    """
    for parameter in torch_parameters(module):
        if "layer_norm" in parameter.name:
            continue
        if "bias" in parameter.name:
            _fill(parameter, 0.0)
        elif "weight" in parameter.name and len(parameter.shape) >= 2:
            _set(parameter, _orthogonal(parameter, rngs))
