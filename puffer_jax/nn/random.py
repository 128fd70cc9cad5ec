"""The numbers of `jax.random`, the same ones, several times faster on CPUs.

XLA:CPU runs threefry, JAX's default generator, as loops of small steps, and takes its logarithms
one by one. Here `puffer_jax.kernels.cpu` does both where it serves; all else is left to JAX.
"""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from puffer_jax.kernels import cpu
from puffer_jax.kernels.cpu import library

_THREEFRY = "threefry2x32"

_COUNTERS = 2**32  # JAX's have 64 bits, the kernels' 32


def split(key: PRNGKeyArray, num: int | tuple[int, ...] = 2) -> Array:
    """`jax.random.split`."""
    keys = jax.random.split(fast(key), num)
    if keys.dtype == key.dtype:
        return keys
    data = jax.random.key_data(keys)
    return _plain(data) if _is_typed(key) else data


def fast(key: PRNGKeyArray) -> Array:
    """A key with which `jax.random` draws the same numbers, faster; `key` where there is none.

    It has a dtype of its own, which JAX does not mix with others: for use at once, not to be
    handed out.
    """
    if not _is_served(key):
        return key
    return jax.random.wrap_key_data(data_of(key), impl=_implementation())


def categorical(key: PRNGKeyArray, logits: Float[Array, "batch n"]) -> Int32[Array, "batch"]:
    """`jax.random.categorical(key, logits, mode="high")`, but for rounding; a constant to `grad`.

    The default mode's float32 Gumbel noise ends at 16: it draws an action of probability 1e-7
    half as often as it should and one of 1e-9 never; "high" is right to about 1e-14.
    """

    def by_jax(key: Array, logits: Array) -> Array:
        return jax.random.categorical(key, logits, mode="high").astype(jnp.int32)

    logits = jax.lax.stop_gradient(logits)
    if not serves(key, logits):
        return by_jax(key, logits)
    return jax.lax.platform_dependent(
        key, logits, cpu=lambda key, x: cpu.categorical(data_of(key), x), default=by_jax
    )


def serves(key: PRNGKeyArray, logits: Float[Array, "batch n"]) -> bool:
    """Whether there are kernels to draw with this key from these logits."""
    return _is_served(key) and library.serves(logits) and 2 * logits.size < _COUNTERS


def _is_typed(key: Array) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def data_of(key: Array) -> Array:
    """The words of a key, typed or not."""
    return jax.random.key_data(key) if _is_typed(key) else jnp.asarray(key)


def _plain(data: Array) -> Array:
    return jax.random.wrap_key_data(data, impl=_THREEFRY)


def _is_served(key: Array) -> bool:
    typed = key if _is_typed(key) else jax.random.wrap_key_data(key)
    # Without it the numbers have other counters.
    partitionable = getattr(jax.config, "jax_threefry_partitionable", True)
    return jax.random.key_impl(typed) == _THREEFRY and partitionable and library.at_hand("float32")


def _pairs(data: Array, shape: tuple[int, ...]) -> Array:
    """Threefry of 0, 1, 2, ... in this shape, (*shape, 2)."""
    count = math.prod(shape)

    def by_us(data: Array) -> Array:
        return cpu.threefry(data, count).reshape(*shape, 2)

    def by_jax(data: Array) -> Array:
        return jax.random.key_data(jax.random.split(_plain(data), shape))

    if not 0 < count < _COUNTERS:
        return by_jax(data)
    return jax.lax.platform_dependent(data, cpu=by_us, default=by_jax)


def _bits(data: Array, width: int, shape: tuple[int, ...]) -> Array:
    pairs = _pairs(data, shape)
    high, low = pairs[..., 0], pairs[..., 1]
    if width == 64:
        return high.astype(jnp.uint64) << 32 | low.astype(jnp.uint64)
    return (high ^ low).astype(f"uint{width}")


@cache
def _implementation() -> Any:
    words_of = jax.random.key_data
    return define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: words_of(jax.random.key(seed, impl=_THREEFRY)),
        split=_pairs,
        random_bits=_bits,
        fold_in=lambda data, number: words_of(jax.random.fold_in(_plain(data), number)),
        name="puffer_jax_threefry2x32",
        tag="puf",
    )
