"""The policy that an environment gets if nobody chooses one."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from puffer_jax import policies
from puffer_jax.base import spaces
from puffer_jax.base.text import near


def Policy(
    env: Any,
    name: str = "auto",
    *,
    rngs: nnx.Rngs,
    hidden_size: int | None = None,
    dtype: Any = None,
    **options: Any,
) -> Any:
    """A policy that fits the environment's spaces.

    Args:
        env: gives the spaces, see `puffer_jax.spaces.env_spec`.
        name: a policy of `puffer_jax.models`; "auto": Convolutional (the NatureCNN) for uint8
            images of 84x84 with 1 or 4 channels, ProcgenResnet for those of (64, 64, 3), Default
            for all else.
        rngs: of the weights.
        hidden_size: width of the encoding; None: the policy's own default.
        dtype: of matmuls.
        options: the policy's own. What Convolutional must know of its images is found out.

    Raises:
        ValueError: the policy has no such option, or does not fit the environment.
    """
    image = _image(env)
    if name == "auto":
        name = "Default"
        if image == (64, 64, 3):
            name = "ProcgenResnet"
        elif image is not None and _stacked_frames(image):
            name = "Convolutional"
    arguments = {} if hidden_size is None else {"hidden_size": hidden_size}
    match name:
        case "ProcgenResnet":
            arguments = {} if hidden_size is None else {"mlp_width": hidden_size}
        case "Convolutional" if image is not None:
            arguments |= {} if hidden_size is None else {"output_size": hidden_size}
            arguments |= _convolutions(image, options)
    policy_class = getattr(policies, name)
    known = inspect.signature(policy_class.__init__).parameters
    wrong = near([option for option in options if option not in known], known)
    if wrong:
        raise ValueError(f"no such option of {name}: {', '.join(wrong)}")
    return policy_class(env, **arguments | options, rngs=rngs, dtype=dtype)


def _image(env: Any) -> tuple[int, ...] | None:
    """The shape of image observations, where a policy for images can act."""
    space = getattr(env, "single_observation_space", None) or env.observation_space
    action = spaces.env_spec(env).single_action_space
    if spaces.kind_of(space) != "box" or not isinstance(action, spaces.Discrete):
        return None
    is_image = len(space.shape) == 3 and np.dtype(space.dtype) == np.uint8
    return tuple(space.shape) if is_image else None


def _stacked_frames(image: tuple[int, ...]) -> bool:
    first = image[0] in (1, 4) and image[1:] == (84, 84)
    return first or (image[2] in (1, 4) and image[:2] == (84, 84))


def _convolutions(image: tuple[int, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """What Convolutional must know of its images."""
    last = given.get("channels_last", image[2] in (1, 4) and image[0] not in (1, 4))
    height, width, channels = image if last else (*image[1:], image[0])
    sides = [-(-side // given.get("downsample", 1)) for side in (height, width)]
    for window, stride in ((8, 4), (4, 2), (3, 1)):
        sides = [(side - window) // stride + 1 for side in sides]
    return {
        "framestack": channels,
        "flat_size": 64 * sides[0] * sides[1],
        "channels_last": last,
    }
