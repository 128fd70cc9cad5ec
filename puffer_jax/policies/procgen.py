"""`ProcgenResnet`: the IMPALA ResNet."""

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped

from puffer_jax.base.spaces import Env
from puffer_jax.kernels.pooling import max_pool
from puffer_jax.nn.images import Conv2d, after_relu, flatten_channels_first
from puffer_jax.nn.initializers import torch_init
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


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions around a skip connection, images (batch, H, W, channels).

    Quirk kept: torch's default uniform initialisation.

    Reference: `pufferlib.models.ResidualBlock`.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> block = puffer_jax.ResidualBlock(16, rngs=nnx.Rngs(0))
        >>> block(jax.numpy.zeros((2, 8, 8, 16))).shape
        (2, 8, 8, 16)
    """

    torch_names: ClassVar = {"conv0": "conv0", "conv1": "conv1"}

    def __init__(
        self,
        channels: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        dtypes = Dtypes(dtype=dtype, param_dtype=param_dtype)
        self.conv0 = _conv3x3(channels, channels, rngs, dtypes)
        self.conv1 = _conv3x3(channels, channels, rngs, dtypes)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        """Images of the same shape."""
        return after_relu(self.conv1, after_relu(self.conv0, x)) + x


class ConvSequence(nnx.Module):
    """A 3x3 convolution, max-pooling to half the size and two residual blocks.

    Quirk kept: torch's default uniform initialisation.

    Args:
        input_shape: (H, W, C); the reference's is (C, H, W).
        out_channels: C'.
        rngs: stream `params`.
        dtype: of the convolutions.
        param_dtype: of the parameters.

    Reference: `pufferlib.models.ConvSequence`; Espeholt et al. 2018 (IMPALA).

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> sequence = puffer_jax.ConvSequence((64, 64, 3), 16, rngs=nnx.Rngs(0))
        >>> sequence.get_output_shape()
        (32, 32, 16)
    """

    torch_names: ClassVar = {name: name for name in ("conv", "res_block0", "res_block1")}

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        out_channels: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self._input_shape = tuple(input_shape)
        self._out_channels = out_channels
        dtypes = Dtypes(dtype=dtype, param_dtype=param_dtype)
        self.conv = _conv3x3(input_shape[2], out_channels, rngs, dtypes)
        self.res_block0 = ResidualBlock(out_channels, rngs=rngs, **dtypes)
        self.res_block1 = ResidualBlock(out_channels, rngs=rngs, **dtypes)

    def __call__(self, x: Shaped[Array, "batch height width channels"]) -> Array:
        """Images (batch, H, W, C) -> (batch, H', W', C'); bytes are scaled to 0..1."""
        return self.res_block1(self.res_block0(max_pool(self.conv(x))))

    def get_output_shape(self) -> tuple[int, int, int]:
        """(H', W', C')."""
        height, width, _ = self._input_shape
        return (height + 1) // 2, (width + 1) // 2, self._out_channels


class ProcgenResnet(FeedForward):
    """The IMPALA ResNet as used for Procgen: three `ConvSequence`s and a Linear.

    Observations are (batch, H, W, C), valued 0..255. Unlike the reference's it has
    `hidden_size`, `is_continuous` and `forward_eval`, so it runs bare in a trainer as well as
    inside `LSTMWrapper`.

    Quirk kept: all inner layers have torch's default uniform initialisation; only the heads
    are orthogonal.

    Args:
        env: gives the spaces; actions are Discrete.
        cnn_width: channels of the first sequence; the others have twice as many.
        mlp_width: width of the encoding.
        rngs: stream `params`.
        dtype: of convolutions and matmuls.
        param_dtype: of parameters, logits and values.
        action_mask: see `FeedForward`.

    Raises:
        ValueError: the observations are not images, or the action space is not Discrete.

    Reference: `pufferlib.models.ProcgenResnet`; Espeholt et al. 2018 (IMPALA).

    Example:
        >>> import numpy as np, puffer_jax
        >>> from flax import nnx
        >>> from types import SimpleNamespace
        >>> from puffer_jax.spaces import Box, Discrete
        >>> images = Box(0, 255, (64, 64, 3), np.uint8)
        >>> env = SimpleNamespace(observation_space=images, action_space=Discrete(15))
        >>> policy = puffer_jax.ProcgenResnet(env, rngs=nnx.Rngs(0))
        >>> logits, values = policy.forward(np.zeros((2, 64, 64, 3), np.uint8))
        >>> logits.shape
        (2, 15)
    """

    sizes: ClassVar = {"cnn_width": int, "mlp_width": int}
    takes_images: ClassVar = True
    torch_names: ClassVar = {name: name for name in ("network", "actor", "value")}

    def __init__(
        self,
        env: Env,
        cnn_width: int = 16,
        mlp_width: int = 256,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        action_mask: str | None = None,
    ):
        super().__init__(env, dtype, param_dtype, action_mask)
        self.cnn_width = cnn_width
        self.mlp_width = mlp_width
        self.hidden_size = mlp_width
        shape = self._image_shape()
        if shape is None:
            raise ValueError("ProcgenResnet needs the image size: an env with an observation space")
        self.network = impala_layers(shape, cnn_width, mlp_width, rngs=rngs, dtypes=self._dtypes())
        self.actor = self._linear(mlp_width, self._discrete_actions(), 0.01, rngs=rngs)
        self.value = self._linear(mlp_width, 1, 1.0, rngs=rngs)

    def encode_observations(
        self, observations: PyTree, state: State | None = None
    ) -> Float[Array, "batch hidden"]:
        """Hidden vectors (batch, mlp_width); no time axis."""
        return self.network(self._scaled_images(observations))

    def decode_actions(self, hidden: Float[Array, "batch hidden"]) -> tuple[Array, Array]:
        """Logits (batch, n) and values (batch, 1)."""
        logits, values = linear(hidden, (self.actor, self.value))
        return logits.astype(self.param_dtype), values.astype(self.param_dtype)

    @classmethod
    def suits(cls, image: tuple[int, ...] | None) -> bool:
        """Procgen's images, (64, 64, 3)."""
        return image == (64, 64, 3)

    @classmethod
    def _sizes_for(
        cls, image: tuple[int, ...] | None, hidden_size: int | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {} if hidden_size is None else {"mlp_width": hidden_size}

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """See `FeedForward.from_keys`."""
        if not {"network.0.conv.weight", "network.5.weight", "actor.weight"} <= shapes.keys():
            return None
        cnn_width, mlp_width = impala_widths(shapes, hints, "a ProcgenResnet")
        return {
            "class": cls.__name__,
            "sizes": {"cnn_width": cnn_width, "mlp_width": mlp_width},
            "observation": described_array(hints.image_shape),
            "action": {"class": "Discrete", "n": shape_of(shapes, "actor.weight", 2)[0]},
        }

    def reference(self, models: ModuleType, env: Env) -> object:
        """PufferLib's `ProcgenResnet`, with what PufferLib's own LSTMWrapper asks of a policy."""

        class ProcgenResnet(models.ProcgenResnet):
            is_continuous = False

            def encode_observations(self, x: object, state: object = None) -> object:
                return super().encode_observations(x)

        return ProcgenResnet(env, self.cnn_width, self.mlp_width)


def impala_layers(
    shape: tuple[int, int, int],
    cnn_width: int,
    hidden_size: int,
    *,
    rngs: nnx.Rngs,
    dtypes: Dtypes,
) -> nnx.Sequential:
    """Three `ConvSequence`s and a Linear for images (H, W, C), with torch's default weights."""
    sequences = []
    for width in (cnn_width, 2 * cnn_width, 2 * cnn_width):
        sequences.append(ConvSequence(shape, width, rngs=rngs, **dtypes))
        shape = sequences[-1].get_output_shape()
    linear = nnx.Linear(math.prod(shape), hidden_size, kernel_init=zeros, rngs=rngs, **dtypes)
    return nnx.Sequential(
        *sequences,
        flatten_channels_first,
        jax.nn.relu,
        torch_init(linear, rngs=rngs),
        jax.nn.relu,
    )


def impala_widths(shapes: Mapping[str, Shape], hints: Hints, whose: str) -> tuple[int, int]:
    """Both widths of `impala_layers` by the keys and shapes of their parameters.

    Raises:
        ValueError: the size of the images has to be given.
    """
    if hints.env is None and hints.image_shape is None:
        raise ValueError(
            f"these are the keys of {whose}, whose weights do not tell the image size; pass env "
            "or image_shape=(H, W, C)"
        )
    conv = shape_of(shapes, "network.0.conv.weight", 4)
    return conv[0], shape_of(shapes, "network.5.weight", 2)[0]


def _conv3x3(inputs: int, outputs: int, rngs: nnx.Rngs, dtypes: Dtypes) -> Conv2d:
    return torch_init(Conv2d(inputs, outputs, 3, padding=1, rngs=rngs, **dtypes), rngs=rngs)
