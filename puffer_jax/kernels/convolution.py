"""Convolutions of images."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.cpu import native
from puffer_jax.kernels.windows import Windows


def convolution(
    x: Array,
    kernel: Float[Array, "window_height window_width inputs outputs"],
    bias: Float[Array, "outputs"],
    windows: Windows,
) -> Float[Array, "batch _ _ _"]:
    """Torch's `conv2d` of images (batch, H, W, inputs), or (batch, inputs, H, W).

    The result is (batch, H', W', outputs), or with `windows.out_channels_first` (batch, outputs,
    H', W'), of the weights' dtype. Images of bytes (uint8) stand for numbers from 0 to 1: they
    are divided by 255. With `windows.rectify` a ReLU comes first. No forward-mode derivatives
    (`jax.jvp`) on CPUs.
    """
    if windows.channels_first and x.dtype != jnp.uint8:
        x, windows = x.transpose(0, 2, 3, 1), windows._replace(channels_first=False)
    x = x if x.dtype == jnp.uint8 else x.astype(kernel.dtype)
    return _convolution(x, kernel, bias, windows=windows)


def _convolution_xla(x: Array, kernel: Array, bias: Array, *, windows: Windows) -> Array:
    numbers = x.astype(kernel.dtype)
    numbers = numbers / 255.0 if x.dtype == jnp.uint8 else numbers
    numbers = jax.nn.relu(numbers) if windows.rectify else numbers
    first = windows.channels_first, windows.out_channels_first
    images, result = ("NCHW" if channels_first else "NHWC" for channels_first in first)
    layout = images, "HWIO", result
    pads = [(pad, pad) for pad in windows.pads]
    convolve = partial(jax.lax.conv_general_dilated, dimension_numbers=layout)
    bias = bias[:, None, None] if windows.out_channels_first else bias
    return convolve(numbers, kernel, windows.strides, pads) + bias


def _cpu_takes(x: Array, kernel: Array, bias: Array, *, windows: Windows) -> bool:
    sides = x.shape[2:] if windows.channels_first else x.shape[1:3]
    fits = all(
        side + 2 * pad >= size
        for side, pad, size in zip(sides, windows.pads, kernel.shape, strict=False)
    )
    return x.size > 0 and fits and native.takes(kernel, bias)


_convolution = Operation(
    "convolution",
    xla=_convolution_xla,
    cpu=Kernel(
        cpu.differentiable(cpu.convolution, cpu.convolution_gradient, _convolution_xla),
        takes=_cpu_takes,
    ),
)
