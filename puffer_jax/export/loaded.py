"""A step that was read from a file."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from puffer_jax.export.step import named


class LoadedStep:
    """A step from a file: (observations, state) -> (logits or action, values, state).

    Args:
        exported: the program; its arguments are a tree of observations and a tree of states.

    Attributes:
        exported: see above.
        observations: shapes (batch, *obs) and dtypes, as a tree of `jax.ShapeDtypeStruct`.
        state: those of the state, (batch, ...); None for a policy without memory.
        batch: how many rows it takes; None: any number.
        platforms: what it can be compiled for: "cpu", "cuda", "tpu".

    Raises:
        ValueError: the program has other arguments, or a result of another form.
    """

    def __init__(self, exported: jax.export.Exported):
        arguments, options = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        results = exported.out_tree.num_leaves and jax.tree.unflatten(
            exported.out_tree, exported.out_avals
        )
        if len(arguments) != 2 or options or not isinstance(results, tuple) or len(results) != 3:
            raise ValueError(
                "the file holds no step: expected a function of (observations, state) with three "
                f"results, got {exported.fun_name} of {len(arguments)} arguments"
            )
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
        self.exported = exported
        self.observations, self.state = jax.tree.map(like, arguments)
        self.platforms = tuple(exported.platforms)
        rows = exported.in_avals[0].shape[0]
        self.batch = rows if isinstance(rows, int) else None
        self._call = jax.jit(exported.call)

    def initial_state(self, batch_size: int) -> PyTree:
        """The zero state of a new episode for `batch_size` agents; None without memory."""
        return jax.tree.map(lambda x: jnp.zeros((batch_size, *x.shape[1:]), x.dtype), self.state)

    def __call__(self, observations: PyTree, state: PyTree = None) -> tuple[PyTree, PyTree, PyTree]:
        """One step.

        Args:
            observations: a tree of arrays (batch, *obs), as `self.observations`.
            state: from the step before; None is the zero state.

        Returns:
            logits or action, values (batch, 1), the new state.

        Raises:
            ValueError: an array has another shape, or there are others.
            TypeError: an array has another dtype; floating ones of other widths are converted.
        """
        observations = _fitting(self.observations, observations, "observations")
        if state is None:
            state = self.initial_state(len(jax.tree.leaves(observations)[0]))
        return self._call(observations, _fitting(self.state, state, "state"))


def _fitting(expected: PyTree, given: PyTree, name: str) -> PyTree:
    """The given arrays in the expected dtypes."""
    if jax.tree.structure(expected) != jax.tree.structure(given):
        names = ", ".join(named(expected, name)) or f"{name}=None"
        raise ValueError(f"expected {names}; got {', '.join(named(given, name)) or None}")
    wanted, arrays = named(expected, name), named(given, name)
    batch = {np.shape(x)[:1] for x in arrays.values()}
    for key, array in arrays.items():
        (rows, *shape), like = wanted[key].shape, wanted[key]
        fits = list(np.shape(array)[1:]) == shape and len(batch) == 1 and np.ndim(array)
        if not fits or (isinstance(rows, int) and np.shape(array)[0] != rows):
            raise ValueError(f"{key} has shape {np.shape(array)}; expected {like.shape}")
        kind = jnp.result_type(array)
        if kind != like.dtype and not _both_floating(kind, like.dtype):
            raise TypeError(f"{key} is of {kind}; expected {like.dtype}")
    return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), given, expected)


def _both_floating(a: Any, b: Any) -> bool:
    return bool(jnp.issubdtype(a, jnp.floating) and jnp.issubdtype(b, jnp.floating))
