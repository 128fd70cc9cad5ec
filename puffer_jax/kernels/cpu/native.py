"""The CPU kernels as custom calls of XLA: registered when first needed, called from JAX."""

import logging
import os
import threading
from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from puffer_jax.kernels.cpu import build

_logger = logging.getLogger(__name__)

_NAMES = (
    "puffer_jax_lstm_forward",
    "puffer_jax_lstm_backward",
    "puffer_jax_lstm_step",
    "puffer_jax_convolve",
    "puffer_jax_convolve_images_gradient",
    "puffer_jax_convolve_weights_gradient",
    "puffer_jax_max_pool",
    "puffer_jax_max_pool_gradient",
    "puffer_jax_perceptron",
    "puffer_jax_linear",
    "puffer_jax_linear_gradient",
    "puffer_jax_perceptron_gradient",
    "puffer_jax_mingru_forward",
    "puffer_jax_mingru_backward",
    "puffer_jax_recur",
    "puffer_jax_adam",
    "puffer_jax_threefry",
    "puffer_jax_categorical",
    "puffer_jax_sample",
)


_lock = threading.Lock()


def takes(*arrays: Array) -> bool:
    """Whether there are kernels for these arrays: all float32 or all float64, none empty."""
    dtypes = {array.dtype.name for array in arrays}
    return (
        len(dtypes) == 1
        and dtypes <= build.TYPES.keys()
        and all(array.size for array in arrays)
        and is_available(*dtypes)
    )


def is_available(dtype: str) -> bool:
    """Whether there are kernels for "float32" or "float64".

    The first call that needs them compiles them, which takes some ten seconds. Flags for the
    compiler, in PUFFER_JAX_CXXFLAGS in the environment, come after our own: they make another
    library, beside the usual one. For tests: with -DVECTOR_BYTES=16 (or 32, 64) vectors are as
    long as another processor's.
    """
    if jax.default_backend() != "cpu":  # not worth the build where the work is done elsewhere
        return False
    with _lock:  # two threads must not register two builds
        return _load(dtype)


@cache
def _load(dtype: str) -> bool:
    """Register the kernels with XLA, built if need be; False if that is not possible."""
    if os.environ.get("PUFFER_JAX_NATIVE") == "0":
        return False
    try:
        library = build.load(dtype)
        handlers = {name: jax.ffi.pycapsule(getattr(library, name)) for name in _NAMES}
    except build.BuildError as error:
        _warn(str(error))
        return False
    except AttributeError as error:
        _warn(f"the CPU kernels are not what they should be ({error})")
        return False
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(f"{name}_{dtype}", handler, platform="cpu")
    return True


@cache
def _warn(reason: str) -> None:
    """Log why there are no kernels, once."""
    _logger.warning(
        "%s, so LSTMs, convolutions and perceptrons run on XLA's own, slower operations "
        "(PUFFER_JAX_NATIVE=0 hides this)",
        reason,
    )


def call(
    name: str,
    results: PyTree,
    *arrays: Array,
    vmap_method: str = "sequential",
    aliases: dict[int, int] | None = None,
    **attributes: object,
) -> PyTree:
    """Call the kernel `name` of the library for the dtype of the first floating array.

    Args:
        name: one of `_NAMES`.
        results: shape and dtype of each result, a pytree of `jax.ShapeDtypeStruct`.
        arrays: the operands.
        vmap_method: as in `jax.ffi.ffi_call`.
        aliases: index of an operand -> index of the result that is written in its place, since
            fresh memory is slow to touch. XLA copies an operand that is needed afterwards.
        attributes: those that the kernel takes.

    Returns:
        Arrays in the structure of `results`.
    """
    dtype = next(array.dtype.name for array in arrays if array.dtype.name in build.TYPES)
    kernel = jax.ffi.ffi_call(
        f"{name}_{dtype}", results, vmap_method=vmap_method, input_output_aliases=aliases
    )
    return kernel(*arrays, **attributes)


def like(*arrays: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shape and dtype of each array."""
    return tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)


def is_floating(array: Array | None) -> bool:
    """Whether the array has a floating dtype, and so a gradient."""
    return array is not None and jnp.issubdtype(array.dtype, jnp.floating)
