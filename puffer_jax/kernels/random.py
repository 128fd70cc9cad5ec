"""Threefry, JAX's default generator of random numbers, and draws from logits with it."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt32

from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.cpu import native

THREEFRY = "threefry2x32"

_COUNTERS = 2**32  # JAX's have 64 bits, the kernels' 32


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


def threefry(words: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Threefry-2x32 of the counters 0, 1, 2, ... in this shape: (*shape, 2)."""
    return _threefry(words, shape=shape)


def has_threefry_kernel(words: UInt32[Array, "2"]) -> bool:
    """Whether `threefry` has a kernel for small shapes, and is not `jax.random.split`."""
    return bool(_threefry.kernels(words, shape=()))


def categorical(key: PRNGKeyArray, logits: Float[Array, "batch n"]) -> Int32[Array, "batch"]:
    """`jax.random.categorical(key, logits, mode="high")`, but for rounding; no derivatives.

    Args:
        key: typed or not, of any generator.
        logits: those of each row.
    """
    return _categorical(key, logits)


def can_draw(key: PRNGKeyArray, logits: Float[Array, "batch n"]) -> bool:
    """Whether the CPU kernels can draw with this key from these logits."""
    return is_threefry(key) and native.takes(logits) and 2 * logits.size < _COUNTERS


def _threefry_xla(words: Array, *, shape: tuple[int, ...]) -> Array:
    key = jax.random.wrap_key_data(words, impl=THREEFRY)
    return jax.random.key_data(jax.random.split(key, shape))


def _threefry_cpu(words: Array, *, shape: tuple[int, ...]) -> Array:
    return cpu.threefry(words, math.prod(shape)).reshape(*shape, 2)


def _threefry_cpu_takes(words: Array, *, shape: tuple[int, ...]) -> bool:
    return 0 < math.prod(shape) < _COUNTERS and native.is_available("float32")


def _categorical_xla(key: Array, logits: Array) -> Array:
    return jax.random.categorical(key, logits, mode="high").astype(jnp.int32)


def _categorical_cpu(key: Array, logits: Array) -> Array:
    return cpu.categorical(words_of(key), logits)


_threefry = Operation(
    "threefry", xla=_threefry_xla, cpu=Kernel(_threefry_cpu, takes=_threefry_cpu_takes)
)

_categorical = Operation(
    "categorical", xla=_categorical_xla, cpu=Kernel(_categorical_cpu, takes=can_draw)
)
