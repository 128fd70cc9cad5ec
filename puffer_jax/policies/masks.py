"""Action masks in observations: which actions are legal, and what is left to observe.

An environment whose legal actions change says which they are in a part of its Dict observations.
That part never reaches a policy's layers: it sets the logits of illegal actions to -inf, see
`puffer_jax.mask_logits`. As it is stored with the observation, whoever computes logits, in a
rollout, an update or an evaluation, computes the same.
"""

import math
import warnings
from collections.abc import Mapping
from typing import cast

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PyTree, Shaped

from puffer_jax.base import spaces
from puffer_jax.base.text import hint
from puffer_jax.nn.distributions import mask_logits
from puffer_jax.policies.nativize import is_flat, nativize_dtype, nativize_tensor

KEY = "action_mask"

AUTO = "auto"


def mask_of(env: spaces.Env, action_mask: str | None) -> str | None:
    """The key of the mask; for "auto" it is "action_mask" if the observations have one that fits.

    A part of that name that cannot be a mask is only observed, with a warning that says why.
    """
    if action_mask != AUTO:
        return action_mask
    spec = spaces.env_spec(env)
    if KEY not in _parts(spec) or isinstance(spec.single_action_space, spaces.Continuous):
        return None
    try:
        without_mask(spec, KEY)
    except ValueError as error:
        warnings.warn(f"not used as a mask, but observed: {error}", stacklevel=3)
        return None
    return KEY


def without_mask(spec: spaces.EnvSpec, action_mask: str | None) -> spaces.Observation:
    """The layout of an observation without its mask.

    If the mask had one companion that is an array, it is that array.

    Raises:
        ValueError: the observations have no such part, or it is no mask for the actions.
    """
    layout = spec.single_observation_space
    if action_mask is None:
        return layout
    parts = _parts(spec)
    if action_mask not in parts:
        raise ValueError(
            f"action_mask must be a key of Dict observations; got {action_mask!r}"
            f"{hint(action_mask, parts)}, and they are "
            + (f"a Dict of {', '.join(parts)}" if parts else "no Dict")
            + "; puffer_jax.environments.ActionMask puts the mask of an info there"
        )
    sizes, mask = _sizes(spec), parts[action_mask]
    shapes: list[tuple[int, ...]] = [(sum(sizes),)]
    if len(sizes) > 1 == len({*sizes}):
        shapes.append((len(sizes), sizes[0]))
    if mask.names or mask.base.kind not in "biu" or mask.shape not in shapes:
        got = f"a Dict or Tuple of {', '.join(mask.names)}" if mask.names else _text(mask)
        raise ValueError(
            f"the mask {action_mask!r} must be of bool or integers and of the shape "
            f"{' or '.join(map(str, shapes))}, for {spec.single_action_space}; got {got}"
        )
    rest = {name: part for name, part in parts.items() if name != action_mask}
    if not rest:
        raise ValueError(f"the observations have no part but the mask {action_mask!r}")
    only, *others = rest.values()
    if not others and only.names is None:
        return spaces.Observation(only.shape)
    return spaces.Observation(None, np.dtype([*rest.items()], align=True))


def image_beside(spec: spaces.EnvSpec, action_mask: str) -> tuple[int, ...] | None:
    """The shape of the image of bytes that is observed beside the mask, and nothing else."""
    rest = [part for name, part in _parts(spec).items() if name != action_mask]
    is_image = len(rest) == 1 and len(rest[0].shape) == 3 and rest[0].base == np.uint8
    return rest[0].shape if is_image else None


def split_mask(
    observations: PyTree, spec: spaces.EnvSpec, action_mask: str
) -> tuple[PyTree, Bool[Array, "batch actions"]]:
    """What is left to observe, and which actions are legal.

    Args:
        observations: dicts of arrays (batch, ...), the bytes of an emulated environment, or
            concatenated leaves.
        spec: the spaces of the environment.
        action_mask: the key of the mask.

    Returns:
        Observations in the layout of `without_mask`, and the components' masks side by side.

    Raises:
        ValueError: the mask is missing or has another shape.
        TypeError: it is not of bool or integers.
    """
    layout, shape = spec.single_observation_space, without_mask(spec, action_mask).shape
    if not isinstance(observations, Mapping) and is_flat(observations, layout):
        rest, mask = _split_columns(jnp.asarray(observations), _parts(spec), action_mask)
        return rest if shape is None else rest.reshape(rest.shape[0], *shape), mask != 0
    if not isinstance(observations, Mapping):
        emulated = {
            "observation_dtype": layout.sample_dtype,
            "emulated_observation_dtype": layout.structured,
        }
        fields = nativize_tensor(observations, nativize_dtype(emulated))
        observations = cast(Mapping[str, PyTree], fields)
    if action_mask not in observations:
        raise ValueError(
            f"observations without the mask {action_mask!r}; got {', '.join(observations)}"
        )
    rest = {name: leaf for name, leaf in observations.items() if name != action_mask}
    mask, sizes = jnp.asarray(observations[action_mask]), _sizes(spec)
    if mask.dtype.kind not in "biu":
        raise TypeError(
            f"the mask {action_mask!r} must be of bool or integers; got {mask.dtype} {mask.shape}"
        )
    if not mask.ndim or math.prod(mask.shape[1:]) != sum(sizes):
        raise ValueError(
            f"the mask {action_mask!r} must be (batch, {sum(sizes)}) for "
            f"{spec.single_action_space}; got {mask.shape}"
        )
    if shape is not None:
        (leaf,) = rest.values()
        rest = jnp.asarray(leaf).reshape(leaf.shape[0], *shape)
    return rest, mask.reshape(mask.shape[0], sum(sizes)) != 0


def legal(logits: PyTree, mask: Bool[ArrayLike, "batch actions"]) -> Array | tuple[Array, ...]:
    """The logits, those of illegal actions -inf.

    Where a component has no legal action, all are: so it is for agents that are absent, or whose
    turn it is not, and their logits stay numbers.

    Args:
        logits: of Discrete actions, an array, or of MultiDiscrete ones, a tuple.
        mask: the components' masks side by side.
    """
    parts = logits if isinstance(logits, tuple) else (logits,)
    ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
    masks = jnp.split(jnp.asarray(mask), ends, axis=-1)
    masks = tuple(part | ~part.any(-1, keepdims=True) for part in masks)
    masked = mask_logits(parts, masks)
    return masked if isinstance(logits, tuple) else masked[0]


def _text(dtype: np.dtype) -> str:
    return f"{dtype.base} {dtype.shape}"


def _parts(spec: spaces.EnvSpec) -> dict[str, np.dtype]:
    """The parts of a Dict observation; {} for any other."""
    dtype = spec.single_observation_space.structured
    if dtype is None or dtype.names is None:
        return {}
    return {name: dtype[name] for name in dtype.names}


def _sizes(spec: spaces.EnvSpec) -> tuple[int, ...]:
    """How many actions each component has."""
    match spec.single_action_space:
        case spaces.Discrete(n):
            return (n,)
        case spaces.MultiDiscrete(nvec):
            return nvec
        case other:
            raise ValueError(f"action_mask needs Discrete or MultiDiscrete actions; got {other}")


def _split_columns(
    leaves: Shaped[Array, "batch features"], parts: Mapping[str, np.dtype], action_mask: str
) -> tuple[Array, Array]:
    widths = [sum(map(math.prod, spaces.leaf_shapes(part))) for part in parts.values()]
    if leaves.shape[1:] != (sum(widths),):
        raise ValueError(
            f"observations of shape {leaves.shape} do not fit {', '.join(parts)}, which have "
            f"{sum(widths)} numbers"
        )
    place = [*parts].index(action_mask)
    start = sum(widths[:place])
    end = start + widths[place]
    return jnp.concatenate([leaves[:, :start], leaves[:, end:]], axis=1), leaves[:, start:end]
