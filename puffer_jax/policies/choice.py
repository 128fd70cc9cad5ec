"""The policy that an environment gets if nobody chooses one."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from puffer_jax.base import spaces
from puffer_jax.base.spaces import Env
from puffer_jax.base.text import near
from puffer_jax.policies.base import FeedForward, image_of
from puffer_jax.policies.convolutional import Convolutional
from puffer_jax.policies.default import Default
from puffer_jax.policies.masks import mask_of
from puffer_jax.policies.mlp import MLP
from puffer_jax.policies.registry import FEED_FORWARD

# Runs written by 0.1 name no policy, and go on with the one that they began with.
AUTO_0_1 = "auto 0.1"


def Policy(
    env: Env,
    name: str = "auto",
    *,
    rngs: nnx.Rngs,
    hidden_size: int | None = None,
    dtype: DTypeLike | None = None,
    action_mask: str | None = None,
    **options: Any,
) -> FeedForward:
    """A policy that fits the environment's spaces.

    Args:
        env: gives the spaces, see `puffer_jax.spaces.env_spec`.
        name: a policy of `puffer_jax.models`; "auto": ProcgenResnet for uint8 images of (64, 64,
            3), Convolutional (the NatureCNN) for all others of at least 36x36, those from 168x168
            on downsampled to about 84, MLP for vectors with continuous actions, Default for
            everything else. "auto 0.1" is what "auto" was in that version: images of other sizes
            than Procgen's and Atari's 84x84, and continuous actions, had Default.
        rngs: for the weights.
        hidden_size: width of the encoding; None: the policy's own default.
        dtype: of the matmuls.
        action_mask: the key of Dict observations that says which actions are legal; "auto":
            "action_mask", if they have it; None: all actions are legal.
        options: the policy's own. What Convolutional must know about its images is worked out.

    Raises:
        ValueError: there is no such policy, it has no such option, or it does not fit the
            environment.
    """
    action_mask = mask_of(env, action_mask)
    image = image_of(env, action_mask)
    if name == "auto":
        spec = spaces.env_spec(env)
        continuous = isinstance(spec.single_action_space, spaces.Continuous)
        # Only Discrete and MultiDiscrete actions have masks.
        otherwise = MLP if continuous and _is_vector(spec.single_observation_space) else Default
        cls = next((cls for cls in FEED_FORWARD.values() if cls.suits(image)), otherwise)
        if cls is Convolutional and image is not None:
            # The Linear behind the convolutions grows with the image.
            options = {"downsample": max(1, sorted(image)[1] // 84)} | options
    elif name == AUTO_0_1:
        known = image == (64, 64, 3) or (image and 84 in image and {*image} <= {1, 4, 84})
        cls = next((cls for cls in FEED_FORWARD.values() if known and cls.suits(image)), Default)
    elif name in FEED_FORWARD:
        cls = FEED_FORWARD[name]
    else:
        raise ValueError(f"no such policy: {near([name], FEED_FORWARD)[0]}")
    if action_mask is not None:
        options = {"action_mask": action_mask} | options
    return cls.for_env(env, hidden_size=hidden_size, rngs=rngs, dtype=dtype, **options)


def _is_vector(observation: spaces.Observation) -> bool:
    # A number is a vector of one, as which emulation hands it out.
    shape = observation.shape
    return observation.structured is None and shape is not None and len(shape) <= 1
