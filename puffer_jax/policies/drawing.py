"""Random observations, to run a policy on."""

from collections.abc import Mapping
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from puffer_jax.base import spaces

# A bound beyond this counts as none: CartPole's are 3e38, where any network overflows.
LARGE = 1e6


def draw(space: spaces.Space, kind: str, count: int, rng: np.random.Generator) -> PyTree:
    """`count` observations of a space, (count, *shape), in the form of the space.

    Args:
        space: with its bounds.
        kind: "lowest", "highest", "zero", or anything else for random ones.
        count: how many.
        rng: of the random ones.
    """
    match spaces.kind_of(space):
        case "dict":
            return {key: draw(sub, kind, count, rng) for key, sub in space.spaces.items()}
        case "tuple":
            return tuple(draw(sub, kind, count, rng) for sub in space.spaces)
        case "discrete" | "multidiscrete":
            low = np.asarray(getattr(space, "start", 0))
            high = low + np.asarray(getattr(space, "nvec", getattr(space, "n", None))) - 1
            shape, dtype = high.shape, np.dtype(np.int32)
        case "multibinary":
            low, high, shape, dtype = 0, 1, tuple(space.shape), np.dtype(space.dtype)
        case "box":
            low, high, shape = space.low, space.high, tuple(space.shape)
            dtype = np.dtype(space.dtype)
    low, high = (np.clip(np.asarray(x, np.float64), -LARGE, LARGE) for x in (low, high))
    # Where there is no bound, a window near zero.
    width = np.where(high - low < LARGE, high - low, 2.0)
    start = np.clip(-1.0, low, high - width)
    steps = not jnp.issubdtype(dtype, jnp.floating)
    random = start + rng.random((count, *shape)) * (width + steps)
    random = np.minimum(np.floor(random), high) if steps else random
    values = {"lowest": low, "highest": high, "zero": np.clip(0.0, low, high)}.get(kind, random)
    return np.broadcast_to(values, (count, *shape)).astype(dtype)


def draw_packed(
    structured: np.dtype, sample: np.dtype, kind: str, count: int, rng: np.random.Generator
) -> np.ndarray:
    """As `draw`, rows (count, width) of `sample` as emulation packs them."""
    packed = np.zeros(count, structured)
    _fill(packed, draw(unbounded(structured), kind, count, rng))
    return packed.view(sample).reshape(count, -1)


def unbounded(dtype: np.dtype) -> SimpleNamespace:
    """A structured dtype as a space; what its leaves may hold is a guess."""
    if dtype.names is not None:
        return SimpleNamespace(spaces={name: unbounded(dtype[name]) for name in dtype.names})
    low, high = -np.inf, np.inf
    if not jnp.issubdtype(dtype.base, jnp.floating):
        small = dtype.base.itemsize < 4 and dtype.base != np.bool_
        low, high = (np.iinfo(dtype.base).min, np.iinfo(dtype.base).max) if small else (0, 1)
    return SimpleNamespace(low=low, high=high, shape=dtype.shape, dtype=dtype.base)


def _fill(struct: np.ndarray, tree: Mapping[str, PyTree]) -> None:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            _fill(struct[name], value)
        else:
            struct[name] = value
