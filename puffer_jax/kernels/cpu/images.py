"""Kernels of convolutions and pooling."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from puffer_jax.kernels.cpu.native import call, is_floating, like
from puffer_jax.kernels.windows import Windows


def convolution(keep: bool, *arrays: Array, windows: Windows) -> tuple[Array, None]:
    """Forward of x, kernel, bias: a convolution of images.

    Args:
        keep: not used.
        arrays: x, the images (batch, height, width, inputs); bytes stand for numbers from 0 to
            1: they are divided by 255. kernel, the weights (window_height, window_width, inputs,
            outputs). bias (outputs,).
        windows: how they lie on the images; they must fit into an image with its borders.
    """
    x, kernel, _ = arrays
    shape = (x.shape[0], *x.shape[2:]) if windows.channels_first else x.shape
    sides = zip(shape[1:], kernel.shape, windows.strides, windows.pads, strict=False)
    height, width = ((side + 2 * pad - size) // stride + 1 for side, size, stride, pad in sides)
    first, outputs = windows.out_channels_first, kernel.shape[3]
    image = (outputs, height, width) if first else (height, width, outputs)
    result = jax.ShapeDtypeStruct((x.shape[0], *image), kernel.dtype)
    attributes = {**_attributes(windows), "out_channels_first": first}
    return call("puffer_jax_convolve", result, *arrays, **attributes), None


def convolution_gradient(
    arrays: tuple[Array, ...], kept: None, d_out: Array, *, windows: Windows
) -> tuple[Array, ...]:
    """Backward of `convolution`: the gradients of x, unless it is of bytes, kernel and bias."""
    d_out = d_out.transpose(0, 2, 3, 1) if windows.out_channels_first else d_out
    x, *weights = arrays
    name = "puffer_jax_convolve_weights_gradient"
    gradients = call(name, like(*weights), x, d_out, **_attributes(windows))
    if not is_floating(x):
        return tuple(gradients)
    # A call of its own, which XLA drops where the gradient of the images is not used.
    name = "puffer_jax_convolve_images_gradient"
    (dx,) = call(name, like(x), x, weights[0], d_out, **_attributes(windows))
    return dx, *gradients


def _attributes(windows: Windows) -> dict[str, Any]:
    """The attributes that all of the convolution's kernels take."""
    return {
        "channels_first": windows.channels_first,
        "rectify": windows.rectify,
        "stride_rows": np.int64(windows.strides[0]),
        "stride_columns": np.int64(windows.strides[1]),
        "pad_rows": np.int64(windows.pads[0]),
        "pad_columns": np.int64(windows.pads[1]),
    }


def max_pool(keep: bool, x: Array) -> tuple[Array, Array]:
    """Forward of `puffer_jax.layers.max_pool`; it keeps which pixel of each window was taken."""
    batch, height, width, channels = x.shape
    shape = (batch, (height + 1) // 2, (width + 1) // 2, channels)
    taken = jax.ShapeDtypeStruct(shape if keep else (0,), np.int8)
    return call("puffer_jax_max_pool", (jax.ShapeDtypeStruct(shape, x.dtype), taken), x)


def max_pool_gradient(arrays: tuple[Array], taken: Array, d_out: Array) -> tuple[Array]:
    """Backward of `max_pool`: the gradient of x."""
    return (call("puffer_jax_max_pool_gradient", like(*arrays)[0], taken, d_out),)
