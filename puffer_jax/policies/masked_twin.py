"""The torch twin of a policy with an action mask; PufferLib's own policies have none."""

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from puffer_jax.base import spaces
from puffer_jax.base.packages import PUFFERLIB, require


def masked_twin(policy: Any, models: ModuleType, env: spaces.Env) -> Any:
    """PufferLib's twin of the policy without its mask, and the mask around it.

    Like the others, it takes rows: those of an emulated environment, or concatenated leaves.

    Args:
        policy: a `FeedForward` with an `action_mask`.
        models: the module `pufferlib.models`.
        env: what PufferLib reads from an environment, with the mask.
    """
    torch = require("torch", "the comparison", f"torch==2.13.0 {PUFFERLIB}")
    pytorch = require("pufferlib.pytorch", "the comparison", f"torch==2.13.0 {PUFFERLIB}")
    structured, emulated = policy.env_spec.single_observation_space.structured, None
    if policy.env_spec.single_observation_space.sample_dtype is not None:
        emulated = pytorch.nativize_dtype(env.emulated)
    widths = [sum(map(math.prod, spaces.leaf_shapes(structured[n]))) for n in structured.names]
    inner: Any = policy.reference(models, _without_mask(policy, env))

    def parts(rows: Any) -> dict[str, Any]:
        if emulated is not None:
            return pytorch.nativize_tensor(rows, emulated)
        return dict(zip(structured.names, rows.split(widths, dim=1), strict=True))

    class Masked(type(inner)):
        def encode_observations(self, observations: Any, state: Any = None) -> Any:
            named, batch = parts(observations), len(observations)
            # Until the heads are called, which get no observations.
            self.legal = named.pop(policy.action_mask).reshape(batch, -1) != 0
            rest = torch.cat([part.reshape(batch, -1).float() for part in named.values()], dim=1)
            return super().encode_observations(rest.reshape(batch, *(policy.layout.shape or (-1,))))

        def decode_actions(self, hidden: Any) -> Any:
            logits, values = super().decode_actions(hidden)
            heads = [logits] if torch.is_tensor(logits) else logits
            sizes = [head.shape[-1] for head in heads]
            masked = [
                head.masked_fill(~legal & legal.any(-1, keepdim=True), -torch.inf)
                for head, legal in zip(heads, self.legal.split(sizes, dim=1), strict=True)
            ]
            return masked[0] if torch.is_tensor(logits) else tuple(masked), values

    inner.__class__ = Masked
    return inner


def _without_mask(policy: Any, env: spaces.Env) -> SimpleNamespace:
    from gymnasium.spaces import Box

    shape = policy.layout.shape or (policy.layout.features,)
    observation = Box(-np.inf, np.inf, shape)
    if policy.takes_images:
        observation = Box(0, 255, shape, np.uint8)
    return SimpleNamespace(
        single_observation_space=observation,
        observation_space=observation,
        single_action_space=env.single_action_space,
        action_space=env.action_space,
    )
