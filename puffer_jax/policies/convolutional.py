"""`Convolutional`: NatureCNN."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from puffer_jax.nn.images import Conv2d, Deferred, flatten
from puffer_jax.nn.initializers import layer_init
from puffer_jax.nn.linear import linear
from puffer_jax.policies.base import State, _Policy


class Convolutional(_Policy):
    """NatureCNN: three convolutions and a Linear, for Atari-like images.

    Observations are (batch, framestack, H, W), or (batch, H, W, framestack) with
    `channels_last`, valued 0..255. Unlike the reference's it has `forward_eval`, so it
    runs bare in a trainer as well as inside `LSTMWrapper`.

    Args:
        env: gives the spaces; actions are Discrete.
        framestack: channels of the image; 4 without LSTM and 1 with it is customary.
        flat_size: numbers that leave the convolutions, 64 * h * w.
        input_size: not used, as in the reference.
        hidden_size: width of the encoding.
        output_size: width the value head reads; must be `hidden_size`.
        channels_last: where the channels are.
        downsample: keep every n-th pixel.
        rngs: stream `params`.
        dtype: of convolutions and matmuls.
        param_dtype: of parameters, logits and values.

    Raises:
        ValueError: `output_size` is not `hidden_size`; `framestack` or `flat_size` do not fit
            the image; the action space is not Discrete.

    Reference: `pufferlib.models.Convolutional`; Mnih et al. 2015.

    Example:
        >>> import jax, numpy as np, puffer_jax
        >>> from flax import nnx
        >>> from types import SimpleNamespace
        >>> from puffer_jax.spaces import Box, Discrete
        >>> frames = Box(0, 255, (4, 84, 84), np.uint8)
        >>> env = SimpleNamespace(observation_space=frames, action_space=Discrete(6))
        >>> policy = puffer_jax.Convolutional(env, framestack=4, flat_size=3136, rngs=nnx.Rngs(0))
        >>> logits, values = policy.forward(np.zeros((2, 4, 84, 84), np.uint8))
        >>> logits.shape
        (2, 6)
    """

    torch_names: ClassVar = {name: name for name in ("network", "actor", "value_fn")}

    def __init__(
        self,
        env: Any,
        *,
        framestack: int,
        flat_size: int,
        input_size: int = 512,
        hidden_size: int = 512,
        output_size: int = 512,
        channels_last: bool = False,
        downsample: int = 1,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__(env, dtype, param_dtype)
        if hidden_size != output_size:
            raise ValueError(
                f"hidden_size is {hidden_size} and output_size {output_size}, but both heads read "
                f"the same encoding; pass output_size={hidden_size}"
            )
        self.framestack = framestack
        self.flat_size = flat_size
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = output_size
        self.channels_last = channels_last
        self.downsample = downsample
        self._check_image()

        self.network = nnx.Sequential(
            self._conv(framestack, 32, 8, 4, channels_first=not channels_last, rngs=rngs),
            Deferred(jax.nn.relu),
            self._conv(32, 64, 4, 2, rectify=True, rngs=rngs),
            Deferred(jax.nn.relu),
            self._conv(64, 64, 3, 1, rectify=True, out_channels_first=True, rngs=rngs),
            jax.nn.relu,
            flatten,
            self._linear(flat_size, hidden_size, rngs=rngs),
            jax.nn.relu,
        )
        self.actor = self._linear(hidden_size, self._discrete_actions(), 0.01, rngs=rngs)
        self.value_fn = self._linear(output_size, 1, 1.0, rngs=rngs)

    def _conv(self, *sizes: int, rngs: nnx.Rngs, **options: Any) -> Conv2d:
        return layer_init(Conv2d(*sizes, rngs=rngs, **options, **self._dtypes()), rngs=rngs)

    def _check_image(self) -> None:
        shape = self._image_shape()
        if shape is None:
            return
        height, width, channels = shape if self.channels_last else (*shape[1:], shape[0])
        if channels != self.framestack:
            order = "(H, W, C)" if self.channels_last else "(C, H, W)"
            raise ValueError(
                f"framestack is {self.framestack} but the observation space {shape} has {channels} "
                f"channels, read as {order}; pass framestack={channels} or another channels_last"
            )
        sides = [-(-side // self.downsample) for side in (height, width)]
        for window, stride in ((8, 4), (4, 2), (3, 1)):
            sides = [(side - window) // stride + 1 for side in sides]
        if min(sides) < 1:
            raise ValueError(
                f"images of {height}x{width} with downsample={self.downsample} are too small for "
                "three convolutions; at least 36x36 must remain"
            )
        if self.flat_size != 64 * sides[0] * sides[1]:
            raise ValueError(
                f"flat_size is {self.flat_size} but the convolutions of a {height}x{width} image "
                f"with downsample={self.downsample} give {64 * sides[0] * sides[1]}; pass "
                f"flat_size={64 * sides[0] * sides[1]}"
            )

    def encode_observations(
        self, observations: Any, state: State | None = None
    ) -> Float[Array, "batch hidden"]:
        """Hidden vectors (batch, hidden_size); no time axis."""
        images = self._scaled_images(observations)
        pixels = (..., *[slice(None, None, self.downsample)] * 2)
        return self.network(images[*pixels, :] if self.channels_last else images[pixels])

    def decode_actions(self, hidden: Float[Array, "batch hidden"]) -> tuple[Array, Array]:
        """Logits (batch, n) and values (batch, 1)."""
        logits, values = linear(hidden, (self.actor, self.value_fn))
        return logits.astype(self.param_dtype), values.astype(self.param_dtype)
