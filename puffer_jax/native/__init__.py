"""The LSTM and convolutions on CPUs, by kernels of our own (kernels.cc, XLA custom calls).

A compiler that is at hand builds them where they run, for the processor they run on, once: the
library is kept in the user's cache. Without a compiler, or with PUFFER_JAX_NATIVE=0 in the
environment, everything runs on XLA's own operations and nothing is missing but speed.

The functions here are the same functions, in float32 and float64, with gradients written out
(`jax.custom_vjp`): no forward-mode derivatives. Under `jax.vmap` they run one after the other.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

_logger = logging.getLogger(__name__)
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-pthread")
_NAMES = (
    "puffer_jax_lstm_forward",
    "puffer_jax_lstm_backward",
    "puffer_jax_convolve",
    "puffer_jax_convolve_images_gradient",
    "puffer_jax_convolve_kernel_gradient",
)

# --- the library ---------------------------------------------------------------------------


def serves(*arrays: Array) -> bool:
    """Whether the kernels are there and take these arrays: all float32 or all float64, none empty.

    The first call that needs them compiles them, which takes some ten seconds.
    """
    dtypes = {array.dtype for array in arrays}
    return (
        len(dtypes) == 1
        and dtypes <= {np.dtype("float32"), np.dtype("float64")}
        and all(array.size for array in arrays)
        # Not worth the build where the work is done elsewhere.
        and jax.default_backend() == "cpu"
        and _load()
    )


@cache
def _load() -> bool:
    """Registers the kernels with XLA, built if need be; False where that is not possible."""
    if os.environ.get("PUFFER_JAX_NATIVE") == "0":
        return False
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++"))), "")
    if not compiler:
        _logger.info("no C++ compiler: the LSTM and convolutions run on XLA's own operations")
        return False
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        _logger.warning(
            "the CPU kernels could not be built, so the LSTM and convolutions run on XLA's own, "
            "slower operations (PUFFER_JAX_NATIVE=0 hides this): %s",
            reason,
        )
        return False
    for name in _NAMES:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _built(compiler: str) -> Path:
    """The shared library, from the cache or compiled now."""
    source = files(__package__) / "kernels.cc"
    code = source.read_bytes()
    # What the compiler predefines tells its version and the processor's instructions.
    asked = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    target = subprocess.run(asked, capture_output=True, check=True).stdout
    parts = (code, target, " ".join(_FLAGS).encode(), version("jaxlib").encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puffer_jax"
    library = folder / f"kernels-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    _logger.info("compiling the CPU kernels to %s", library)
    # Processes that compile at once each write a file of their own; the last one stays.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        result = Path(scratch) / library.name
        command = [compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), str(source)]
        subprocess.run([*command, "-o", str(result)], capture_output=True, text=True, check=True)
        result.replace(library)
    return library


def _call(name: str, results: Any, *arrays: Array, **attributes: int) -> Any:
    call = jax.ffi.ffi_call(name, results, vmap_method="sequential")
    return call(*arrays, **{key: np.int64(value) for key, value in attributes.items()})


def _like(*arrays: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)


# --- the LSTM ------------------------------------------------------------------------------


@jax.custom_vjp
def lstm(
    weight: Float[Array, "gates input_and_hidden"],
    bias: Float[Array, "gates"],
    x: Float[Array, "batch time input"],
    h: Float[Array, "batch hidden"],
    c: Float[Array, "batch hidden"],
    done: Bool[Array, "batch time"],
) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
    """`puffer_jax.layers.lstm_scan`."""
    outputs, h, c, _ = _lstm(False, weight, bias, x, h, c, done)
    return outputs, h, c


def _lstm(keep: bool, *arrays: Array) -> tuple[Array, ...]:
    *_, x, h, c, _ = arrays
    (batch, time, _), hidden = x.shape, h.shape[1]
    outputs = jax.ShapeDtypeStruct((batch, time, hidden), x.dtype)
    kept = jax.ShapeDtypeStruct((time, batch, 5, hidden) if keep else (0,), x.dtype)
    return _call("puffer_jax_lstm_forward", (outputs, *_like(h, c), kept), *arrays)


def _lstm_forward(*arrays: Array) -> tuple[Any, Any]:
    *results, kept = _lstm(True, *arrays)
    return tuple(results), (arrays, results[0], kept)


def _lstm_backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    arrays, outputs, kept = residuals
    weight, bias, x, h, c, done = arrays
    results = _like(weight, bias, x, h, c)
    given = (weight, x, h, c, done, outputs, kept, *cotangents)
    return (*_call("puffer_jax_lstm_backward", results, *given), None)


lstm.defvjp(_lstm_forward, _lstm_backward)

# --- convolution ---------------------------------------------------------------------------

_Pads = tuple[tuple[int, int], tuple[int, int]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def convolution(
    strides: tuple[int, int],
    pads: _Pads,
    x: Float[Array, "batch height width inputs"],
    kernel: Float[Array, "window_height window_width inputs outputs"],
) -> Float[Array, "batch out_height out_width outputs"]:
    """A convolution of images; `pads` are zeros before and after rows and columns, none negative.

    The windows must fit into the images with their borders.
    """
    sides = zip(x.shape[1:3], kernel.shape, strides, pads, strict=False)
    height, width = ((side + sum(pad) - size) // stride + 1 for side, size, stride, pad in sides)
    result = jax.ShapeDtypeStruct((x.shape[0], height, width, kernel.shape[3]), x.dtype)
    return _call("puffer_jax_convolve", result, x, kernel, **_windows(strides, pads))


def _windows(strides: tuple[int, int], pads: _Pads) -> dict[str, int]:
    return {
        "stride_rows": strides[0],
        "stride_columns": strides[1],
        "pad_rows": pads[0][0],
        "pad_columns": pads[1][0],
    }


def _convolution_forward(
    strides: tuple[int, int], pads: _Pads, x: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return convolution(strides, pads, x, kernel), (x, kernel)


def _convolution_backward(
    strides: tuple[int, int], pads: _Pads, residuals: tuple[Array, Array], d_out: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    windows = _windows(strides, pads)
    # Two calls, so that the images' gradient is not computed where nobody asks for it.
    (dx,) = _call("puffer_jax_convolve_images_gradient", _like(x), kernel, d_out, **windows)
    (d_kernel,) = _call("puffer_jax_convolve_kernel_gradient", _like(kernel), x, d_out, **windows)
    return dx, d_kernel


convolution.defvjp(_convolution_forward, _convolution_backward)
