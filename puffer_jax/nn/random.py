"""The same numbers as those of `jax.random`, several times faster on CPUs.

XLA:CPU runs threefry, JAX's default generator, as loops of small steps, and takes its logarithms
one by one. `puffer_jax.kernels.random` has kernels for both; the rest is left to JAX.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from puffer_jax.kernels import random as kernels
from puffer_jax.kernels.random import THREEFRY, is_threefry, is_typed, threefry, words_of
from puffer_jax.kernels.random import Rows as Rows
from puffer_jax.kernels.random import gumbel as gumbel


def split(key: PRNGKeyArray, num: int | tuple[int, ...] = 2, rows: Rows | None = None) -> Array:
    """`jax.random.split`: keys (*num) of the key's own kind, typed or words.

    Args:
        key: typed or not, of any generator.
        num: how many.
        rows: which `num` of more keys; None: all.
    """
    if rows is None:
        keys = jax.random.split(fast(key), num)
        if keys.dtype == key.dtype:
            return keys
        words = words_of(keys)
    else:
        assert isinstance(num, int)  # rows are counted
        if not is_threefry(key):
            return rows.of(jax.random.split(key, rows.total), num)
        words = threefry(words_of(key), (num,), rows)
    return _typed(words) if is_typed(key) else words


def fast(key: PRNGKeyArray) -> Array:
    """A key with which `jax.random` draws the same numbers, faster; `key` itself if there is none.

    It has a dtype of its own, which JAX does not mix with others: use it at once and do not pass
    it on.
    """
    if is_threefry(key) and kernels.has_threefry_kernel(words_of(key)):
        return jax.random.wrap_key_data(words_of(key), impl=_implementation())
    return key


def categorical(
    key: PRNGKeyArray, logits: Float[Array, "batch n"], rows: Rows | None = None
) -> Int32[Array, "batch"]:
    """`jax.random.categorical(key, logits, mode="high")`, but for rounding; a constant to `grad`.

    The default mode's float32 Gumbel noise ends at 16: it draws an action of probability 1e-7
    half as often as it should and one of 1e-9 never; "high" is right to about 1e-14.

    With `rows`, these rows of a larger batch are drawn as they are in the whole.
    """
    return kernels.categorical(key, jax.lax.stop_gradient(logits), rows)


def normal(key: PRNGKeyArray, like: Array, rows: Rows | None = None) -> Array:
    """`jax.random.normal` in the shape and dtype of an array; `rows`: see `categorical`."""
    if rows is None:
        return jax.random.normal(fast(key), like.shape, like.dtype)
    whole = jax.random.normal(fast(key), (rows.total, *like.shape[1:]), like.dtype)
    return rows.of(whole, len(like))


def _typed(words: Array) -> Array:
    return jax.random.wrap_key_data(words, impl=THREEFRY)


def _bits(words: Array, width: int, shape: tuple[int, ...]) -> Array:
    pairs = threefry(words, shape)
    high, low = pairs[..., 0], pairs[..., 1]
    if width == 64:
        return high.astype(jnp.uint64) << 32 | low.astype(jnp.uint64)
    return (high ^ low).astype(f"uint{width}")


@cache
def _implementation() -> Any:
    return define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl=THREEFRY)),
        split=threefry,
        random_bits=_bits,
        fold_in=lambda words, number: jax.random.key_data(
            jax.random.fold_in(_typed(words), number)
        ),
        name="puffer_jax_threefry2x32",
        tag="puf",
    )
