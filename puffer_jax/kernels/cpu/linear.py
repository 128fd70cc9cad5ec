"""Kernels of linear layers and perceptrons."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from puffer_jax.kernels.cpu.native import call, like


def linear(keep: bool, *arrays: Array) -> tuple[tuple[Array, ...], None]:
    """Forward of x and any number of w, b: `x @ w + b` for each of these."""
    x, *layers = arrays
    return call("puffer_jax_linear", _outputs(x, layers), *arrays), None


def linear_gradient(
    arrays: tuple[Array, ...], kept: None, d_results: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Backward of `linear`: the gradients of x and of each w, b."""
    x, *layers = arrays
    weights, bias, d_result = _joined(layers, d_results)
    shapes = like(x, weights, bias)
    dx, *d_joined = call("puffer_jax_linear_gradient", shapes, x, weights, d_result)
    return dx, *_apart(layers, d_joined)


def _joined(layers: Sequence[Array], d_results: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    """Several linear layers as one: its weights, its bias and the gradient of its result."""
    d_result = jnp.concatenate(d_results, axis=1)
    return jnp.concatenate(layers[::2], axis=1), jnp.concatenate(layers[1::2]), d_result


def _apart(layers: Sequence[Array], d_joined: Sequence[Array]) -> list[Array]:
    """The gradients of each w, b of the layers from those of `_joined`."""
    ends = np.cumsum([b.shape[0] for b in layers[1::2]])[:-1]
    d_layers = zip(*(jnp.split(d, ends, axis=-1) for d in d_joined), strict=True)
    return [d for pair in d_layers for d in pair]


def perceptron(keep: bool, *arrays: Array) -> tuple[tuple[Array, ...], None]:
    """Forward of x, w1, b1 and any number of w, b: `gelu(x @ w1 + b1) @ w + b` for each of these.

    x is (batch, inputs), w1 (inputs, hidden), w (hidden, outputs). Without any w, b the result is
    the hidden vectors; otherwise those stay in the cache, and are recomputed for the gradient.
    """
    x, *layers = arrays
    results = _outputs(x, layers[2:] or layers)
    return call("puffer_jax_perceptron", results, *arrays), None


def _outputs(x: Array, layers: Sequence[Array]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((x.shape[0], *b.shape), x.dtype) for b in layers[1::2])


def perceptron_gradient(
    arrays: tuple[Array, ...], kept: None, d_results: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Backward of `perceptron`: the gradients of x, w1, b1 and of each w, b."""
    x, w1, b1, *layers = arrays
    # Without heads d_result is the gradient of the hidden vectors.
    w2, b2, d_result = _joined(layers or (w1[:0].T, b1[:0]), d_results)
    shapes, operands = like(w1, b1, w2, b2), (x, w1, b1, w2, d_result)
    d_w1, d_b1, *d_joined = call("puffer_jax_perceptron_gradient", shapes, *operands)
    # If x are observations, XLA drops what follows, since the result is not used.
    z = x @ w1 + b1
    slope = jax.scipy.stats.norm.cdf(z) + z * jax.scipy.stats.norm.pdf(z)
    d_hidden = d_result @ w2.T if layers else d_result
    return (d_hidden * slope) @ w1.T, d_w1, d_b1, *(_apart(layers, d_joined) if layers else [])
