"""The shared library of CPU kernels: built where it runs, loaded, called from JAX."""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

_logger = logging.getLogger(__name__)

_FLAGS = (
    *("-O2", "-march=native", "-std=c++20", "-fPIC", "-shared", "-pthread", "-fno-math-errno"),
    "-falign-loops=64",  # the product's loop ran up to a tenth slower elsewhere
)

_TYPES = {"float32": "float", "float64": "double"}

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
        and dtypes <= _TYPES.keys()
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
    cxx = os.environ.get("CXX")
    compiler = shutil.which(cxx) if cxx else shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        _logger.warning(
            "no C++ compiler%s, so LSTMs, convolutions and perceptrons run on XLA's own, slower "
            "operations (PUFFER_JAX_NATIVE=0 hides this)",
            f" {cxx}" if cxx else "",
        )
        return False
    try:
        library = ctypes.CDLL(str(_built(compiler, dtype)))
    # Path.home() raises RuntimeError if there is none.
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        _logger.warning(
            "the CPU kernels could not be built, so LSTMs, convolutions and perceptrons run on "
            "XLA's own, slower operations (PUFFER_JAX_NATIVE=0 hides this): %s",
            getattr(error, "stderr", None) or error,
        )
        return False
    for name in _NAMES:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f"{name}_{dtype}", handler, platform="cpu")
    return True


def _key(sources: Traversable, *parts: bytes) -> str:
    """What identifies a library: all its sources, headers included, and the other parts."""
    found = sorted(sources.iterdir(), key=lambda file: file.name)
    named = (part for file in found for part in (file.name.encode(), file.read_bytes()))
    return hashlib.sha256(b"\0".join((*named, *parts))).hexdigest()[:16]


def _built(compiler: str, dtype: str) -> Path:
    """The shared library, from the cache or compiled now."""
    sources = files("puffer_jax.kernels") / "cc"
    extra = shlex.split(os.environ.get("PUFFER_JAX_CXXFLAGS", ""))
    flags = [*_FLAGS, *extra, f"-DNUMBER={_TYPES[dtype]}"]
    # What the compiler predefines tells its version and the processor's instructions.
    query = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    target = subprocess.run(query, capture_output=True, check=True).stdout
    key = _key(sources, target, " ".join(flags).encode(), version("jaxlib").encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puffer_jax"
    library = folder / f"{dtype}-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    _logger.info("compiling the CPU kernels to %s", library)
    # Processes that compile at the same time each write a file of their own; the last one stays.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        result = Path(scratch) / library.name
        # It includes all others, which lie beside it; with -I, <threads.h> would be ours, too.
        source = str(sources / "kernels.cc")
        command = [compiler, *flags, "-isystem", jax.ffi.include_dir(), source]
        subprocess.run([*command, "-o", str(result)], capture_output=True, text=True, check=True)
        result.replace(library)
    return library


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
    dtype = next(array.dtype.name for array in arrays if array.dtype.name in _TYPES)
    kernel = jax.ffi.ffi_call(
        f"{name}_{dtype}", results, vmap_method=vmap_method, input_output_aliases=aliases
    )
    return kernel(*arrays, **attributes)


def like(*arrays: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shape and dtype of each array."""
    return tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)


def is_floating(array: Array) -> bool:
    """Whether the array has a floating dtype, and so a gradient."""
    return jnp.issubdtype(array.dtype, jnp.floating)
