"""Threefry, JAX's default generator of random numbers, and draws from logits with it."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.cpu import native

THREEFRY = "threefry2x32"

_COUNTERS = 2**32  # JAX's have 64 bits, the kernels' 32


@dataclass(frozen=True)
class Rows:
    """Some rows of a larger draw: who draws them alone gets what they are in the whole.

    A pytree, whose `total` is no leaf.

    Attributes:
        first: number of the first row, a scalar.
        total: how many rows the whole has.
    """

    first: Array
    total: int

    def of(self, whole: Array, count: int) -> Array:
        """Those `count` rows; XLA computes no others, where it makes the numbers itself."""
        return jax.lax.dynamic_slice_in_dim(whole, self.first, count)

    def after(self, words: Array) -> Array:
        """A key's words, and what the CPU kernels must know of the rows: (4,)."""
        return jnp.concatenate([words, jnp.stack([self.first, self.total]).astype(words.dtype)])


jax.tree_util.register_pytree_node(
    Rows, lambda rows: ((rows.first,), rows.total), lambda total, leaves: Rows(*leaves, total)
)


def is_typed(key: Array) -> bool:
    """Whether a key comes from `jax.random.key`, and is not the words of `jax.random.PRNGKey`."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def words_of(key: Array) -> Array:
    """The words of a key, typed or not."""
    return jax.random.key_data(key) if is_typed(key) else jnp.asarray(key)


def is_threefry(key: Array) -> bool:
    """Whether a key is one of threefry, with the counters that the kernels use."""
    typed = key if is_typed(key) else jax.random.wrap_key_data(key)
    partitionable = getattr(jax.config, "jax_threefry_partitionable", True)
    return jax.random.key_impl(typed) == THREEFRY and partitionable


def threefry(
    words: UInt32[Array, "2"], shape: tuple[int, ...], rows: Rows | None = None
) -> UInt32[Array, "..."]:
    """Threefry-2x32 of the counters 0, 1, 2, ... in this shape: (*shape, 2).

    Args:
        words: the key's.
        shape: that of the counters; with `rows` (count,).
        rows: which of the counters; None: all.
    """
    return _threefry(words, rows, shape=shape)


def has_threefry_kernel(words: UInt32[Array, "2"]) -> bool:
    """Whether `threefry` has a kernel for small shapes, and is not `jax.random.split`."""
    return bool(_threefry.kernels(words, None, shape=()))


def categorical(
    key: PRNGKeyArray, logits: Float[Array, "batch n"], rows: Rows | None = None
) -> Int32[Array, "batch"]:
    """`jax.random.categorical(key, logits, mode="high")`, but for rounding; no derivatives.

    Args:
        key: typed or not, of any generator.
        logits: those of each row.
        rows: which rows of a larger batch these are; None: all.
    """
    return _categorical(key, logits, rows)


def can_draw(key: PRNGKeyArray, logits: Float[Array, "batch n"], rows: Rows | None = None) -> bool:
    """Whether the CPU kernels can draw with this key from these logits."""
    count, n = logits.shape[-2:]
    counters = 2 * n * (count if rows is None else rows.total)
    return is_threefry(key) and native.takes(logits) and counters < _COUNTERS


def gumbel(key: PRNGKeyArray, logits: Array, rows: Rows | None = None) -> Array:
    """The noise that is added to logits (batch, n) to draw from them, as XLA computes it."""
    count, n = logits.shape
    total = count if rows is None else rows.total
    noise = jax.random.gumbel(key, (total, n), logits.dtype, mode="high")
    return noise if rows is None else rows.of(noise, count)


def _threefry_xla(words: Array, rows: Rows | None, *, shape: tuple[int, ...]) -> Array:
    key = jax.random.wrap_key_data(words, impl=THREEFRY)
    if rows is None:
        return jax.random.key_data(jax.random.split(key, shape))
    return rows.of(jax.random.key_data(jax.random.split(key, rows.total)), *shape)


def _threefry_cpu(words: Array, rows: Rows | None, *, shape: tuple[int, ...]) -> Array:
    words = words if rows is None else rows.after(words)
    return cpu.threefry(words, math.prod(shape)).reshape(*shape, 2)


def _threefry_cpu_takes(words: Array, rows: Rows | None, *, shape: tuple[int, ...]) -> bool:
    count = math.prod(shape) if rows is None else rows.total
    return 0 < count < _COUNTERS and native.is_available("float32")


def _categorical_xla(key: Array, logits: Array, rows: Rows | None) -> Array:
    if rows is None:
        return jax.random.categorical(key, logits, mode="high").astype(jnp.int32)
    return (gumbel(key, logits, rows) + logits).argmax(-1).astype(jnp.int32)


def _categorical_cpu(key: Array, logits: Array, rows: Rows | None) -> Array:
    words = words_of(key)
    return cpu.categorical(words if rows is None else rows.after(words), logits)


_threefry = Operation(
    "threefry", xla=_threefry_xla, cpu=Kernel(_threefry_cpu, takes=_threefry_cpu_takes)
)

_categorical = Operation(
    "categorical", xla=_categorical_xla, cpu=Kernel(_categorical_cpu, takes=can_draw)
)
