"""Convolutions of images."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.cpu import library


def convolution(
    x: Array,
    kernel: Float[Array, "window_height window_width inputs outputs"],
    bias: Float[Array, "outputs"],
    windows: cpu.Windows,
) -> Float[Array, "batch _ _ _"]:
    """Torch's `conv2d` of images (batch, H, W, inputs), or (batch, inputs, H, W).

    The result is (batch, H', W', outputs), or with `windows.out_channels_first` (batch, outputs,
    H', W'). Images of bytes (uint8) stand for numbers from 0 to 1: they are divided by 255. With
    `windows.rectify` a ReLU comes first.

    On a CPU, in float32 and float64, it is `puffer_jax.kernels.cpu.convolution`, where that can be
    built, and has no forward-mode derivatives (`jax.jvp`). Elsewhere it is XLA's.
    """
    if windows.channels_first and x.dtype != jnp.uint8:
        x, windows = x.transpose(0, 2, 3, 1), windows._replace(channels_first=False)

    sides = x.shape[2:] if windows.channels_first else x.shape[1:3]
    fits = all(
        side + 2 * pad >= size
        for side, pad, size in zip(sides, windows.pads, kernel.shape, strict=False)
    )
    by_xla = partial(_convolution_by_xla, windows)
    if not (x.size and fits and library.serves(kernel, bias)):
        return by_xla(x, kernel, bias)
    x = x if x.dtype == jnp.uint8 else x.astype(kernel.dtype)
    by_us = _convolution_by_us(windows)
    return jax.lax.platform_dependent(x, kernel, bias, cpu=by_us, default=by_xla)


def _convolution_by_xla(windows: cpu.Windows, x: Array, kernel: Array, bias: Array) -> Array:
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


@cache
def _convolution_by_us(windows: cpu.Windows) -> Any:
    functions = cpu.convolution, cpu.convolution_gradient, _convolution_by_xla
    return cpu.differentiable(*(partial(function, windows) for function in functions))
