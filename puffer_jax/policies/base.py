"""What the feed-forward policies share."""

import inspect
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from puffer_jax.base import spaces
from puffer_jax.base.text import near
from puffer_jax.nn.initializers import layer_init
from puffer_jax.nn.params import Shape
from puffer_jax.nn.widths import check_widths
from puffer_jax.policies.masked_twin import masked_twin
from puffer_jax.policies.masks import image_beside, legal, split_mask, without_mask
from puffer_jax.policies.protocol import Logits, State

# Flax's own initial kernels would be drawn only to be overwritten.
zeros = jax.nn.initializers.zeros

Description = dict[str, Any]
"""A policy, or a part of it, as JSON values; see `puffer_jax.weights.description`."""


class Dtypes(TypedDict):
    """The dtypes that every policy and layer takes."""

    dtype: DTypeLike | None
    param_dtype: DTypeLike


class Hints(NamedTuple):
    """What the shapes in a checkpoint cannot tell; see `puffer_jax.policy_from_checkpoint`."""

    env: spaces.Env = None
    nvec: tuple[int, ...] | int | None = None
    image_shape: tuple[int, ...] | None = None
    channels_last: bool = False
    downsample: int = 1
    activation: str | None = None
    action_mask: str | None = None


class FeedForward(nnx.Module):
    """What the feed-forward policies share: the spaces they were built for, and forward.

    A subclass also says what others need to know about it: the sizes that describe it, how they
    follow from an environment or a checkpoint, and which of PufferLib's policies is its twin.

    Args:
        env: gives the spaces, see `puffer_jax.spaces.env_spec`.
        dtype: of matmuls and convolutions.
        param_dtype: of parameters, logits and values.
        action_mask: the key of Dict observations that says which actions are legal; None: all are.

    Attributes:
        layout: what the encoder reads, the observations without the mask.
        sizes: the constructor's arguments that a checkpoint has to name, with their types.
        takes_images: whether observations are images of bytes.
    """

    sizes: ClassVar[Mapping[str, type]]
    takes_images: ClassVar[bool] = False
    torch_names: ClassVar[dict[str, str]] = {}
    hidden_size: int
    is_continuous = False
    is_multidiscrete = False
    is_dict_obs = False

    def __init__(
        self,
        env: spaces.Env,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        action_mask: str | None = None,
    ):
        self.env_spec = spaces.env_spec(env)
        check_widths(env)
        self.action_mask = action_mask
        self.layout = without_mask(self.env_spec, action_mask)
        self.dtype = dtype
        self.param_dtype = param_dtype

    def encode_observations(self, observations: PyTree, state: State | None = None) -> Array:
        """Hidden vectors (batch, hidden_size); `state` is not used."""
        raise NotImplementedError

    def decode_actions(self, hidden: Array) -> tuple[Logits, Array]:
        """Logits, whether legal or not, and values (batch, 1)."""
        raise NotImplementedError

    def masked(self, logits: Logits, observations: PyTree) -> Logits:
        """The logits, -inf where the mask in the observations forbids the action."""
        if self.action_mask is None:
            return logits
        return legal(logits, split_mask(observations, self.env_spec, self.action_mask)[1])

    def forward_eval(
        self, observations: PyTree, state: State | None = None
    ) -> tuple[Logits, Array]:
        """Logits and values (batch, 1) for a batch of observations; `state` is not used."""
        hidden = self.encode_observations(observations, state=state)
        logits, values = self.decode_actions(hidden)
        return self.masked(logits, observations), values

    def forward(self, observations: PyTree, state: State | None = None) -> tuple[Logits, Array]:
        """The same as `forward_eval`."""
        return self.forward_eval(observations, state)

    def __call__(self, observations: PyTree, state: State | None = None) -> tuple[Logits, Array]:
        """`forward`."""
        return self.forward(observations, state)

    @classmethod
    def suits(cls, image: tuple[int, ...] | None) -> bool:
        """Whether it is the policy of choice for images of that shape (None: for no images)."""
        return False

    @classmethod
    def for_env(
        cls,
        env: spaces.Env,
        *,
        hidden_size: int | None = None,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        **options: Any,
    ) -> "FeedForward":
        """The policy for an environment; see `puffer_jax.environments.Policy`."""
        image = image_of(env, options.get("action_mask"))
        sizes = cls._sizes_for(image, hidden_size, options)
        known = inspect.signature(cls.__init__).parameters
        wrong = near([option for option in options if option not in known], known)
        if wrong:
            raise ValueError(f"no such option of {cls.__name__}: {', '.join(wrong)}")
        return cls(env, **sizes | options, rngs=rngs, dtype=dtype)  # type: ignore[call-arg]

    @classmethod
    def _sizes_for(
        cls, image: tuple[int, ...] | None, hidden_size: int | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The constructor's arguments that follow from the width and the environment's images."""
        return {} if hidden_size is None else {"hidden_size": hidden_size}

    def described(self) -> Description:
        """The sizes, and the key of the mask if there is one."""
        mask = {} if self.action_mask is None else {"action_mask": self.action_mask}
        return {"sizes": {name: getattr(self, name) for name in self.sizes}, **mask}

    @classmethod
    def rebuild(cls, env: spaces.Env, description: Description, **options: Any) -> "FeedForward":
        """A policy of the described sizes; a ValueError if they cannot be sizes."""
        mask = description.get("action_mask")
        if mask is not None and not isinstance(mask, str):
            raise ValueError(f"the description of the policy is damaged: action_mask is {mask!r}")
        return cls(env, **read_sizes(description, cls.sizes), action_mask=mask, **options)

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """The description of a policy from its state_dict; None if the keys are not this class's.

        Raises:
            ValueError: the shapes do not tell enough.
        """
        raise NotImplementedError

    def example_shape(self) -> tuple[int, int, int] | None:
        """The shape of an observation that fits, if the policy was built without knowing one."""
        return None

    def reference(self, models: ModuleType, env: spaces.Env) -> object:
        """PufferLib's policy of the same class and sizes.

        Args:
            models: the module `pufferlib.models`.
            env: what PufferLib reads from an environment.
        """
        raise NotImplementedError

    @property
    def _compute_dtype(self) -> DTypeLike:
        return default_dtype(self.dtype, self.param_dtype)

    def _dtypes(self) -> Dtypes:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _linear(
        self, inputs: int, outputs: int, std: float = math.sqrt(2), *, rngs: nnx.Rngs
    ) -> nnx.Linear:
        layer = nnx.Linear(inputs, outputs, kernel_init=zeros, rngs=rngs, **self._dtypes())
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
        if self.layout.structured is not None:
            raise ValueError(
                f"{type(self).__name__} takes images; got a Dict or Tuple of "
                f"{', '.join(self.layout.structured.names or ())}"
            )
        shape = self.layout.shape
        if shape is not None and len(shape) != 3:
            raise ValueError(
                f"{type(self).__name__} takes images, observations of three dimensions; got "
                f"shape {shape}"
            )
        return shape

    def _without_mask(self, observations: PyTree) -> PyTree:
        """What is left to observe, in `layout`."""
        if self.action_mask is None:
            return observations
        return split_mask(observations, self.env_spec, self.action_mask)[0]

    def _scaled_images(self, images: PyTree) -> Array:
        """Numbers 0..255 as 0..1, except for bytes, which `Conv2d` scales."""
        return scaled_images(self._without_mask(images), self._compute_dtype)


def scaled_images(images: PyTree, dtype: DTypeLike) -> Array:
    """Numbers 0..255 as 0..1 in `dtype`, except for bytes, which `Conv2d` scales."""
    images = jnp.asarray(images)
    return images if images.dtype == jnp.uint8 else images.astype(dtype) / 255.0


def read_sizes(description: Description, sizes: Mapping[str, type]) -> dict[str, Any]:
    """The sizes in a description, which may say anything.

    Raises:
        ValueError: a size has another type or is below 1.
        KeyError: a size is missing.
    """
    found = {name: description["sizes"][name] for name in sizes}
    for name, size in found.items():
        kind, numbers = sizes[name], ()
        if kind is tuple and isinstance(size, list | tuple):
            numbers = found[name] = tuple(size)  # JSON has only lists
        elif kind is int:
            numbers = (size,)
        if type(found[name]) is not kind or not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(f"the description of the policy is damaged: {name} is {size!r}")
    return found


def default_dtype(dtype: DTypeLike | None, param_dtype: DTypeLike) -> DTypeLike:
    """That of the computation, of a layer's two."""
    return param_dtype if dtype is None else dtype


def reference_of(policy: Any, models: ModuleType, env: spaces.Env) -> Any:
    """PufferLib's twin of `policy`; see `FeedForward.reference`.

    Raises:
        ValueError: there is none.
    """
    if not hasattr(policy, "reference"):
        raise ValueError(f"PufferLib has no policy of the class {type(policy).__name__}")
    if getattr(policy, "action_mask", None) is None:
        return policy.reference(models, env)
    return masked_twin(policy, models, env)


def image_of(env: spaces.Env, action_mask: str | None = None) -> tuple[int, ...] | None:
    """The shape of image observations; None where no policy for images can act."""
    space = getattr(env, "single_observation_space", None) or env.observation_space
    spec = spaces.env_spec(env)
    if not isinstance(spec.single_action_space, spaces.Discrete):
        return None
    if action_mask is not None:
        return image_beside(spec, action_mask)
    if spaces.kind_of(space) != "box":
        return None
    is_image = len(space.shape) == 3 and np.dtype(space.dtype) == np.uint8
    return tuple(space.shape) if is_image else None


def described_array(shape: tuple[int, ...] | None) -> Description:
    """The observation space of a description: an array, not a Dict or Tuple."""
    return {"shape": shape, "structured": None, "sample_dtype": None}
