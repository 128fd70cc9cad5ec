"""What the feed-forward policies share."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from puffer_jax.base import spaces
from puffer_jax.nn.distributions import Normal
from puffer_jax.nn.initializers import layer_init

# Flax's own initial kernels would be drawn only to be overwritten.
_zeros = jax.nn.initializers.zeros

Logits = Array | tuple[Array, ...] | Normal

State = dict[str, Any]  # arrays


class _Policy(nnx.Module):
    """What the feed-forward policies share: the spaces they were built for, and forward."""

    hidden_size: int
    is_continuous = False
    is_multidiscrete = False
    is_dict_obs = False
    torch_names: ClassVar[dict[str, str]] = {}

    def __init__(self, env: Any, dtype: Any, param_dtype: Any):
        self.env_spec = spaces.env_spec(env)
        self.dtype = dtype
        self.param_dtype = param_dtype

    def encode_observations(self, observations: Any, state: State | None = None) -> Array:
        raise NotImplementedError

    def decode_actions(self, hidden: Array) -> tuple[Logits, Array]:
        raise NotImplementedError

    def forward_eval(self, observations: Any, state: State | None = None) -> tuple[Logits, Array]:
        """Logits and values (batch, 1) for a batch of observations; `state` is not used."""
        return self.decode_actions(self.encode_observations(observations, state=state))

    def forward(self, observations: Any, state: State | None = None) -> tuple[Logits, Array]:
        """The same as `forward_eval`."""
        return self.forward_eval(observations, state)

    def __call__(self, observations: Any, state: State | None = None) -> tuple[Logits, Array]:
        return self.forward(observations, state)

    @property
    def _compute_dtype(self) -> Any:
        return self.param_dtype if self.dtype is None else self.dtype

    def _dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _linear(
        self, inputs: int, outputs: int, std: float = math.sqrt(2), *, rngs: nnx.Rngs
    ) -> nnx.Linear:
        layer = nnx.Linear(inputs, outputs, kernel_init=_zeros, rngs=rngs, **self._dtypes())
        return layer_init(layer, std, rngs=rngs)

    def _discrete_actions(self) -> int:
        action = self.env_spec.single_action_space
        if not isinstance(action, spaces.Discrete):
            raise ValueError(
                f"{type(self).__name__} acts in Discrete spaces only, as in the reference; got "
                f"{action}. Use Default for MultiDiscrete and Box"
            )
        return action.n

    def _image_shape(self) -> tuple[int, int, int] | None:
        shape = self.env_spec.single_observation_space.shape
        if shape is not None and len(shape) != 3:
            raise ValueError(
                f"{type(self).__name__} takes images, observations of three dimensions; got "
                f"shape {shape}"
            )
        return shape

    def _scaled_images(self, images: Any) -> Array:
        """Numbers 0..255 as 0..1, except for bytes, which `Conv2d` scales."""
        images = jnp.asarray(images)
        if images.dtype == jnp.uint8:
            return images
        return images.astype(self._compute_dtype) / 255.0
