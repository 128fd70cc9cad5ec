"""The LSTM, convolutions and pooling on CPUs, by kernels of our own (kernels.cc, XLA custom calls).

A compiler that is at hand builds them where they run, for the processor they run on, once: the
library is kept in the user's cache. Without a compiler, or with PUFFER_JAX_NATIVE=0 in the
environment, everything runs on XLA's own operations and nothing is missing but speed.

The functions here are the same functions, in float32 and float64, with gradients written out
(`jax.custom_vjp`): no forward-mode and no second derivatives. Under `jax.vmap` they run one after
the other.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8, UInt32

_logger = logging.getLogger(__name__)
_FLAGS = ("-O2", "-march=native", "-std=c++20", "-fPIC", "-shared", "-pthread")
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
    "puffer_jax_perceptron_gradient",
    "puffer_jax_recur",
    "puffer_jax_threefry",
    "puffer_jax_categorical",
)

# --- the library ---------------------------------------------------------------------------


def serves(*arrays: Array) -> bool:
    """Whether there are kernels for these arrays: all float32 or all float64, none empty."""
    dtypes = {array.dtype.name for array in arrays}
    return (
        len(dtypes) == 1
        and dtypes <= _TYPES.keys()
        and all(array.size for array in arrays)
        and at_hand(*dtypes)
    )


_lock = threading.Lock()


def at_hand(dtype: str) -> bool:
    """Whether there are kernels for "float32" or "float64".

    The first call that needs them compiles them, which takes some ten seconds.
    """
    if jax.default_backend() != "cpu":  # not worth the build where the work is done elsewhere
        return False
    with _lock:  # two threads must not register two builds
        return _load(dtype)


@cache
def _load(dtype: str) -> bool:
    """Registers the kernels with XLA, built if need be; False where that is not possible."""
    if os.environ.get("PUFFER_JAX_NATIVE") == "0":
        return False
    given = os.environ.get("CXX")
    compiler = shutil.which(given) if given else shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        _logger.warning(
            "no C++ compiler%s, so LSTMs, convolutions and perceptrons run on XLA's own, slower "
            "operations (PUFFER_JAX_NATIVE=0 hides this)",
            f" {given}" if given else "",
        )
        return False
    try:
        library = ctypes.CDLL(str(_built(compiler, dtype)))
    # Path.home() raises RuntimeError where there is none.
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


def _built(compiler: str, dtype: str) -> Path:
    """The shared library, from the cache or compiled now."""
    source = files("puffer_jax.native") / "kernels.cc"
    flags = [*_FLAGS, f"-DNUMBER={_TYPES[dtype]}"]
    # What the compiler predefines tells its version and the processor's instructions.
    asked = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    target = subprocess.run(asked, capture_output=True, check=True).stdout
    parts = (source.read_bytes(), target, " ".join(flags).encode(), version("jaxlib").encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puffer_jax"
    library = folder / f"{dtype}-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    _logger.info("compiling the CPU kernels to %s", library)
    # Processes that compile at once each write a file of their own; the last one stays.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        result = Path(scratch) / library.name
        command = [compiler, *flags, "-isystem", jax.ffi.include_dir(), str(source)]
        subprocess.run([*command, "-o", str(result)], capture_output=True, text=True, check=True)
        result.replace(library)
    return library


def _call(name: str, results: Any, *arrays: Array, **attributes: Any) -> Any:
    dtype = next(array.dtype.name for array in arrays if array.dtype.name in _TYPES)
    call = jax.ffi.ffi_call(f"{name}_{dtype}", results, vmap_method="sequential")
    return call(*arrays, **attributes)


def _like(*arrays: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)


# --- the LSTM ------------------------------------------------------------------------------


@jax.custom_vjp
def lstm(*arrays: Array) -> tuple[Array, Array, Array]:
    """`puffer_jax.layers.lstm_scan` of its arrays, of one dtype; `done` is bool and not None."""
    outputs, h, c, _ = _lstm(False, *arrays)
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


def lstm_step(*arrays: Array) -> tuple[Array, Array]:
    """`puffer_jax.layers.lstm_step` of its arrays, of one dtype; without derivatives."""
    return _call("puffer_jax_lstm_step", _like(*arrays[-2:]), *arrays)


# --- recurrence ----------------------------------------------------------------------------


@jax.custom_vjp
def recurrence(
    a: Float[Array, "rows time"], b: Float[Array, "rows time"]
) -> Float[Array, "rows time"]:
    """The y with y[:, t] = a[:, t] + b[:, t] * y[:, t + 1], from the last on."""
    return _call("puffer_jax_recur", _like(a)[0], a, b)


def _recurrence_forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    y = recurrence(a, b)
    return y, (b, y)


def _recurrence_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    b, y = residuals
    # The same, the other way: what reaches a step comes from the one before.
    before = jnp.pad(b[:, :-1], ((0, 0), (1, 0)))
    da = recurrence(dy[:, ::-1], before[:, ::-1])[:, ::-1]
    return da, da * jnp.pad(y[:, 1:], ((0, 0), (0, 1)))


recurrence.defvjp(_recurrence_forward, _recurrence_backward)

# --- random numbers ------------------------------------------------------------------------


def threefry(keys: UInt32[Array, "*batch 2"], count: int) -> UInt32[Array, "*batch count 2"]:
    """Threefry-2x32 of the counters 0 to `count` - 1: what `jax.random` makes its numbers of."""
    result = jax.ShapeDtypeStruct((*keys.shape[:-1], count, 2), np.uint32)
    call = jax.ffi.ffi_call("puffer_jax_threefry_float32", result, vmap_method="broadcast_all")
    return call(keys)


def categorical(
    keys: UInt32[Array, "*batch 2"], logits: Float[Array, "*batch rows n"]
) -> Int32[Array, "*batch rows"]:
    """`jax.random.categorical(key, logits, mode="high")` for threefry keys."""
    result = jax.ShapeDtypeStruct(logits.shape[:-1], np.int32)
    name = f"puffer_jax_categorical_{logits.dtype.name}"
    return jax.ffi.ffi_call(name, result, vmap_method="broadcast_all")(keys, logits)


# --- the perceptron ------------------------------------------------------------------------


@jax.custom_vjp
def perceptron(
    x: Float[Array, "batch inputs"],
    w1: Float[Array, "inputs hidden"],
    b1: Float[Array, "hidden"],
    w2: Float[Array, "hidden outputs"],
    b2: Float[Array, "outputs"],
) -> Float[Array, "batch outputs_or_hidden"]:
    """`gelu(x @ w1 + b1) @ w2 + b2`; without the second layer if that has no outputs.

    The hidden vectors stay in cache, and are computed anew for the gradient.
    """
    size = w2.shape[1] or w1.shape[1]
    result = jax.ShapeDtypeStruct((x.shape[0], size), x.dtype)
    return _call("puffer_jax_perceptron", result, x, w1, b1, w2, b2)


def _perceptron_forward(*arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return perceptron(*arrays), arrays


def _perceptron_backward(residuals: tuple[Array, ...], d_result: Array) -> tuple[Array, ...]:
    x, w1, b1, w2, b2 = residuals
    given = _like(w1, b1, w2, b2)
    gradients = _call("puffer_jax_perceptron_gradient", given, x, w1, b1, w2, d_result)
    # Where x are observations nobody asks for this, and it is not computed.
    z = x @ w1 + b1
    slope = jax.scipy.stats.norm.cdf(z) + z * jax.scipy.stats.norm.pdf(z)
    d_hidden = d_result @ w2.T if w2.shape[1] else d_result
    return (d_hidden * slope) @ w1.T, *gradients


perceptron.defvjp(_perceptron_forward, _perceptron_backward)

# --- images ----------------------------------------------------------------------------------

Pair = tuple[int, int]  # of the rows and of the columns


class Windows(NamedTuple):
    """How the windows of a convolution lie on its images."""

    strides: Pair = (1, 1)
    pads: Pair = (0, 0)
    """Zeros before and after the rows, before and after the columns."""
    channels_first: bool = False
    """Of images of bytes: they are (batch, inputs, height, width)."""
    rectify: bool = False
    """Of other images: a ReLU comes first."""

    def attributes(self) -> dict[str, Any]:
        """What every kernel is told."""
        return {
            "stride_rows": np.int64(self.strides[0]),
            "stride_columns": np.int64(self.strides[1]),
            "pad_rows": np.int64(self.pads[0]),
            "pad_columns": np.int64(self.pads[1]),
        }

    def of_images(self) -> dict[str, Any]:
        """What those are told that read the images."""
        own = {"channels_first": self.channels_first, "rectify": self.rectify}
        return self.attributes() | own


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolution(
    windows: Windows,
    x: Float[Array, "batch height width inputs"] | UInt8[Array, "batch _ _ _"],
    kernel: Float[Array, "window_height window_width inputs outputs"],
    bias: Float[Array, "outputs"],
) -> Float[Array, "batch out_height out_width outputs"]:
    """A convolution of images.

    Args:
        windows: where they lie; they must fit into the images with their borders.
        x: the images; bytes stand for numbers from 0 to 1, each is divided by 255.
        kernel: the weights.
        bias: is added.
    """
    shape = (x.shape[0], *x.shape[2:]) if windows.channels_first else x.shape
    sides = zip(shape[1:], kernel.shape, windows.strides, windows.pads, strict=False)
    height, width = ((side + 2 * pad - size) // stride + 1 for side, size, stride, pad in sides)
    result = jax.ShapeDtypeStruct((x.shape[0], height, width, kernel.shape[3]), kernel.dtype)
    return _call("puffer_jax_convolve", result, x, kernel, bias, **windows.of_images())


def _convolution_forward(windows: Windows, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return convolution(windows, *arrays), arrays


def _convolution_backward(
    windows: Windows, residuals: tuple[Array, ...], d_out: Array
) -> tuple[Array | None, ...]:
    x, *weights = residuals
    # Two calls, so that the images' gradient is not computed where nobody asks for it.
    dx = None
    if x.dtype == d_out.dtype:
        name = "puffer_jax_convolve_images_gradient"
        (dx,) = _call(name, _like(x), weights[0], d_out, **windows.attributes())
        dx = jnp.where(x > 0, dx, 0) if windows.rectify else dx
    name = "puffer_jax_convolve_weights_gradient"
    return dx, *_call(name, _like(*weights), x, d_out, **windows.of_images())


convolution.defvjp(_convolution_forward, _convolution_backward)


@jax.custom_vjp
def max_pool(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch half_height half_width channels"]:
    """`puffer_jax.layers.max_pool`."""
    return _max_pool(x, False)[0]


def _max_pool(x: Array, keep: bool) -> tuple[Array, Array]:
    batch, height, width, channels = x.shape
    shape = (batch, (height + 1) // 2, (width + 1) // 2, channels)
    taken = jax.ShapeDtypeStruct(shape if keep else (0,), np.int8)
    return _call("puffer_jax_max_pool", (jax.ShapeDtypeStruct(shape, x.dtype), taken), x)


def _max_pool_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    out, taken = _max_pool(x, True)
    # An empty array that tells the shape.
    return out, (taken, jax.lax.empty((0, *x.shape), x.dtype))


def _max_pool_backward(residuals: tuple[Array, Array], d_out: Array) -> tuple[Array]:
    taken, like = residuals
    dx = jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
    return (_call("puffer_jax_max_pool_gradient", dx, taken, d_out),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
