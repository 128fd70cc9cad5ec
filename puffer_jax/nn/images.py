"""Layers of images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.convolution import convolution


def flatten(x: Float[Array, "batch _ _ _"]) -> Array:
    """(batch, C, H, W) -> (batch, C*H*W)."""
    return x.reshape(x.shape[0], -1)


def flatten_channels_first(x: Float[Array, "batch height width channels"]) -> Array:
    """(batch, H, W, C) -> (batch, C*H*W), the order of torch's Linear weights."""
    return flatten(x.transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class Deferred:
    """In the place of a function that the layer after it does itself, as `Conv2d`'s `rectify`.

    Attributes:
        function: the one that is meant.
    """

    function: Callable[[Array], Array]

    def __call__(self, x: Array) -> Array:
        """`x` as it is."""
        return x


class Conv2d(nnx.Conv):
    """Torch's `Conv2d` for square windows, images (batch, H, W, channels), fast on CPUs, too.

    Starts with zeros; `layer_init` and `torch_init` know it.

    Args:
        in_features: channels that come in.
        out_features: channels that go out.
        window: rows and columns of the kernel.
        stride: of both.
        padding: rows and columns of zeros on all sides.
        channels_first: images come in as (batch, channels, H, W), as many environments give them.
        rectify: a ReLU comes first.
        out_channels_first: images go out as (batch, channels, H, W).
        rngs: stream `params`.
        dtype: of the computation (None: that of the parameters).
        param_dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        window: int,
        stride: int = 1,
        padding: int = 0,
        *,
        channels_first: bool = False,
        rectify: bool = False,
        out_channels_first: bool = False,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__(
            in_features,
            out_features,
            (window, window),
            stride,
            padding=padding,
            kernel_init=jax.nn.initializers.zeros,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.stride = stride
        self.pad = padding
        self.channels_first = channels_first
        self.rectify = rectify
        self.out_channels_first = out_channels_first

    def __call__(self, images: Array, out_sharding: Any = None) -> Float[Array, "batch _ _ _"]:
        """Images (batch, H', W', channels), or with these first; see `convolution`."""
        dtype = self.param_dtype if self.dtype is None else self.dtype
        assert self.bias is not None
        kernel, bias = (jnp.asarray(p[...], dtype) for p in (self.kernel, self.bias))
        windows = cpu.Windows(
            (self.stride, self.stride),
            (self.pad, self.pad),
            self.channels_first,
            self.rectify,
            self.out_channels_first,
        )
        return convolution(images, kernel, bias, windows)
