"""From observations to hidden vectors."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from puffer_jax.base.spaces import Env, Observation, env_spec
from puffer_jax.nn.initializers import torch_init
from puffer_jax.nn.linear import linear
from puffer_jax.nn.params import Shape, shape_of
from puffer_jax.nn.widths import check_widths
from puffer_jax.policies.base import (
    Description,
    Dtypes,
    Hints,
    default_dtype,
    described_array,
    scaled_images,
    zeros,
)
from puffer_jax.policies.convolutional import (
    check_nature_image,
    every_nth_pixel,
    nature_layers,
    nature_sizes,
)
from puffer_jax.policies.procgen import impala_layers, impala_widths


class FlatEncoder(nnx.Module):
    """What the encoders of flat observations share.

    Args:
        obs_size: how many numbers an observation has.
        hidden_size: width of the encoding.
        dtype: of the matmul; None: that of the parameters.
        param_dtype: of the parameters.
    """

    sizes: ClassVar[Mapping[str, type]] = {"obs_size": int, "hidden_size": int}
    weight_name: ClassVar[str]

    def __init__(
        self, obs_size: int, hidden_size: int, dtype: DTypeLike | None, param_dtype: DTypeLike
    ):
        self.obs_size = obs_size
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.observation = Observation((obs_size,))

    def _flat(self, observations: Array) -> Float[Array, "batch features"]:
        flat = observations.reshape(observations.shape[0], -1)
        if flat.shape[1] != self.obs_size:
            raise ValueError(
                f"observations of shape {observations.shape} have {flat.shape[1]} numbers each; "
                f"obs_size is {self.obs_size}"
            )
        return flat.astype(default_dtype(self.dtype, self.param_dtype))

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """Sizes and observations of the encoder with these keys; None if they are not its."""
        if cls.weight_name not in shapes:
            return None
        hidden, features = shape_of(shapes, cls.weight_name, 2)
        sizes = {"obs_size": features, "hidden_size": hidden}
        return {"sizes": sizes, "observation": described_array(hints.image_shape or (features,))}

    @classmethod
    def rebuild(cls, env: Env, sizes: Mapping[str, int], **options: Any) -> Any:
        """An encoder of these sizes."""
        return cls(**sizes, **options)

    @classmethod
    def for_env(cls, env: Env, hidden_size: int, **options: Any) -> Any:
        """An encoder of this width for the environment's observations."""
        return cls(env_spec(env).single_observation_space.features, hidden_size, **options)


class DefaultEncoder(FlatEncoder):
    """One linear layer on the flat observation, without an activation.

    Args:
        obs_size: how many numbers an observation has.
        hidden_size: width of the encoding.
        rngs: stream `params`; the weights are torch's default.
        dtype: of the matmul; None: that of the parameters.
        param_dtype: of the parameters.

    Reference: `DefaultEncoder` in PufferLib 4's `pufferlib/models.py`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from puffer_jax import v4
        >>> encoder = v4.DefaultEncoder(6, hidden_size=16, rngs=nnx.Rngs(0))
        >>> encoder(jax.numpy.ones((3, 2, 3))).shape
        (3, 16)
    """

    weight_name: ClassVar = "encoder.weight"

    def __init__(
        self,
        obs_size: int,
        hidden_size: int = 128,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(obs_size, hidden_size, dtype, param_dtype)
        dtypes = Dtypes(dtype=dtype, param_dtype=param_dtype)
        layer = nnx.Linear(obs_size, hidden_size, kernel_init=zeros, rngs=rngs, **dtypes)
        self.encoder = torch_init(layer, rngs=rngs)

    def __call__(self, observations: Array) -> Float[Array, "batch hidden"]:
        """Hidden vectors for observations (batch, *obs).

        Raises:
            ValueError: an observation has another number of numbers.
        """
        return linear(self._flat(observations), [self.encoder])[0]


class _ImageEncoder(nnx.Module):
    """What the encoders of images share.

    Args:
        env: gives the observation space.
        hidden_size: width of the encoding.
        dtype: of convolutions and matmul; None: that of the parameters.
        param_dtype: of the parameters.

    Raises:
        ValueError: the environment's observations are no images.
    """

    sizes: ClassVar[Mapping[str, type]]

    def __init__(self, env: Env, hidden_size: int, dtype: DTypeLike | None, param_dtype: DTypeLike):
        self.observation = _image_observation(env, type(self).__name__)
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.param_dtype = param_dtype

    @property
    def _dtypes(self) -> Dtypes:
        return Dtypes(dtype=self.dtype, param_dtype=self.param_dtype)

    def _scaled(self, observations: Array) -> Array:
        return scaled_images(observations, default_dtype(self.dtype, self.param_dtype))

    @classmethod
    def rebuild(cls, env: Env, sizes: Mapping[str, int], **options: Any) -> Any:
        """An encoder of these sizes."""
        return cls(env, **sizes, **options)

    @classmethod
    def for_env(cls, env: Env, hidden_size: int, **options: Any) -> Any:
        """An encoder of this width for the environment's images."""
        return cls(env, hidden_size, **options)


class NatureEncoder(_ImageEncoder):
    """The layers of `Convolutional`, the NatureCNN, for images valued 0..255.

    Args:
        env: gives the observation space.
        hidden_size: width of the encoding.
        framestack: channels of the images.
        flat_size: numbers that the convolutions give; 3136 are those of 84x84 pixels.
        channels_last: images are (H, W, C); otherwise (C, H, W).
        downsample: keep every n-th pixel.
        rngs: stream `params`; the weights are torch's default.
        dtype: of convolutions and matmul; None: that of the parameters.
        param_dtype: of the parameters.

    Raises:
        ValueError: the environment's observations are no such images.

    Reference: `NatureEncoder` in PufferLib 4's `pufferlib/models.py`; Mnih et al. 2015.
    """

    sizes: ClassVar[Mapping[str, type]] = {
        "hidden_size": int,
        "framestack": int,
        "flat_size": int,
        "channels_last": bool,
        "downsample": int,
    }

    def __init__(
        self,
        env: Env,
        hidden_size: int = 512,
        framestack: int = 1,
        flat_size: int = 64 * 7 * 7,
        channels_last: bool = False,
        downsample: int = 1,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(env, hidden_size, dtype, param_dtype)
        if self.observation.shape is not None:
            check_nature_image(
                self.observation.shape, framestack, flat_size, channels_last, downsample
            )
        self.framestack = framestack
        self.flat_size = flat_size
        self.channels_last = channels_last
        self.downsample = downsample
        self.network = nature_layers(
            framestack,
            flat_size,
            hidden_size,
            channels_last=channels_last,
            init=torch_init,
            rngs=rngs,
            dtypes=self._dtypes,
        )

    def __call__(self, observations: Array) -> Float[Array, "batch hidden"]:
        """Hidden vectors for images (batch, C, H, W), or with `channels_last` (batch, H, W, C)."""
        images = self._scaled(observations)
        return self.network(every_nth_pixel(images, self.downsample, self.channels_last))

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """See `DefaultEncoder.from_keys`."""
        if not {"network.0.weight", "network.7.weight"} <= shapes.keys():
            return None
        sizes = nature_sizes(shapes, hints)
        return {"sizes": sizes, "observation": described_array(hints.image_shape)}


class ImpalaEncoder(_ImageEncoder):
    """The layers of `ProcgenResnet`, for images (batch, H, W, C) valued 0..255.

    Args:
        env: gives the observation space.
        hidden_size: width of the encoding.
        cnn_width: channels of the first sequence; the others have twice as many.
        rngs: stream `params`; the weights are torch's default.
        dtype: of convolutions and matmul; None: that of the parameters.
        param_dtype: of the parameters.

    Raises:
        ValueError: the environment's observations are no images, or of unknown size.

    Reference: `ImpalaEncoder` in PufferLib 4's `pufferlib/models.py`; Espeholt et al. 2018.
    """

    sizes: ClassVar[Mapping[str, type]] = {"hidden_size": int, "cnn_width": int}

    def __init__(
        self,
        env: Env,
        hidden_size: int = 256,
        cnn_width: int = 16,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(env, hidden_size, dtype, param_dtype)
        if self.observation.shape is None:
            raise ValueError("ImpalaEncoder needs the image size: an env with an observation space")
        height, width, channels = self.observation.shape
        self.cnn_width = cnn_width
        self.network = impala_layers(
            (height, width, channels),
            cnn_width,
            hidden_size,
            rngs=rngs,
            dtypes=self._dtypes,
        )

    def __call__(self, observations: Array) -> Float[Array, "batch hidden"]:
        """Hidden vectors for images (batch, H, W, C)."""
        return self.network(self._scaled(observations))

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """See `DefaultEncoder.from_keys`.

        Raises:
            ValueError: the size of the images has to be given.
        """
        if not {"network.0.conv.weight", "network.5.weight"} <= shapes.keys():
            return None
        cnn_width, hidden_size = impala_widths(shapes, hints, "an ImpalaEncoder")
        sizes = {"hidden_size": hidden_size, "cnn_width": cnn_width}
        return {"sizes": sizes, "observation": described_array(hints.image_shape)}


def _image_observation(env: Env, name: str) -> Observation:
    observation = env_spec(env).single_observation_space
    check_widths(env)
    shape = observation.shape
    if observation.structured is not None or (shape is not None and len(shape) != 3):
        got = "a Dict or Tuple" if observation.structured is not None else f"shape {shape}"
        raise ValueError(f"{name} takes images, observations of three dimensions; got {got}")
    return observation
