"""LSTM, convolutions, pooling, perceptrons, random numbers: our own CPU kernels (XLA custom calls).

A compiler that is at hand builds them where they run, for the processor they run on, once: the
library is kept in the user's cache. Without a compiler, or with PUFFER_JAX_NATIVE=0 in the
environment, everything runs on XLA's own operations and nothing is missing but speed.

The functions here are the same functions, in float32 and float64, with gradients written out
(`jax.custom_vjp`): no forward-mode derivatives. Gradients of gradients are those of XLA's
operations. Under `jax.vmap` calls run one after the other.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

_logger = logging.getLogger(__name__)
_FLAGS = (
    *("-O2", "-march=native", "-std=c++20", "-fPIC", "-shared", "-pthread", "-fno-math-errno"),
    "-falign-loops=64",  # the product's loop ran up to a tenth slower wherever else it fell
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


def _key(sources: Traversable, *parts: bytes) -> str:
    """What a library is known by: all its sources, headers among them, and the other parts."""
    found = sorted(sources.iterdir(), key=lambda file: file.name)
    named = (part for file in found for part in (file.name.encode(), file.read_bytes()))
    return hashlib.sha256(b"\0".join((*named, *parts))).hexdigest()[:16]


def _built(compiler: str, dtype: str) -> Path:
    """The shared library, from the cache or compiled now."""
    sources = files("puffer_jax.kernels") / "cc"
    flags = [*_FLAGS, f"-DNUMBER={_TYPES[dtype]}"]
    # What the compiler predefines tells its version and the processor's instructions.
    asked = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    target = subprocess.run(asked, capture_output=True, check=True).stdout
    key = _key(sources, target, " ".join(flags).encode(), version("jaxlib").encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puffer_jax"
    library = folder / f"{dtype}-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    _logger.info("compiling the CPU kernels to %s", library)
    # Processes that compile at once each write a file of their own; the last one stays.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        result = Path(scratch) / library.name
        # It includes all others, found beside it; with -I <threads.h> would be ours, too.
        source = str(sources / "kernels.cc")
        command = [compiler, *flags, "-isystem", jax.ffi.include_dir(), source]
        subprocess.run([*command, "-o", str(result)], capture_output=True, text=True, check=True)
        result.replace(library)
    return library


def _call(
    name: str,
    results: Any,
    *arrays: Array,
    vmap_method: str = "sequential",
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> Any:
    """`aliases`: from an array to the result in its place, since fresh memory is slow to touch.

    Where the array is needed on, XLA copies it.
    """
    dtype = next(array.dtype.name for array in arrays if array.dtype.name in _TYPES)
    call = jax.ffi.ffi_call(
        f"{name}_{dtype}", results, vmap_method=vmap_method, input_output_aliases=aliases
    )
    return call(*arrays, **attributes)


def _like(*arrays: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)


def _is_number(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def differentiable(
    forward: Callable[..., Any], backward: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """A function by kernels whose gradient is by kernels, too.

    Args:
        forward: (keep, *arrays) -> (results, kept): with `keep`, what `backward` wants to know.
        backward: (arrays, kept, cotangents) -> the gradients of those arrays that are floating.
        plain: the same function of XLA's operations, for the derivatives beyond the first.
    """

    @jax.custom_vjp
    def gradient(arrays: Any, kept: Any, cotangents: Any) -> Any:
        return backward(arrays, kept, cotangents)

    def gradient_forward(*given: Any) -> tuple[Any, Any]:
        return gradient(*given), given

    def gradient_backward(given: Any, d_gradients: Any) -> tuple[Any, ...]:
        arrays, _, cotangents = given
        which = [_is_number(array) for array in arrays]

        def function(*numbers: Array) -> Any:
            left = iter(numbers)
            return plain(*(next(left) if i else a for i, a in zip(which, arrays, strict=True)))

        def again(numbers: Any, cotangents: Any) -> Any:
            return jax.vjp(function, *numbers)[1](cotangents)

        numbers = tuple(filter(_is_number, arrays))
        d_numbers, d_cotangents = jax.vjp(again, numbers, cotangents)[1](d_gradients)
        left = iter(d_numbers)
        return tuple(next(left) if i else None for i in which), None, d_cotangents

    gradient.defvjp(gradient_forward, gradient_backward)

    # What is kept is a constant to derivatives beyond the first: `gradient` has all of them.
    keeping = jax.custom_vjp(partial(forward, True))
    keeping.defvjp(
        lambda *arrays: (keeping(*arrays), arrays),
        lambda arrays, d: jax.vjp(function, *arrays)[1](d[0]),
    )

    @jax.custom_vjp
    def function(*arrays: Array) -> Any:
        return forward(False, *arrays)[0]

    def function_forward(*arrays: Array) -> tuple[Any, Any]:
        results, kept = keeping(*arrays)
        return results, (arrays, kept)

    def function_backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        arrays, kept = residuals
        left = iter(gradient(arrays, kept, cotangents))
        return tuple(next(left) if _is_number(array) else None for array in arrays)

    function.defvjp(function_forward, function_backward)
    return function


# --- the LSTM ------------------------------------------------------------------------------


def lstm(keep: bool, *arrays: Array) -> tuple[tuple[Array, ...], Any]:
    """Forward of `puffer_jax.layers.lstm_scan`, of arrays of one dtype; `done` is bool."""
    *weights, x, h, c, done = arrays
    (batch, time, _), hidden = x.shape, h.shape[1]
    rows = _rows(x)
    outputs = jax.ShapeDtypeStruct((batch * time, hidden), x.dtype)
    gates = jax.ShapeDtypeStruct((time, batch, 5, hidden) if keep else (0,), x.dtype)
    *results, gates = _call(
        "puffer_jax_lstm_forward",
        (outputs, *_like(h, c), gates),
        *(*weights, rows, h, c, done),
        # A step's input is read before its output is written.
        aliases={3: 0} if not keep and rows.shape == outputs.shape else None,
    )
    outputs = results[0].reshape(batch, time, hidden)
    return (outputs, *results[1:]), (outputs, gates)


def lstm_gradient(arrays: Any, kept: Any, cotangents: Any) -> tuple[Array, ...]:
    """Backward of `lstm`."""
    weight_ih, weight_hh, bias, x, h, c, done = arrays
    (outputs, gates), (d_outputs, *d_states) = kept, cotangents
    rows, d_rows = _rows(x), _rows(d_outputs)
    given = (weight_ih, weight_hh, rows, h, c, done, _rows(outputs), gates, d_rows, *d_states)
    d_ih, d_hh, d_bias, dx, *d_start = _call(
        "puffer_jax_lstm_backward",
        _like(weight_ih, weight_hh, bias, rows, h, c),
        *given,
        # As in `lstm`; and XLA would copy what is reshaped, did not the kernel take rows.
        aliases={8: 3} if rows.shape == d_rows.shape else None,
    )
    return d_ih, d_hh, d_bias, dx.reshape(x.shape), *d_start


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


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

# --- Adam ----------------------------------------------------------------------------------


def adam(numbers: Array, gradient: Array, *arrays: Array) -> tuple[Array, ...]:
    """A step of `puffer_jax.optim.adam`, in place; without derivatives.

    Args:
        numbers: (9,) as in the struct AdamNumbers of the kernels' adam.cc.
        gradient: of any shape, and one dtype with all others.
        arrays: the parameters and both moments.

    Returns:
        The new ones.
    """
    options: Any = {"vmap_method": "broadcast_all", "aliases": {2: 0, 3: 1, 4: 2}}
    return tuple(_call("puffer_jax_adam", _like(*arrays), numbers, gradient, *arrays, **options))


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
    return _call("puffer_jax_categorical", result, keys, logits, vmap_method="broadcast_all")


def sample(
    key: UInt32[Array, "*batch 2"], logits: Float[Array, "*batch rows n"], component: int
) -> tuple[Int32[Array, "*batch rows"], Float[Array, "*batch rows"], Float[Array, "*batch rows"]]:
    """Actions, log-probabilities and entropies of `puffer_jax.sample_logits`; no derivatives.

    Args:
        key: of threefry.
        logits: of one component.
        component: which one: its key is that of this number among those `key` is split into.
    """
    of_rows = [jax.ShapeDtypeStruct(logits.shape[:-1], dtype) for dtype in (np.int32, logits.dtype)]
    results = (*of_rows, of_rows[1])
    given = {"vmap_method": "broadcast_all", "component": np.int64(component)}
    return _call("puffer_jax_sample", results, key, logits, **given)


# --- linear layers -------------------------------------------------------------------------


def linear(keep: bool, *arrays: Array) -> tuple[tuple[Array, ...], None]:
    """Forward of x and any number of w, b: `x @ w + b` for each of these."""
    x, *layers = arrays
    return _call("puffer_jax_linear", _outputs(x, layers), *arrays), None


def linear_gradient(arrays: Any, kept: None, d_results: tuple[Array, ...]) -> tuple[Array, ...]:
    """Backward of `linear`."""
    x, *layers = arrays
    weights, bias, d_result = _joined(layers, d_results)
    given = x, weights, d_result
    dx, *d_joined = _call("puffer_jax_linear_gradient", _like(x, weights, bias), *given)
    return dx, *_apart(layers, d_joined)


def _joined(layers: Any, d_results: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    """Several linear layers as one: its weights, bias, and the gradient of its result."""
    d_result = jnp.concatenate(d_results, axis=1)
    return jnp.concatenate(layers[::2], axis=1), jnp.concatenate(layers[1::2]), d_result


def _apart(layers: Any, d_joined: Any) -> list[Array]:
    """The gradients of each w, b of the layers from those of `_joined`."""
    ends = np.cumsum([b.shape[0] for b in layers[1::2]])[:-1]
    d_layers = zip(*(jnp.split(d, ends, axis=-1) for d in d_joined), strict=True)
    return [d for pair in d_layers for d in pair]


def perceptron(keep: bool, *arrays: Array) -> tuple[tuple[Array, ...], None]:
    """Forward of x, w1, b1 and any number of w, b: `gelu(x @ w1 + b1) @ w + b` for each of these.

    x is (batch, inputs), w1 (inputs, hidden), w (hidden, outputs). Without another layer the result
    is the hidden vectors. With others they stay in cache, and are computed anew for the gradient.
    """
    x, *layers = arrays
    results = _outputs(x, layers[2:] or layers)
    return _call("puffer_jax_perceptron", results, *arrays), None


def _outputs(x: Array, layers: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((x.shape[0], *b.shape), x.dtype) for b in layers[1::2])


def perceptron_gradient(arrays: Any, kept: None, d_results: tuple[Array, ...]) -> tuple[Array, ...]:
    """Backward of `perceptron`."""
    x, w1, b1, *layers = arrays
    # No outputs: the gradient is that of the hidden vectors.
    w2, b2, d_result = _joined(layers or (w1[:0].T, b1[:0]), d_results)
    given = _like(w1, b1, w2, b2)
    d_w1, d_b1, *d_joined = _call("puffer_jax_perceptron_gradient", given, x, w1, b1, w2, d_result)
    # Where x are observations nobody asks for this, and it is not computed.
    z = x @ w1 + b1
    slope = jax.scipy.stats.norm.cdf(z) + z * jax.scipy.stats.norm.pdf(z)
    d_hidden = d_result @ w2.T if layers else d_result
    return (d_hidden * slope) @ w1.T, d_w1, d_b1, *(_apart(layers, d_joined) if layers else [])


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
    out_channels_first: bool = False
    """The result is (batch, outputs, height, width)."""

    def attributes(self) -> dict[str, Any]:
        """What all kernels are told."""
        return {
            "channels_first": self.channels_first,
            "rectify": self.rectify,
            "stride_rows": np.int64(self.strides[0]),
            "stride_columns": np.int64(self.strides[1]),
            "pad_rows": np.int64(self.pads[0]),
            "pad_columns": np.int64(self.pads[1]),
        }


def convolution(windows: Windows, keep: bool, *arrays: Array) -> tuple[Array, None]:
    """Forward of x, kernel, bias: a convolution of images.

    Args:
        windows: where they lie; they must fit into the images with their borders.
        keep: not used.
        arrays: x, the images (batch, height, width, inputs); bytes stand for numbers from 0 to
            1, each is divided by 255. kernel, the weights (window_height, window_width, inputs,
            outputs). bias (outputs,), is added.
    """
    x, kernel, _ = arrays
    shape = (x.shape[0], *x.shape[2:]) if windows.channels_first else x.shape
    sides = zip(shape[1:], kernel.shape, windows.strides, windows.pads, strict=False)
    height, width = ((side + 2 * pad - size) // stride + 1 for side, size, stride, pad in sides)
    first, outputs = windows.out_channels_first, kernel.shape[3]
    image = (outputs, height, width) if first else (height, width, outputs)
    result = jax.ShapeDtypeStruct((x.shape[0], *image), kernel.dtype)
    given = windows.attributes()
    return _call("puffer_jax_convolve", result, *arrays, **given, out_channels_first=first), None


def convolution_gradient(
    windows: Windows, arrays: Any, kept: None, d_out: Array
) -> tuple[Array, ...]:
    """Backward of `convolution`."""
    d_out = d_out.transpose(0, 2, 3, 1) if windows.out_channels_first else d_out
    x, *weights = arrays
    name = "puffer_jax_convolve_weights_gradient"
    gradients = _call(name, _like(*weights), x, d_out, **windows.attributes())
    if not _is_number(x):
        return tuple(gradients)
    # A call of its own: the images' gradient is not computed where nobody asks for it.
    name = "puffer_jax_convolve_images_gradient"
    (dx,) = _call(name, _like(x), x, weights[0], d_out, **windows.attributes())
    return dx, *gradients


def max_pool(keep: bool, x: Array) -> tuple[Array, Array]:
    """Forward of `puffer_jax.layers.max_pool`."""
    batch, height, width, channels = x.shape
    shape = (batch, (height + 1) // 2, (width + 1) // 2, channels)
    taken = jax.ShapeDtypeStruct(shape if keep else (0,), np.int8)
    return _call("puffer_jax_max_pool", (jax.ShapeDtypeStruct(shape, x.dtype), taken), x)


def max_pool_gradient(arrays: tuple[Array], taken: Array, d_out: Array) -> tuple[Array]:
    """Backward of `max_pool`."""
    return (_call("puffer_jax_max_pool_gradient", _like(*arrays)[0], taken, d_out),)
