"""Which observations JAX can hold: without `jax_enable_x64` its integers have 32 bits, and wrap."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import jax
import numpy as np

from puffer_jax.base.spaces import Env, Observation, Space, children_of, kind_of


def check_widths(env: Env) -> None:
    """Check that every integer in the bounds of the observation space keeps its value.

    Args:
        env: as for a policy. Of an emulated one, the space of what it emulates is looked at.

    Raises:
        ValueError: the bounds of an integer part are beyond 32 bits, and x64 is off.
    """
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return
    space = _observed(env)
    wide = [] if space is None else [f"{path}{leaf}" for path, leaf in _wide(space, "")]
    if wide:
        raise ValueError(
            f"{type(env).__name__} has observations beyond 32 bits, {'; '.join(wide)}, which would "
            "wrap: JAX has no integers of 64 bits unless jax_enable_x64 is on. Turn it on, declare "
            "the bounds that the numbers really keep, or make them floats"
        )


def _observed(env: Env) -> Space | None:
    """The space of the observations as the environment itself makes them; None if not known."""
    space = getattr(env, "single_observation_space", None)
    space = getattr(env, "observation_space", None) if space is None else space
    emulated = getattr(env, "emulated", None)
    if isinstance(emulated, Mapping):
        if np.dtype(emulated["observation_dtype"]).itemsize == 1 and _is_tuple(emulated):
            return None  # a policy sees its bytes
        inner = getattr(env, "env", SimpleNamespace())
        space = getattr(inner, "observation_space", None)
        if callable(space) and not hasattr(space, "shape"):  # PettingZoo's, by agent
            space = space(inner.possible_agents[0])
    return None if isinstance(space, Observation) or callable(space) else space


def _is_tuple(emulated: Mapping[str, object]) -> bool:
    names = np.dtype(emulated["emulated_observation_dtype"]).names or ()  # type: ignore[reportArgumentType]
    return names[:1] == ("f0",)


def _wide(space: Space, path: str) -> Iterator[tuple[str, Space]]:
    children = children_of(space)
    if children is not None:
        for name, child in children.items():
            yield from _wide(child, f"{path}{name}: ")
        return
    limits = np.iinfo(np.int32)
    match kind_of(space):
        case "discrete" | "multidiscrete":
            start = np.asarray(getattr(space, "start", 0), object)
            sizes = np.asarray(getattr(space, "nvec", getattr(space, "n", None)), object)
            low, high = start, start + sizes - 1
        case "box" if np.dtype(space.dtype) in (np.int64, np.uint64):
            if np.dtype(space.dtype) == np.uint64:
                limits = np.iinfo(np.uint32)
            low, high = space.low, space.high
        case _:
            return
    if np.min(low) < limits.min or np.max(high) > limits.max:
        yield path, space
