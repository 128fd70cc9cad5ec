"""Flat spaces for structured ones, and what reads and writes them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from puffer_jax.base.packages import require
from puffer_jax.base.spaces import Space, children_of, kind_of, row_dtypes

Build = Callable[[list[int]], Any]
"""Builds an environment's own action from the components of a flat one."""


def import_gymnasium() -> Any:
    """The package gymnasium.

    Raises:
        ImportError: it is not installed.
    """
    return require("gymnasium", "emulation", "'puffer_jax[vector]'")


def gymnasium_space(space: Space) -> Space:
    """Gymnasium's space for any space; its parts are in the same order.

    Raises:
        TypeError: the space is not supported.
    """
    spaces = import_gymnasium().spaces
    match kind_of(space):
        case "dict":
            parts = {name: gymnasium_space(part) for name, part in space.spaces.items()}
            return spaces.Dict(OrderedDict(parts))  # it would sort a plain dict
        case "tuple":
            return spaces.Tuple([gymnasium_space(part) for part in space.spaces])
        case "discrete":
            return spaces.Discrete(int(space.n))
        case "multidiscrete":
            return spaces.MultiDiscrete(np.asarray(space.nvec))
        case "multibinary":
            return spaces.MultiBinary(space.shape)
        case "box":
            low, high = (
                np.broadcast_to(np.asarray(bound, space.dtype), space.shape)
                for bound in (space.low, space.high)
            )
            return spaces.Box(low, high, dtype=np.dtype(space.dtype).type)


def emulate_observation_space(space: Space) -> tuple[Space, np.dtype]:
    """The Box of the rows that stand for observations of `space`, and the struct in a row.

    Returns:
        (`space` itself if it is a Box, otherwise a flat Box; the dtype of one observation).

    Raises:
        TypeError: the space is not supported.
        ValueError: a Dict or Tuple has no parts, or keys that cannot name a field.
    """
    sample, structured = row_dtypes(space)
    if kind_of(space) == "box":
        return space, structured
    if sample.kind == "b":
        low, high = False, True
    else:
        # gymnasium warns about the bounds of float64.
        floats = sample if sample.itemsize < 4 else np.float32
        info = np.iinfo(sample) if sample.kind in "iu" else np.finfo(floats)
        kind = int if sample.kind in "iu" else float
        low, high = kind(info.min), kind(info.max)
    shape = (structured.itemsize // sample.itemsize,)
    return import_gymnasium().spaces.Box(low, high, shape, sample), structured


def emulate_action_space(space: Space) -> tuple[Space, Build | None]:
    """The flat space of actions that stand for those of `space`, and how to build the latter.

    Unlike in the reference, parts may be MultiDiscrete and MultiBinary, and a Discrete or
    MultiDiscrete need not start at 0: the flat actions always do.

    Returns:
        (`space` itself, None) for a Box, and for what a policy can act in as it is; otherwise a
        Discrete or MultiDiscrete, and a function of the list of its components.

    Raises:
        TypeError: the space is not supported.
        ValueError: there is a Box within a Dict or Tuple; or as in `emulate_observation_space`.
    """
    kind = kind_of(space)
    starts_at_0 = not np.any(getattr(space, "start", 0))
    flat = kind == "discrete" or (kind == "multidiscrete" and np.ndim(space.nvec) == 1)
    if kind == "box" or (flat and starts_at_0):
        return space, None
    sizes: list[int] = []
    build = _builder(space, sizes)
    spaces = import_gymnasium().spaces
    return spaces.Discrete(sizes[0]) if kind == "discrete" else spaces.MultiDiscrete(sizes), build


def _builder(space: Space, sizes: list[int]) -> Build:
    """How to build an action of `space` from components, whose sizes are appended to `sizes`."""
    children = children_of(space)
    if children is not None:
        parts = [(key, _builder(child, sizes)) for key, child in children.items()]
        if isinstance(space.spaces, Mapping):
            return lambda flat: {key: part(flat) for key, part in parts}
        return lambda flat: tuple([part(flat) for _, part in parts])
    first, start = len(sizes), getattr(space, "start", 0)
    match kind_of(space):
        case "discrete":
            sizes.append(int(space.n))
            start = int(start)
            return lambda flat: start + flat[first]
        case "multidiscrete":
            nvec = np.asarray(space.nvec)
        case "multibinary":
            nvec = np.full(space.shape, 2)
        case _:
            raise ValueError(f"a nested action space cannot hold {space}, only discrete ones")
    sizes.extend(nvec.ravel().tolist())
    last, shape, dtype = len(sizes), nvec.shape, space.dtype
    return lambda flat: np.array(flat[first:last], dtype).reshape(shape) + start


def joint_space(space: Space, n: int) -> Space:
    """The space of `n` agents side by side (`pufferlib.spaces.joint_space`).

    Raises:
        ValueError: `space` is not Discrete, MultiDiscrete or Box.
    """
    spaces, start = import_gymnasium().spaces, getattr(space, "start", 0)
    match kind_of(space):
        case "discrete":
            return spaces.MultiDiscrete([space.n] * n, start=[start] * n)
        case "multidiscrete":
            low = start + np.zeros_like(space.nvec)
            high = low + space.nvec - 1
        case "box":
            low, high = space.low, space.high
        case _:
            raise ValueError(f"agents act and observe in Discrete, MultiDiscrete or Box: {space}")
    low, high = (np.repeat(bound[None], n, axis=0) for bound in (low, high))
    return spaces.Box(low, high, dtype=space.dtype)
