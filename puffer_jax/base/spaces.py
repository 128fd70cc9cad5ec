"""What a policy needs to know about an environment's spaces.

Spaces are recognised by their attributes, not by their class, so those of gymnasium,
gymnax and PufferLib all work, and so do the small frozen ones below, which are
hashable and can therefore be a policy's static attributes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Space = Any
"""A space of gymnasium, gymnax, PufferLib or this module, recognised by its attributes."""

Env = Any
"""An environment, also recognised by its attributes: `env_spec` says which."""

Kind = Literal["dict", "tuple", "multidiscrete", "multibinary", "discrete", "box"]


def kind_of(space: Space) -> Kind:
    """Which kind of space this is, by its attributes `spaces`, `nvec`, `n`, `low`/`shape`.

    Raises:
        TypeError: it has none of them, or is a gymnasium OneOf, whose samples have one part only.
    """
    if type(space).__name__ == "OneOf":
        raise TypeError(f"unsupported space {space!r}: its samples have no fixed layout")
    if getattr(space, "spaces", None) is not None:
        return "dict" if isinstance(space.spaces, Mapping) else "tuple"
    if hasattr(space, "nvec"):
        return "multidiscrete"
    shape = getattr(space, "shape", None)
    if hasattr(space, "n"):
        return "multibinary" if shape else "discrete"
    if shape is not None and hasattr(space, "low"):
        return "box"
    raise TypeError(
        f"unsupported space {space!r}: it has none of `spaces` (Dict, Tuple), `nvec` "
        "(MultiDiscrete), `n` (Discrete, MultiBinary), `low`/`high`/`shape` (Box)"
    )


def children_of(space: Space) -> dict[str, Space] | None:
    """The subspaces of a Dict or Tuple space by field name (f0, f1, ...); None for a leaf.

    Raises:
        ValueError: it is empty or has keys that cannot name a field of a struct.
    """
    kind = kind_of(space)
    if kind not in ("dict", "tuple"):
        return None
    spaces = space.spaces if kind == "dict" else {f"f{i}": s for i, s in enumerate(space.spaces)}
    if not spaces or not all(isinstance(key, str) and key for key in spaces):
        raise ValueError(f"a Dict or Tuple space needs non-empty string keys, got {list(spaces)}")
    return dict(spaces)


def structured_dtype(space: Space) -> np.dtype:
    """The NumPy dtype of one observation of `space` (`pufferlib.emulation.dtype_from_space`).

    Returns:
        An aligned struct for Dict and Tuple (fields f0, f1, ...), otherwise the leaf dtype with its
        shape. Discrete and MultiDiscrete are stored as int32, whatever dtype they declare.

    Raises:
        ValueError: a Dict or Tuple is empty or has keys that cannot name a field.
        TypeError: the space is of another kind.
    """
    children = children_of(space)
    if children is not None:
        return np.dtype([(k, structured_dtype(sub)) for k, sub in children.items()], align=True)
    match kind_of(space):
        case "discrete":
            return np.dtype(np.int32)
        case "multidiscrete":
            return np.dtype((np.int32, np.shape(space.nvec)))
        case _:
            return np.dtype((np.dtype(space.dtype), tuple(space.shape)))


def _leaf_spaces(space: Space) -> list[Space]:
    children = children_of(space)
    if children is None:
        return [space]
    return [leaf for subspace in children.values() for leaf in _leaf_spaces(subspace)]


def emulated_dtypes(space: Space) -> tuple[np.dtype, np.dtype]:
    """Dtype of the flat rows, and of one observation (`emulation.emulate_observation_space`).

    The rows have the dtype that all leaves declare, if they agree, otherwise uint8. The reference
    also takes int64 where Discrete leaves declare it and store int32, and then cannot read (or, for
    an odd number of them, not even allocate) its rows; here those are uint8.

    Returns:
        (sample dtype, structured dtype): "observation_dtype" and "emulated_observation_dtype" of
        `nativize_dtype`.

    Raises:
        ValueError: As in `structured_dtype`.
        TypeError: As in `structured_dtype`.
    """
    leaves = _leaf_spaces(space)
    stored = {structured_dtype(leaf).base for leaf in leaves}
    declared = {np.dtype(getattr(leaf, "dtype", None) or np.int32) for leaf in leaves}
    sample = declared.pop()
    readable = not declared and (sample.itemsize == 1 or stored == {sample})
    return sample if readable else np.dtype(np.uint8), structured_dtype(space)


def row_dtypes(space: Space) -> tuple[np.dtype, np.dtype]:
    """Dtypes of the rows that emulation makes, and of one observation.

    Those of `emulated_dtypes`, except that a Discrete or MultiDiscrete that stands alone is its
    numbers, int32, whatever it declares: a policy then reads the same from an environment with and
    without emulation, and its weights have the same shapes. (The reference has no row at all for a
    Discrete of int64, and bytes for one of int8.)

    Raises:
        ValueError: As in `structured_dtype`.
        TypeError: As in `structured_dtype`.
    """
    sample, structured = emulated_dtypes(space)
    is_number = kind_of(space) in ("discrete", "multidiscrete")
    return structured.base if is_number else sample, structured


@dataclass(frozen=True)
class Discrete:
    """Actions 0 .. n-1."""

    n: int


@dataclass(frozen=True)
class MultiDiscrete:
    """One discrete action per component."""

    nvec: tuple[int, ...]


@dataclass(frozen=True)
class Continuous:
    """A vector of `shape[0]` real actions (a one-dimensional Box)."""

    shape: tuple[int]


Action = Discrete | MultiDiscrete | Continuous


@dataclass(frozen=True)
class Observation:
    """The layout of one observation.

    Attributes:
        shape: shape of the array that the environment hands out; None if it is not known.
        structured: dtype with the fields of a Dict or Tuple observation; None for a plain array.
        sample_dtype: dtype of the flat array that an emulated environment packs the
            structure into; None if the observation is not packed.
    """

    shape: tuple[int, ...] | None
    structured: np.dtype | None = None
    sample_dtype: np.dtype | None = None

    @property
    def features(self) -> int:
        """How many numbers a policy reads from one observation."""
        if self.structured is not None:
            return sum(int(np.prod(shape)) for shape in leaf_shapes(self.structured))
        if self.shape is None:
            raise ValueError("the shape of the observation is not known; give the policy an env")
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class EnvSpec:
    """The two facts that a policy takes from an environment; it serves wherever an `env` does."""

    single_observation_space: Observation
    single_action_space: Action


def leaf_shapes(structured: np.dtype) -> list[tuple[int, ...]]:
    """Shapes of the leaves of a structured dtype, in field order; () for a scalar."""
    if structured.names is None:
        return [structured.shape]
    return [shape for name in structured.names for shape in leaf_shapes(structured[name])]


def env_spec(env: Env) -> EnvSpec:
    """Read what a policy needs from `env`.

    Args:
        env: has `single_observation_space`/`single_action_space` (PufferLib, gymnasium
            vector environments) or `observation_space`/`action_space` (gymnasium). Apart
            from these, only `emulated` is read, which says how PufferLib packs Dict
            observations into one flat array.

    Raises:
        AttributeError: `env` has neither pair of names.
        TypeError: an attribute is not a space.
        ValueError: an action space no policy supports (a Box that is not
            one-dimensional, a MultiDiscrete with a nested `nvec`).
    """
    return EnvSpec(_observation(env), _action(_space(env, "action_space")))


def _space(env: Env, name: str) -> Space:
    for attribute in (f"single_{name}", name):
        space = getattr(env, attribute, None)
        if space is not None:
            if callable(space) and not hasattr(space, "shape"):
                raise TypeError(
                    f"{type(env).__name__}.{attribute} is a method; give the policy an object "
                    f"whose `{attribute}` is the space itself, such as "
                    "types.SimpleNamespace(observation_space=..., action_space=...)"
                )
            return space
    raise AttributeError(f"{type(env).__name__} has neither `single_{name}` nor `{name}`")


def _observation(env: Env) -> Observation:
    space = _space(env, "observation_space")
    if isinstance(space, Observation):
        return space
    emulated = getattr(env, "emulated", None)
    if isinstance(emulated, Mapping) and not _is_tuple(emulated["emulated_observation_dtype"]):
        structured = np.dtype(emulated["emulated_observation_dtype"])
        if structured.names is not None:
            sample_dtype = np.dtype(emulated["observation_dtype"])
            return Observation(tuple(space.shape), structured, sample_dtype)
    match kind_of(space):
        case "dict" | "tuple":
            return Observation(None, structured_dtype(space))
        case "multidiscrete":
            return Observation(np.shape(space.nvec))
        case "discrete":
            return Observation(())
        case _:
            return Observation(tuple(int(size) for size in space.shape))


def _is_tuple(structured: np.dtype) -> bool:
    # Quirk kept: the reference unpacks a Dict but lets a policy see the raw bytes of a Tuple, and
    # the sizes in its checkpoints follow from that.
    names = np.dtype(structured).names
    return names is not None and names == tuple(f"f{i}" for i in range(len(names)))


def _action(space: Space) -> Action:
    if isinstance(space, Action):
        return space
    kind = kind_of(space)
    if kind == "discrete":
        return Discrete(int(space.n))
    if kind == "multidiscrete" and np.ndim(space.nvec) == 1:
        return MultiDiscrete(tuple(int(n) for n in space.nvec))
    if kind == "box" and len(space.shape) == 1:
        return Continuous((int(space.shape[0]),))
    raise ValueError(
        "policies act in Discrete, MultiDiscrete (one-dimensional nvec) and Box "
        f"(one-dimensional) spaces; got {space!r}"
    )


@dataclass(frozen=True)
class Box:
    """A space of real arrays; `low` and `high` are numbers or (nested) tuples that broadcast."""

    low: Any
    high: Any
    shape: tuple[int, ...]
    dtype: Any = np.float32


@dataclass(frozen=True)
class Dict:
    """A space of dicts of arrays."""

    spaces: Mapping[str, Space]
