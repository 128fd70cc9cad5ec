"""Layers for images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from puffer_jax.kernels.convolution import convolution
from puffer_jax.kernels.windows import Windows


def flatten(x: Float[Array, "batch _ _ _"]) -> Array:
    """(batch, C, H, W) -> (batch, C*H*W)."""
    return x.reshape(x.shape[0], -1)


def flatten_channels_first(x: Float[Array, "batch height width channels"]) -> Array:
    """(batch, H, W, C) -> (batch, C*H*W), the order of torch's Linear weights."""
    return flatten(x.transpose(0, 3, 1, 2))


class ImageLayers(nnx.Sequential):
    """An `nnx.Sequential` in which a `Conv2d` also computes the ReLU before it, in one pass.

    It does so only for a `jax.nn.relu` right before a layer whose call is `Conv2d`'s; all other
    layers are called as they are, also those that were put there later.
    """

    def __call__(self, x: Array) -> Array:
        """The last layer's output."""
        layers = list(self.layers)
        while layers:
            layer, *layers = layers
            if layer is jax.nn.relu and layers:
                layer, *layers = layers
                x = after_relu(layer, x)
            else:
                x = layer(x)
        return x


def after_relu(layer: Callable[[Array], Array], x: Array) -> Array:
    """`layer(jax.nn.relu(x))`, in one pass if the layer's call is `Conv2d`'s."""
    if isinstance(layer, Conv2d) and type(layer).__call__ is Conv2d.__call__:
        return layer(x, rectify=True)
    return layer(jax.nn.relu(x))


class Conv2d(nnx.Conv):
    """Torch's `Conv2d` for square windows and images (batch, H, W, channels), fast on CPUs, too.

    Its weights start as zeros; `layer_init` and `torch_init` take it.

    Args:
        in_features: channels that come in.
        out_features: channels that go out.
        window: rows and columns of the kernel.
        stride: rows and columns from window to window.
        padding: rows and columns of zeros on all sides.
        channels_first: images come in as (batch, channels, H, W), as many environments give them.
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
        out_channels_first: bool = False,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
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
        self.out_channels_first = out_channels_first

    def __call__(
        self, images: Array, out_sharding: object = None, *, rectify: bool = False
    ) -> Float[Array, "batch _ _ _"]:
        """Convolve images.

        Args:
            images: (batch, H, W, channels), or with `channels_first` (batch, channels, H, W). Bytes
                (uint8) stand for numbers from 0 to 1: they are divided by 255.
            out_sharding: not used.
            rectify: a ReLU comes first.

        Returns:
            Images (batch, H', W', channels), with `out_channels_first` (batch, channels, H', W').
        """
        dtype = self.param_dtype if self.dtype is None else self.dtype
        assert self.bias is not None
        kernel, bias = (jnp.asarray(p[...], dtype) for p in (self.kernel, self.bias))
        windows = Windows(
            (self.stride, self.stride),
            (self.pad, self.pad),
            self.channels_first,
            rectify,
            self.out_channels_first,
        )
        return convolution(images, kernel, bias, windows)
