"""PufferLib's twin of a policy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from flax import nnx

from puffer_jax.base import spaces
from puffer_jax.base.packages import PUFFERLIB, require
from puffer_jax.parity.shared import TorchModule
from puffer_jax.policies.base import reference_of


def reference_policy(jax_policy: nnx.Module) -> TorchModule:
    """PufferLib's own policy of the same class and sizes, with its own weights.

    Raises:
        ImportError: pufferlib or torch is missing.
        ValueError: a custom class, or a space that PufferLib's policy cannot take.

    Example:
        >>> import numpy as np, puffer_jax, torch
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.Default(env, rngs=nnx.Rngs(0))
        >>> _ = torch.manual_seed(0)
        >>> reference = puffer_jax.parity.reference_policy(policy)
        >>> _ = puffer_jax.load_state_dict(policy, reference.state_dict())
        >>> observations = np.ones((3, 4), np.float32)
        >>> report = puffer_jax.parity.compare(reference, policy, observations)
        >>> print(report.first_difference)
        None
    """
    models = require("pufferlib.models", "the comparison", f"torch==2.13.0 {PUFFERLIB}")

    return reference_of(jax_policy, models, reference_env(jax_policy))


def reference_env(jax_policy: Any) -> SimpleNamespace:
    """What PufferLib's policies read from an environment, with the spaces of `jax_policy`.

    Where the policy knows only a shape, the space is a Box without bounds, so that sampling gives
    standard normal numbers; for images, it is a Box of bytes.

    Raises:
        ImportError: gymnasium is missing.
        ValueError: a space that PufferLib's policies cannot take.
    """
    require("gymnasium", "the comparison")
    from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

    def box(dtype: np.dtype, shape: tuple[int, ...]) -> spaces.Space:
        if dtype.kind == "f":
            return Box(-np.inf, np.inf, shape, dtype.type)
        return Box(0, 1 if dtype.kind == "b" else 100, shape, dtype.type)

    if not hasattr(jax_policy, "env_spec"):
        raise ValueError(f"PufferLib has no policy of the class {type(jax_policy).__name__}")
    match jax_policy.env_spec.single_action_space:
        case spaces.Discrete(n):
            action = Discrete(n)
        case spaces.MultiDiscrete(nvec):
            action = MultiDiscrete(list(nvec))
        case other:
            action = Box(-1, 1, other.shape)
    layout = jax_policy.env_spec.single_observation_space
    extra = {}
    takes_images = getattr(getattr(jax_policy, "policy", jax_policy), "takes_images", False)
    if layout.sample_dtype is not None:
        fields = layout.structured
        if any(fields[name].names for name in fields.names):
            raise ValueError("PufferLib's Default takes no nested Dict observations")
        leaves = {name: box(fields[name].base, fields[name].shape) for name in fields.names}
        emulated = {
            "observation_dtype": layout.sample_dtype,
            "emulated_observation_dtype": fields,
        }
        extra = {"env": SimpleNamespace(observation_space=Dict(leaves)), "emulated": emulated}
        observation = box(layout.sample_dtype, layout.shape)
    elif layout.structured is not None:
        observation = box(np.dtype(np.float32), (layout.features,))
    elif not layout.shape:
        raise ValueError(
            f"PufferLib's policies take arrays; the shape of the observations is {layout.shape}"
        )
    elif takes_images:
        observation = Box(0, 255, layout.shape, np.uint8)
    else:
        observation = box(np.dtype(np.float32), layout.shape)
    return SimpleNamespace(
        single_observation_space=observation,
        observation_space=observation,
        single_action_space=action,
        action_space=action,
        **extra,
    )
