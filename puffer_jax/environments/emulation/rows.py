"""Observations into rows, and actions out of them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from puffer_jax.base.spaces import Env, Space, children_of, kind_of
from puffer_jax.environments.emulation.spaces import Build

Sample = Any
"""An observation or action as an environment has it: a number, an array, or a dict or tuple."""


class _Leaf:
    """A space without parts, which tells whether NumPy can store a value of it as it is."""

    def __init__(self, space: Space):
        self.space = space
        self.dtype = np.dtype(getattr(space, "dtype", None) or np.int32)
        self._start, self._size = getattr(space, "start", 0), None
        match kind_of(space):
            case "discrete":
                self._size, self.shape = int(space.n), ()
            case "multidiscrete":
                self._size, self.shape = np.asarray(space.nvec), np.shape(space.nvec)
            case "multibinary":
                self._size, self.shape = 2, tuple(space.shape)
            case _:
                self.shape = tuple(space.shape)
        if self._size is not None and np.any(self._start + self._size > 2**31):
            raise ValueError(f"{space} does not fit in int32, the dtype that stores it")

    def takes(self, value: Sample, first: bool) -> bool:
        """Whether `value` has the shape and a dtype of the space and, if discrete, its range.

        Args:
            value: an array, a number or a list.
            first: whether to check the bounds of a Box as well.
        """
        if self._size is not None and not self.shape and isinstance(value, int | np.integer):
            return bool(0 <= value - self._start < self._size)
        array = np.asarray(value)
        if array.shape != self.shape:
            return False
        if self._size is not None:
            offset = array - self._start
            return array.dtype.kind in "biu" and bool(np.all((offset >= 0) & (offset < self._size)))
        casting = "safe" if hasattr(value, "dtype") else "same_kind"
        if not np.can_cast(array.dtype, self.dtype, casting):
            return False
        within = not first or (array >= self.space.low) & (array <= self.space.high)
        return bool(np.all(within))


class Writer:
    """Writes observations into the rows of a buffer.

    Two flat lists take an observation apart: one of its containers, each found by its key in an
    earlier one, and one of its leaves, each with the part of a row that it is copied to. The
    outermost container is a tuple around the observation, so that a bare leaf is found like others.
    """

    def __init__(self, env: Env, space: Space, observations: np.ndarray, structured: np.dtype):
        self._env, self._space = env, space
        self._containers: list[tuple[int, str | int, int]] = []
        self._unseen = set(range(len(observations)))  # rows not yet written to
        found: list[tuple[int, str | int, np.ndarray, _Leaf]] = []
        if kind_of(space) == "box":
            rows = observations
        else:
            rows = observations.view([("f0", structured)])["f0"][:, 0]
        self._find(space, 0, 0, rows, found)
        self._leaves = [
            [
                (p, key, leaf.dtype, leaf.shape, field[row, ...], leaf)
                for p, key, field, leaf in found
            ]
            for row in range(len(observations))
        ]
        # For an observation without parts: dtype, shape, and where each row lies.
        self._only = [leaves[0][2:5] for leaves in self._leaves] if not self._containers else []

    def _find(
        self, space: Space, parent: int, key: str | int, field: np.ndarray, found: list
    ) -> None:
        children = children_of(space)
        if children is None:
            found.append((parent, key, field, _Leaf(space)))
            return
        self._containers.append((parent, key, len(children)))
        position, is_dict = len(self._containers), isinstance(space.spaces, Mapping)
        for i, (name, child) in enumerate(children.items()):
            self._find(child, position, name if is_dict else i, field[name], found)

    def write(self, row: int, observation: Sample) -> None:
        """Copy the observation to its row.

        Raises:
            ValueError: it is not in its space.
        """
        array = np.ndarray
        if self._only and not self._unseen:
            dtype, shape, target = self._only[row]
            if (
                type(observation) is array
                and observation.dtype is dtype
                and observation.shape == shape
            ):
                target[()] = observation
                return
        parts: list[Sample] = [(observation,)]
        first = bool(self._unseen) and row in self._unseen
        try:
            for parent, key, size in self._containers:
                part = parts[parent][key]
                if len(part) != size:
                    raise ValueError(f"{len(part)} parts instead of {size}")
                parts.append(part)
            for parent, key, dtype, shape, target, leaf in self._leaves[row]:
                value = parts[parent][key]
                exact = type(value) is array and value.dtype == dtype and value.shape == shape
                if (first or not exact) and not leaf.takes(value, first):
                    raise ValueError(f"{_form(value)} instead of {leaf.space}")
                target[()] = value
        except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{self._env}: an observation is not in {self._space} ({error}): "
                + _describe(observation)
            ) from error
        if first:
            self._unseen.remove(row)


class Reader:
    """Makes the environment's own actions from flat ones.

    The reference instead reads nested int64 actions as pairs of int32, flattens a Box of two
    dimensions, and hands out views of a buffer that the vecenv writes to again.
    """

    def __init__(self, env: Env, flat: Space, build: Build | None):
        self._env, self._space, self._kind = env, flat, kind_of(flat)
        self._shape = shape = tuple(flat.shape)
        self._shapes = ((1, *shape), shape)
        self._dtype = dtype = np.dtype(flat.dtype if self._kind == "box" else np.int32)
        self._checked = False
        # An array that was found valid: vecenvs hand out the same one again and again.
        self._known, self._is_one = np.empty(0), False
        self._scalar = self._kind == "discrete" and build is None
        self._own: Callable[[np.ndarray], Sample]  # of a valid array
        if build is not None:
            self._own = lambda array: build(array.ravel().tolist())
        elif self._scalar:
            self._own = lambda array: array[0] if array.ndim else array[()]
        else:
            self._own = lambda array: array.reshape(shape).astype(dtype)

    def read(self, action: Sample) -> Sample:
        """The action of one agent, which the environment may keep.

        Args:
            action: an array or what becomes one, also with a leading axis of 1.

        Raises:
            ValueError: it has another shape or a dtype that needs rounding; or it is the first one
                and out of bounds.
        """
        if action is self._known:
            return action[0] if self._is_one else self._own(action)
        array = np.asarray(action)
        if array.shape not in self._shapes:
            raise self._outside(action)
        if not self._checked or array.dtype != self._dtype:
            self._check(array, action)
        if array is action:
            self._known, self._is_one = array, self._scalar and array.ndim == 1
        return self._own(array)

    def read_all(self, actions: np.ndarray) -> list[Sample]:
        """The same for several agents, (agents, *shape)."""
        if actions.shape[1:] != self._shape:
            raise self._outside(actions)
        if not self._checked or actions.dtype != self._dtype:
            self._check(actions, actions)
        return list(actions) if self._scalar else [self._own(action) for action in actions]

    def _check(self, array: np.ndarray, action: Sample) -> None:
        if not np.can_cast(array.dtype, self._dtype, "same_kind"):
            raise self._outside(action)
        if not self._checked:
            match self._kind:
                case "discrete":
                    low, high = 0, self._space.n - 1
                case "multidiscrete":
                    low, high = 0, self._space.nvec - 1
                case _:
                    low, high = self._space.low, self._space.high
            if not np.all((low <= array) & (array <= high)):
                raise self._outside(action)
            self._checked = True

    def _outside(self, action: Sample) -> ValueError:
        return ValueError(f"{self._env}: an action is not in {self._space}: {_describe(action)}")


def _form(value: Sample) -> str:
    """The shapes and dtypes in a value."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_form(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_form, value)) + ")"
    if hasattr(value, "dtype"):
        return f"{value.dtype} of shape {value.shape}"
    return type(value).__name__


def _describe(value: Sample) -> str:
    """Its form, and its beginning."""
    return f"{_form(value)}, {value!r:.200}"
