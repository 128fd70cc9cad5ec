"""The policy that an environment gets if nobody chooses one."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from puffer_jax.base.spaces import Env
from puffer_jax.base.text import near
from puffer_jax.policies.base import FeedForward, image_of
from puffer_jax.policies.default import Default
from puffer_jax.policies.registry import FEED_FORWARD


def Policy(
    env: Env,
    name: str = "auto",
    *,
    rngs: nnx.Rngs,
    hidden_size: int | None = None,
    dtype: DTypeLike | None = None,
    **options: Any,
) -> FeedForward:
    """A policy that fits the environment's spaces.

    Args:
        env: gives the spaces, see `puffer_jax.spaces.env_spec`.
        name: a policy of `puffer_jax.models`; "auto": Convolutional (the NatureCNN) for uint8
            images of 84x84 with 1 or 4 channels, ProcgenResnet for those of (64, 64, 3), Default
            everything else.
        rngs: for the weights.
        hidden_size: width of the encoding; None: the policy's own default.
        dtype: of the matmuls.
        options: the policy's own. What Convolutional must know about its images is worked out.

    Raises:
        ValueError: there is no such policy, it has no such option, or it does not fit the
            environment.
    """
    if name == "auto":
        image = image_of(env)
        cls = next((cls for cls in FEED_FORWARD.values() if cls.suits(image)), Default)
    elif name in FEED_FORWARD:
        cls = FEED_FORWARD[name]
    else:
        raise ValueError(f"no such policy: {near([name], FEED_FORWARD)[0]}")
    return cls.for_env(env, hidden_size=hidden_size, rngs=rngs, dtype=dtype, **options)
