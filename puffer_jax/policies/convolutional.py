"""`Convolutional`: NatureCNN."""

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from puffer_jax.base.spaces import Env
from puffer_jax.nn.images import Conv2d, ImageLayers, flatten
from puffer_jax.nn.initializers import layer_init
from puffer_jax.nn.linear import linear
from puffer_jax.nn.params import Shape, shape_of
from puffer_jax.policies.base import (
    Description,
    Dtypes,
    FeedForward,
    Hints,
    described_array,
    zeros,
)
from puffer_jax.policies.protocol import State


class Convolutional(FeedForward):
    """NatureCNN: three convolutions and a Linear, for Atari-like images.

    Observations are (batch, framestack, H, W), or (batch, H, W, framestack) with
    `channels_last`, valued 0..255. Unlike the reference's it has `forward_eval`, so it
    runs bare in a trainer as well as inside `LSTMWrapper`.

    Args:
        env: gives the spaces; actions are Discrete.
        framestack: channels of the image; customary are 4, or 1 with an LSTM. None: as the
            observation space says.
        flat_size: numbers that the convolutions give, 64 * h * w. None: worked out likewise.
        input_size: not used, as in the reference.
        hidden_size: width of the encoding.
        output_size: width that the value head reads; must be `hidden_size`.
        channels_last: whether the channels are the last axis. None: if `framestack` is None, too,
            where that is shorter than the first; otherwise they are the first, as in the reference.
        downsample: keep every n-th pixel.
        rngs: stream `params`.
        dtype: of convolutions and matmuls.
        param_dtype: of parameters, logits and values.
        action_mask: see `FeedForward`.

    Raises:
        ValueError: `output_size` is not `hidden_size`; `framestack` or `flat_size` does not fit
            the image, or has to be given; the action space is not Discrete.

    Reference: `pufferlib.models.Convolutional`; Mnih et al. 2015.

    Example:
        >>> import jax, numpy as np, puffer_jax
        >>> from flax import nnx
        >>> from types import SimpleNamespace
        >>> from puffer_jax.spaces import Box, Discrete
        >>> frames = Box(0, 255, (4, 84, 84), np.uint8)
        >>> env = SimpleNamespace(observation_space=frames, action_space=Discrete(6))
        >>> policy = puffer_jax.Convolutional(env, rngs=nnx.Rngs(0))
        >>> logits, values = policy.forward(np.zeros((2, 4, 84, 84), np.uint8))
        >>> logits.shape
        (2, 6)
    """

    sizes: ClassVar = {
        "framestack": int,
        "flat_size": int,
        "input_size": int,
        "hidden_size": int,
        "output_size": int,
        "channels_last": bool,
        "downsample": int,
    }
    takes_images: ClassVar = True
    torch_names: ClassVar = {name: name for name in ("network", "actor", "value_fn")}

    def __init__(
        self,
        env: Env,
        *,
        framestack: int | None = None,
        flat_size: int | None = None,
        input_size: int = 512,
        hidden_size: int = 512,
        output_size: int = 512,
        channels_last: bool | None = None,
        downsample: int = 1,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        action_mask: str | None = None,
    ):
        super().__init__(env, dtype, param_dtype, action_mask)
        if hidden_size != output_size:
            raise ValueError(
                f"hidden_size is {hidden_size} and output_size {output_size}, but both heads read "
                f"the same encoding; pass output_size={hidden_size}"
            )
        shape = self._image_shape()
        if shape is None and (framestack is None or flat_size is None):
            raise ValueError(
                "without an observation space Convolutional needs framestack and flat_size"
            )
        if channels_last is None:
            channels_last = framestack is None and shape is not None and shape[2] < shape[0]
        if shape is not None:
            height, width, channels = shape if channels_last else (*shape[1:], shape[0])
            framestack = channels if framestack is None else framestack
            sides = _output_sides(height, width, downsample)
            flat_size = 64 * sides[0] * sides[1] if flat_size is None else flat_size
        assert framestack is not None and flat_size is not None
        self.framestack = framestack
        self.flat_size = flat_size
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = output_size
        self.channels_last = channels_last
        self.downsample = downsample
        if shape is not None:
            check_nature_image(shape, framestack, flat_size, channels_last, downsample)

        self.network = nature_layers(
            framestack,
            flat_size,
            hidden_size,
            channels_last=channels_last,
            init=layer_init,
            rngs=rngs,
            dtypes=self._dtypes(),
        )
        self.actor = self._linear(hidden_size, self._discrete_actions(), 0.01, rngs=rngs)
        self.value_fn = self._linear(output_size, 1, 1.0, rngs=rngs)

    def encode_observations(
        self, observations: PyTree, state: State | None = None
    ) -> Float[Array, "batch hidden"]:
        """Hidden vectors (batch, hidden_size); no time axis."""
        images = self._scaled_images(observations)
        return self.network(every_nth_pixel(images, self.downsample, self.channels_last))

    def decode_actions(self, hidden: Float[Array, "batch hidden"]) -> tuple[Array, Array]:
        """Logits (batch, n) and values (batch, 1)."""
        logits, values = linear(hidden, (self.actor, self.value_fn))
        return logits.astype(self.param_dtype), values.astype(self.param_dtype)

    @classmethod
    def suits(cls, image: tuple[int, ...] | None) -> bool:
        """Images that three convolutions leave something of, but for Procgen's."""
        if image is None or image == (64, 64, 3):
            return False
        *sides, _ = sorted(image, reverse=True)
        return min(sides) >= 36

    @classmethod
    def _sizes_for(
        cls, image: tuple[int, ...] | None, hidden_size: int | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        sizes = super()._sizes_for(image, hidden_size, options)
        return sizes | ({} if hidden_size is None else {"output_size": hidden_size})

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """See `FeedForward.from_keys`."""
        if not {"network.0.weight", "network.7.weight", "actor.weight"} <= shapes.keys():
            return None
        sizes = nature_sizes(shapes, hints)
        hidden = sizes["hidden_size"]
        return {
            "class": cls.__name__,
            "sizes": {**sizes, "input_size": hidden, "output_size": hidden},
            "observation": described_array(hints.image_shape),
            "action": {"class": "Discrete", "n": shape_of(shapes, "actor.weight", 2)[0]},
        }

    def example_shape(self) -> tuple[int, int, int] | None:
        """See `FeedForward.example_shape`; the weights do not depend on the sides of the image."""
        if self.layout.shape:
            return None
        area = self.flat_size // 64
        rows = next(n for n in range(math.isqrt(area), 0, -1) if area % n == 0)
        height, width = (self.downsample * (8 * side + 28) for side in (rows, area // rows))
        shape = (height, width, self.framestack)
        return shape if self.channels_last else (shape[2], *shape[:2])

    def reference(self, models: ModuleType, env: Env) -> object:
        """PufferLib's `Convolutional`."""
        names = [name for name in self.sizes if name != "input_size"]
        return models.Convolutional(env, **{name: getattr(self, name) for name in names})


def nature_layers(
    channels: int,
    flat_size: int,
    hidden_size: int,
    *,
    channels_last: bool,
    init: Callable[..., Any],
    rngs: nnx.Rngs,
    dtypes: Dtypes,
) -> ImageLayers:
    """Three convolutions and a Linear, each with a ReLU; `init` gives them their weights."""

    def conv(*sizes: int, **options: Any) -> Conv2d:
        return init(Conv2d(*sizes, rngs=rngs, **options, **dtypes), rngs=rngs)

    return ImageLayers(
        conv(channels, 32, 8, 4, channels_first=not channels_last),
        jax.nn.relu,
        conv(32, 64, 4, 2),
        jax.nn.relu,
        conv(64, 64, 3, 1, out_channels_first=True),
        jax.nn.relu,
        flatten,
        init(nnx.Linear(flat_size, hidden_size, kernel_init=zeros, rngs=rngs, **dtypes), rngs=rngs),
        jax.nn.relu,
    )


def nature_sizes(shapes: Mapping[str, Shape], hints: Hints) -> dict[str, Any]:
    """The sizes of `nature_layers` by the keys and shapes of their parameters."""
    hidden, flat_size = shape_of(shapes, "network.7.weight", 2)
    return {
        "hidden_size": hidden,
        "framestack": shape_of(shapes, "network.0.weight", 4)[1],
        "flat_size": flat_size,
        "channels_last": hints.channels_last,
        "downsample": hints.downsample,
    }


def every_nth_pixel(images: Array, n: int, channels_last: bool) -> Array:
    """Every n-th row and column of images (batch, H, W, C), or (batch, C, H, W)."""
    pixels = (..., *[slice(None, None, n)] * 2)
    return images[*pixels, :] if channels_last else images[pixels]


def check_nature_image(
    shape: tuple[int, ...], framestack: int, flat_size: int, channels_last: bool, downsample: int
) -> None:
    """Check that `nature_layers` of these sizes take images of that shape.

    Raises:
        ValueError: they do not.
    """
    height, width, channels = shape if channels_last else (*shape[1:], shape[0])
    if channels != framestack:
        order = "(H, W, C)" if channels_last else "(C, H, W)"
        raise ValueError(
            f"framestack is {framestack} but the observation space {shape} has {channels} "
            f"channels, read as {order}; pass framestack={channels} or another channels_last"
        )
    sides = _output_sides(height, width, downsample)
    if min(sides) < 1:
        raise ValueError(
            f"images of {height}x{width} with downsample={downsample} are too small for "
            "three convolutions; at least 36x36 must remain"
        )
    if flat_size != 64 * sides[0] * sides[1]:
        raise ValueError(
            f"flat_size is {flat_size} but the convolutions of a {height}x{width} image "
            f"with downsample={downsample} give {64 * sides[0] * sides[1]}; pass "
            f"flat_size={64 * sides[0] * sides[1]}"
        )


def _output_sides(height: int, width: int, downsample: int) -> tuple[int, int]:
    """Height and width of what the convolutions give."""
    sides = [-(-side // downsample) for side in (height, width)]
    for window, stride in ((8, 4), (4, 2), (3, 1)):
        sides = [(side - window) // stride + 1 for side in sides]
    return sides[0], sides[1]
