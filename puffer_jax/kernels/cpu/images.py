"""Kernels of convolutions and pooling."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from puffer_jax.kernels.cpu.library import _call, _is_number, _like

Pair = tuple[int, int]  # of the rows and of the columns


class Windows(NamedTuple):
    """How the windows of a convolution lie on its images."""

    strides: Pair = (1, 1)
    pads: Pair = (0, 0)
    """Zeros before and after the rows, before and after the columns."""
    channels_first: bool = False
    """Of images of bytes: they are (batch, inputs, height, width)."""
    rectify: bool = False
    """Of other images: a ReLU comes first."""
    out_channels_first: bool = False
    """The result is (batch, outputs, height, width)."""

    def attributes(self) -> dict[str, Any]:
        """What all kernels are told."""
        return {
            "channels_first": self.channels_first,
            "rectify": self.rectify,
            "stride_rows": np.int64(self.strides[0]),
            "stride_columns": np.int64(self.strides[1]),
            "pad_rows": np.int64(self.pads[0]),
            "pad_columns": np.int64(self.pads[1]),
        }


def convolution(windows: Windows, keep: bool, *arrays: Array) -> tuple[Array, None]:
    """Forward of x, kernel, bias: a convolution of images.

    Args:
        windows: where they lie; they must fit into the images with their borders.
        keep: not used.
        arrays: x, the images (batch, height, width, inputs); bytes stand for numbers from 0 to
            1, each is divided by 255. kernel, the weights (window_height, window_width, inputs,
            outputs). bias (outputs,), is added.
    """
    x, kernel, _ = arrays
    shape = (x.shape[0], *x.shape[2:]) if windows.channels_first else x.shape
    sides = zip(shape[1:], kernel.shape, windows.strides, windows.pads, strict=False)
    height, width = ((side + 2 * pad - size) // stride + 1 for side, size, stride, pad in sides)
    first, outputs = windows.out_channels_first, kernel.shape[3]
    image = (outputs, height, width) if first else (height, width, outputs)
    result = jax.ShapeDtypeStruct((x.shape[0], *image), kernel.dtype)
    given = windows.attributes()
    return _call("puffer_jax_convolve", result, *arrays, **given, out_channels_first=first), None


def convolution_gradient(
    windows: Windows, arrays: Any, kept: None, d_out: Array
) -> tuple[Array, ...]:
    """Backward of `convolution`."""
    d_out = d_out.transpose(0, 2, 3, 1) if windows.out_channels_first else d_out
    x, *weights = arrays
    name = "puffer_jax_convolve_weights_gradient"
    gradients = _call(name, _like(*weights), x, d_out, **windows.attributes())
    if not _is_number(x):
        return tuple(gradients)
    # A call of its own: the images' gradient is not computed where nobody asks for it.
    name = "puffer_jax_convolve_images_gradient"
    (dx,) = _call(name, _like(x), x, weights[0], d_out, **windows.attributes())
    return dx, *gradients


def max_pool(keep: bool, x: Array) -> tuple[Array, Array]:
    """Forward of `puffer_jax.layers.max_pool`."""
    batch, height, width, channels = x.shape
    shape = (batch, (height + 1) // 2, (width + 1) // 2, channels)
    taken = jax.ShapeDtypeStruct(shape if keep else (0,), np.int8)
    return _call("puffer_jax_max_pool", (jax.ShapeDtypeStruct(shape, x.dtype), taken), x)


def max_pool_gradient(arrays: tuple[Array], taken: Array, d_out: Array) -> tuple[Array]:
    """Backward of `max_pool`."""
    return (_call("puffer_jax_max_pool_gradient", _like(*arrays)[0], taken, d_out),)
