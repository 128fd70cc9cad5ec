"""Kernels of random numbers.

A key is two words of threefry. With two more, `first` and `total`, the rows are those from `first`
on of `total` ones that are drawn together.
"""

import jax
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from puffer_jax.kernels.cpu.native import call


def threefry(keys: UInt32[Array, "*batch words"], count: int) -> UInt32[Array, "*batch count 2"]:
    """Threefry-2x32 of the counters 0 to `count` - 1: what `jax.random` makes its numbers from."""
    result = jax.ShapeDtypeStruct((*keys.shape[:-1], count, 2), np.uint32)
    call = jax.ffi.ffi_call("puffer_jax_threefry_float32", result, vmap_method="broadcast_all")
    return call(keys)


def categorical(
    keys: UInt32[Array, "*batch words"], logits: Float[Array, "*batch rows n"]
) -> Int32[Array, "*batch rows"]:
    """`jax.random.categorical(key, logits, mode="high")` for threefry keys."""
    result = jax.ShapeDtypeStruct(logits.shape[:-1], np.int32)
    return call("puffer_jax_categorical", result, keys, logits, vmap_method="broadcast_all")


def sample(
    key: UInt32[Array, "*batch words"], logits: Float[Array, "*batch rows n"], component: int
) -> tuple[Int32[Array, "*batch rows"], Float[Array, "*batch rows"], Float[Array, "*batch rows"]]:
    """Actions, log-probabilities and entropies of `puffer_jax.sample_logits`; no derivatives.

    Args:
        key: one of threefry.
        logits: of one component of the action.
        component: its index, also that of its key among those that `key` is split into.
    """
    dtypes = np.int32, logits.dtype, logits.dtype
    return call(
        "puffer_jax_sample",
        tuple(jax.ShapeDtypeStruct(logits.shape[:-1], dtype) for dtype in dtypes),
        *(key, logits),
        vmap_method="broadcast_all",
        component=np.int64(component),
    )
