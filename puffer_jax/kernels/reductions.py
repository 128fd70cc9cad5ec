"""Reductions of several arrays at once.

On GPUs and TPUs each costs a launch or two however small its arrays are, so there they are joined.
"""

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from puffer_jax.kernels.choice import Kernel, Operation


def sums(arrays: Sequence[Float[Array, "..."]]) -> tuple[Float[Array, ""], ...]:
    """The sum of each array."""
    return tuple(_sums(*arrays))


def norm(arrays: Sequence[Float[Array, "..."]]) -> Float[Array, ""]:
    """The Euclidean norm of all arrays together."""
    return _norm(*arrays)


def first_nonfinite(arrays: Sequence[Float[Array, "..."]]) -> Int32[Array, ""]:
    """The index of the first array with a NaN or an infinity; if none has, their number."""
    return _first_nonfinite(*arrays)


def _sums_xla(*arrays: Array) -> tuple[Array, ...]:
    return tuple(x.sum() for x in arrays)


def _sums_joined(*arrays: Array) -> tuple[Array, ...]:
    totals = jnp.stack([x.reshape(-1) for x in arrays]).sum(axis=1)
    return tuple(totals[i] for i in range(len(arrays)))


def _sums_joined_takes(*arrays: Array) -> bool:
    return len({(x.size, x.dtype) for x in arrays}) == 1


def _norm_xla(*arrays: Array) -> Array:
    return jnp.sqrt(reduce(operator.add, [jnp.sum(x * x) for x in arrays]))


def _norm_joined(*arrays: Array) -> Array:
    joined = jnp.concatenate([x.reshape(-1) for x in arrays])
    return jnp.sqrt(jnp.sum(joined * joined))


def _norm_joined_takes(*arrays: Array) -> bool:
    return len({x.dtype for x in arrays}) == 1


def _first_nonfinite_xla(*arrays: Array) -> Array:
    bad = jnp.stack([~jnp.isfinite(x).all() for x in arrays])
    return jnp.where(bad.any(), bad.argmax(), len(arrays)).astype(jnp.int32)


def _first_nonfinite_joined(*arrays: Array) -> Array:
    dtype = jnp.result_type(*arrays)
    # The barrier: to reduce so many arrays as they are takes more registers than there are.
    joined = jax.lax.optimization_barrier(
        jnp.concatenate([x.reshape(-1).astype(dtype) for x in arrays])
    )
    # Positions, not marks for each array: XLA would take the minimum of each by itself.
    places = jnp.arange(joined.size, dtype=jnp.int32)
    first = jnp.where(jnp.isfinite(joined), jnp.int32(joined.size), places).min()
    ends = np.cumsum([x.size for x in arrays])
    return (first >= jnp.asarray(ends, jnp.int32)).sum(dtype=jnp.int32)


def _first_nonfinite_takes(*arrays: Array) -> bool:
    return sum(x.size for x in arrays) < 2**31


def _everywhere_but_on_cpus(joined: Any, takes: Any) -> dict[str, Kernel]:
    return {"gpu": Kernel(joined, takes), "tpu": Kernel(joined, takes)}


_sums = Operation(
    "sums", xla=_sums_xla, **_everywhere_but_on_cpus(_sums_joined, _sums_joined_takes)
)
_norm = Operation(
    "norm", xla=_norm_xla, **_everywhere_but_on_cpus(_norm_joined, _norm_joined_takes)
)
_first_nonfinite = Operation(
    "first_nonfinite",
    xla=_first_nonfinite_xla,
    **_everywhere_but_on_cpus(_first_nonfinite_joined, _first_nonfinite_takes),
)
