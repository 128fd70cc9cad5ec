"""Layers and initialisers with torch's meaning: layer_init, torch_init, LSTM, flatten, pooling."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from puffer_jax import native
from puffer_jax.modules import TorchParameter, torch_parameters

Layer = TypeVar("Layer", bound=nnx.Module)


def _affine(layer: nnx.Module, function: str) -> list[TorchParameter]:
    """Weight and, if there is one, bias."""
    if not isinstance(layer, nnx.Linear | nnx.Conv):
        raise TypeError(f"{function} takes an nnx.Linear or nnx.Conv; got {type(layer).__name__}")
    return torch_parameters(layer)


def layer_init(
    layer: Layer, std: float = math.sqrt(2), bias_const: float = 0.0, *, rngs: nnx.Rngs
) -> Layer:
    """Orthogonal weights of gain `std` and a constant bias, in place; CleanRL's default.

    The kernel is orthogonal as a matrix (out, everything else), as torch flattens it.

    Args:
        layer: `nnx.Linear` or `nnx.Conv` of any number of spatial dimensions; a layer
            without bias is fine.
        std: the gain: all singular values of the flattened kernel.
        bias_const: value of every bias.
        rngs: draws one key from the stream `params`.

    Returns:
        `layer`, for use in one expression.

    Raises:
        TypeError: another type of layer.

    Reference: `pufferlib.pytorch.layer_init`; Saxe et al. 2013, arXiv:1312.6120.
    """
    for parameter in _affine(layer, "layer_init"):
        if parameter.name == "weight":
            _set(parameter, std * _orthogonal(parameter, rngs))
        else:
            _set(parameter, jnp.full(parameter.shape, bias_const))
    return layer


@partial(jax.jit, static_argnames=("rows", "columns", "dtype"))
def _orthogonal_matrix(key: Array, rows: int, columns: int, dtype: jnp.dtype) -> Array:
    # JAX's own initialiser decomposes a square matrix of the longer side, 40 times the work
    # for NatureCNN's Linear.
    tall = jax.random.normal(key, (max(rows, columns), min(rows, columns)), dtype)
    q, r = jnp.linalg.qr(tall)
    # Without the signs the distribution would depend on the decomposition's conventions.
    q *= jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(dtype)
    return q if rows >= columns else q.T


def _orthogonal(parameter: TorchParameter, rngs: nnx.Rngs) -> Array:
    rows, *rest = parameter.shape
    # QR knows no half precision.
    dtype = jnp.promote_types(parameter.variables[0].dtype, jnp.float32)
    matrix = _orthogonal_matrix(rngs.params(), rows, math.prod(rest), dtype)
    return matrix.reshape(parameter.shape)


def _set(parameter: TorchParameter, value: Array) -> None:
    for variable, array in zip(parameter.variables, parameter.from_torch(value), strict=True):
        variable[...] = array.astype(variable.dtype)


def torch_init(layer: Layer, *, rngs: nnx.Rngs) -> Layer:
    """Torch's default for Linear and Conv, in place: weights and bias U(-1/sqrt(fan_in), +).

    Args:
        layer: `nnx.Linear` or `nnx.Conv`.
        rngs: draws two keys from the stream `params`.

    Raises:
        TypeError: another type of layer.

    Reference: `torch.nn.Linear.reset_parameters`.
    """
    weight, *bias = _affine(layer, "torch_init")
    bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
    for parameter in (weight, *bias):
        _set(parameter, _uniform(rngs, parameter.shape, bound, parameter.variables[0].dtype))
    return layer


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float, dtype: Any) -> Array:
    return jax.random.uniform(rngs.params(), shape, dtype, -bound, bound)


def reset_orthogonal(module: nnx.Module, *, rngs: nnx.Rngs) -> None:
    """Give every weight of `module` an orthogonal value of gain 1 and zero every bias, in place.

    Goes by torch's names, as the reference does: names with `layer_norm` are left alone, those
    with `bias` are zeroed, those with `weight` and at least two dimensions become orthogonal,
    the rest (a learned log-std, say) keeps its value.

    Reference: the loop in `pufferlib.models.LSTMWrapper.__init__`.
    """
    for parameter in torch_parameters(module):
        if "layer_norm" in parameter.name:
            continue
        if "bias" in parameter.name:
            _set(parameter, jnp.zeros(parameter.shape))
        elif "weight" in parameter.name and len(parameter.shape) >= 2:
            _set(parameter, _orthogonal(parameter, rngs))


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """The exact (erf) GELU, torch's default; JAX's default is the tanh approximation."""
    # jax.nn.gelu's exact form asks for erfc, twice the time of erf on CPUs.
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    # Fewer passes over the array than JAX's own derivative makes.
    below = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * below, (below + x * density) * dx


def perceptron(
    x: Float[Array, "batch inputs"], first: Any, heads: Sequence[Any] = ()
) -> tuple[Float[Array, "batch outputs_or_hidden"], ...]:
    """The outputs of each of the heads for `gelu(first(x))`; that itself if there are none.

    All are `nnx.Linear` with bias.

    On a CPU, in float32 and float64, it is `puffer_jax.native.perceptron`, where that can be built,
    and has no forward-mode derivatives (`jax.jvp`). Elsewhere it is XLA's.
    """
    dtype = first.param_dtype if first.dtype is None else first.dtype
    layers = [array for layer in (first, *heads) for array in (layer.kernel[...], layer.bias[...])]
    arrays = [jnp.asarray(array, dtype) for array in (x, *layers)]
    if not native.serves(*arrays):
        return _perceptron_by_xla(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=_perceptron_by_us, default=_perceptron_by_xla)


def _perceptron_by_xla(x: Array, w1: Array, b1: Array, *layers: Array) -> tuple[Array, ...]:
    activations = gelu(x @ w1 + b1)
    return _linear_by_xla(activations, *layers) if layers else (activations,)


_perceptron_by_us = native.differentiable(
    native.perceptron, native.perceptron_gradient, _perceptron_by_xla
)


def linear(x: Float[Array, "batch inputs"], layers: Sequence[Any]) -> tuple[Array, ...]:
    """The outputs of each of some `nnx.Linear` for the same vectors.

    On a CPU, in float32 and float64, they are `puffer_jax.native.linear`, where that can be built,
    and have no forward-mode derivatives (`jax.jvp`). Elsewhere they are XLA's.
    """
    if not all(type(layer) is nnx.Linear and layer.bias is not None for layer in layers):
        return tuple(layer(x) for layer in layers)
    weights = [array for layer in layers for array in (layer.kernel[...], layer.bias[...])]
    arrays = [jnp.asarray(array) for array in (x, *weights)]
    dtypes = {layer.dtype or x.dtype for layer in layers}
    if dtypes != {x.dtype} or not native.serves(*arrays):
        return tuple(layer(x) for layer in layers)
    return jax.lax.platform_dependent(*arrays, cpu=_linear_by_us, default=_linear_by_xla)


def _linear_by_xla(x: Array, *layers: Array) -> tuple[Array, ...]:
    return tuple(x @ w + b for w, b in zip(layers[::2], layers[1::2], strict=True))


_linear_by_us = native.differentiable(native.linear, native.linear_gradient, _linear_by_xla)


def recurrence(
    a: Float[Array, "rows time"], b: Float[Array, "rows time"]
) -> Float[Array, "rows time"]:
    """The y with y[:, t] = a[:, t] + b[:, t] * y[:, t + 1], from the last on.

    On a CPU, in float32 and float64, it is `puffer_jax.native.recurrence`, where that can be built,
    and has no forward-mode derivatives (`jax.jvp`). Elsewhere it is XLA's.
    """

    def by_xla(a: Array, b: Array) -> Array:
        def backward(y: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
            y = x[0] + x[1] * y
            return y, y

        last = jnp.zeros_like(a, shape=a.shape[:1])
        return jax.lax.scan(backward, last, (a.T, b.T), reverse=True, unroll=8)[1].T

    if not native.serves(a, b):
        return by_xla(a, b)
    return jax.lax.platform_dependent(a, b, cpu=native.recurrence, default=by_xla)


def flatten(x: Float[Array, "batch _ _ _"]) -> Array:
    """(batch, C, H, W) -> (batch, C*H*W)."""
    return x.reshape(x.shape[0], -1)


def flatten_channels_first(x: Float[Array, "batch height width channels"]) -> Array:
    """(batch, H, W, C) -> (batch, C*H*W), the order of torch's Linear weights."""
    return flatten(x.transpose(0, 3, 1, 2))


def max_pool(x: Float[Array, "batch height width channels"]) -> Array:
    """Torch's `max_pool2d(x, kernel_size=3, stride=2, padding=1)`: pads with -inf on all sides.

    Of equal numbers in a window the first one takes the gradient, as in torch. No forward-mode
    derivatives (`jax.jvp`) on CPUs.
    """
    if not native.serves(x):
        return _max_pool_by_xla(x)
    return jax.lax.platform_dependent(x, cpu=_max_pool_by_us, default=_max_pool_by_xla)


def _max_pool_by_xla(x: Array) -> Array:
    padding: Any = ((1, 1), (1, 1))  # Flax's annotation knows only its string forms
    return nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=padding)


_max_pool_by_us = native.differentiable(native.max_pool, native.max_pool_gradient, _max_pool_by_xla)


@dataclass(frozen=True)
class Deferred:
    """In the place of a function that the layer after it does itself, as `Conv2d`'s `rectify`.

    Attributes:
        function: the one that is meant.
    """

    function: Callable[[Array], Array]

    def __call__(self, x: Array) -> Array:
        """`x` as it is."""
        return x


class Conv2d(nnx.Conv):
    """Torch's `Conv2d` for square windows, images (batch, H, W, channels), fast on CPUs, too.

    Starts with zeros; `layer_init` and `torch_init` know it.

    Args:
        in_features: channels that come in.
        out_features: channels that go out.
        window: rows and columns of the kernel.
        stride: of both.
        padding: rows and columns of zeros on all sides.
        channels_first: images come in as (batch, channels, H, W), as many environments give them.
        rectify: a ReLU comes first.
        out_channels_first: images go out as (batch, channels, H, W).
        rngs: stream `params`.
        dtype: of the computation (None: that of the parameters).
        param_dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        window: int,
        stride: int = 1,
        padding: int = 0,
        *,
        channels_first: bool = False,
        rectify: bool = False,
        out_channels_first: bool = False,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__(
            in_features,
            out_features,
            (window, window),
            stride,
            padding=padding,
            kernel_init=jax.nn.initializers.zeros,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.stride = stride
        self.pad = padding
        self.channels_first = channels_first
        self.rectify = rectify
        self.out_channels_first = out_channels_first

    def __call__(self, images: Array, out_sharding: Any = None) -> Float[Array, "batch _ _ _"]:
        """Images (batch, H', W', channels), or with these first; see `convolution`."""
        dtype = self.param_dtype if self.dtype is None else self.dtype
        assert self.bias is not None
        kernel, bias = (jnp.asarray(p[...], dtype) for p in (self.kernel, self.bias))
        windows = native.Windows(
            (self.stride, self.stride),
            (self.pad, self.pad),
            self.channels_first,
            self.rectify,
            self.out_channels_first,
        )
        return convolution(images, kernel, bias, windows)


def convolution(
    x: Array,
    kernel: Float[Array, "window_height window_width inputs outputs"],
    bias: Float[Array, "outputs"],
    windows: native.Windows,
) -> Float[Array, "batch _ _ _"]:
    """Torch's `conv2d` of images (batch, H, W, inputs), or (batch, inputs, H, W).

    The result is (batch, H', W', outputs), or with `windows.out_channels_first` (batch, outputs,
    H', W'). Images of bytes (uint8) stand for numbers from 0 to 1: they are divided by 255. With
    `windows.rectify` a ReLU comes first.

    On a CPU, in float32 and float64, it is `puffer_jax.native.convolution`, where that can be
    built, and has no forward-mode derivatives (`jax.jvp`). Elsewhere it is XLA's.
    """
    if windows.channels_first and x.dtype != jnp.uint8:
        x, windows = x.transpose(0, 2, 3, 1), windows._replace(channels_first=False)

    sides = x.shape[2:] if windows.channels_first else x.shape[1:3]
    fits = all(
        side + 2 * pad >= size
        for side, pad, size in zip(sides, windows.pads, kernel.shape, strict=False)
    )
    by_xla = partial(_convolution_by_xla, windows)
    if not (x.size and fits and native.serves(kernel, bias)):
        return by_xla(x, kernel, bias)
    x = x if x.dtype == jnp.uint8 else x.astype(kernel.dtype)
    by_us = _convolution_by_us(windows)
    return jax.lax.platform_dependent(x, kernel, bias, cpu=by_us, default=by_xla)


def _convolution_by_xla(windows: native.Windows, x: Array, kernel: Array, bias: Array) -> Array:
    numbers = x.astype(kernel.dtype)
    numbers = numbers / 255.0 if x.dtype == jnp.uint8 else numbers
    numbers = jax.nn.relu(numbers) if windows.rectify else numbers
    first = windows.channels_first, windows.out_channels_first
    images, result = ("NCHW" if channels_first else "NHWC" for channels_first in first)
    layout = images, "HWIO", result
    pads = [(pad, pad) for pad in windows.pads]
    convolve = partial(jax.lax.conv_general_dilated, dimension_numbers=layout)
    bias = bias[:, None, None] if windows.out_channels_first else bias
    return convolve(numbers, kernel, windows.strides, pads) + bias


@cache
def _convolution_by_us(windows: native.Windows) -> Any:
    functions = native.convolution, native.convolution_gradient, _convolution_by_xla
    return native.differentiable(*(partial(function, windows) for function in functions))


class LSTM(nnx.Module):
    """One LSTM layer with torch's parameters, gate order (i, f, g, o) and initialisation.

    Both biases are kept: each gets the same gradient, so with only their sum as a parameter an
    optimizer like Adam would move it at half the speed.

    Parameters are stored as torch stores them: `weight_ih_l0` (4*hidden, input), `weight_hh_l0`
    (4*hidden, hidden), `bias_ih_l0` and `bias_hh_l0` (4*hidden,), all U(-1/sqrt(hidden), +).

    Reference: `torch.nn.LSTM` and `torch.nn.LSTMCell`; Hochreiter and Schmidhuber 1997.
    """

    # Flax's own merge and clone sort attributes; the order is that of a .bin file.
    torch_names: ClassVar = {
        name: name for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    }

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.param_dtype = param_dtype
        bound = 1 / math.sqrt(hidden_size)
        rows = 4 * hidden_size

        def parameter(*shape: int) -> nnx.Param:
            return nnx.Param(_uniform(rngs, shape, bound, param_dtype))

        self.weight_ih_l0 = parameter(rows, input_size)
        self.weight_hh_l0 = parameter(rows, hidden_size)
        self.bias_ih_l0 = parameter(rows)
        self.bias_hh_l0 = parameter(rows)

    def _weights(self) -> tuple[Array, Array, Array, Array]:
        biases = self.bias_ih_l0[...], self.bias_hh_l0[...]
        return self.weight_ih_l0[...], self.weight_hh_l0[...], *biases

    def step(
        self, x: Float[Array, "batch input"], h: Float[Array, "batch hidden"], c: Array
    ) -> tuple[Array, Array]:
        """One step: inputs and state (h, c) in, new state (h, c) out; h is the output."""
        return lstm_step(*self._weights(), x, h, c, self.dtype)

    def scan(
        self,
        x: Float[Array, "batch time input"],
        h: Float[Array, "batch hidden"],
        c: Array,
        done: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
        """All steps: outputs (batch, time, hidden) and the last state (h, c).

        Where `done[:, t]` is set the state is zeroed before step t: `x[:, t]` begins an episode.
        """
        weight_ih, weight_hh, bias_ih, bias_hh = self._weights()
        return lstm_scan(weight_ih, weight_hh, bias_ih + bias_hh, x, h, c, done, self.dtype)


def _gates(
    weight: Array, bias: Array, inputs: Float[Array, "batch input_and_hidden"], dtype: Any
) -> tuple[Array, Array, Array, Array]:
    """The gates (i, f, g, o) after their non-linearities, each (batch, hidden)."""
    if dtype is None:
        gates = inputs @ weight.T + bias
    else:
        gates = (inputs.astype(dtype) @ weight.astype(dtype).T).astype(bias.dtype) + bias
    i, f, g, o = jnp.split(gates, 4, axis=1)
    return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def lstm_cell(
    weight: Float[Array, "gates input_and_hidden"],
    bias: Float[Array, "gates"],
    x: Float[Array, "batch input"],
    h: Float[Array, "batch hidden"],
    c: Float[Array, "batch hidden"],
    dtype: Any = None,
) -> tuple[Array, Array]:
    """The one LSTM step behind both evaluation and training.

    Input and state share one matmul, in `dtype` (default: that of the weights); the gates and
    the state stay in the dtype of the weights, so a carried state never changes its dtype.
    """
    i, f, g, o = _gates(weight, bias, _join(x, h), dtype)
    c = f * c + i * g
    return o * jnp.tanh(c), c


def lstm_step(
    weight_ih: Float[Array, "gates input"],
    weight_hh: Float[Array, "gates hidden"],
    bias_ih: Float[Array, "gates"],
    bias_hh: Float[Array, "gates"],
    x: Float[Array, "batch input"],
    h: Float[Array, "batch hidden"],
    c: Float[Array, "batch hidden"],
    dtype: Any = None,
) -> tuple[Array, Array]:
    """`lstm_cell` with the weights apart; on a CPU `puffer_jax.native.lstm_step`."""
    arrays = weight_ih, weight_hh, bias_ih, bias_hh, x, h, c
    by_xla = partial(_step_by_xla, dtype)
    if not _kernels_take(dtype, x, *arrays[:4], h, c):
        return by_xla(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=_step_on_cpu, default=by_xla)


def _kernels_take(dtype: Any, x: Array, *others: Array) -> bool:
    """Whether the CPU kernels compute in `dtype`; `x` is cast to that of the others."""
    return dtype in (None, others[0].dtype) and x.size > 0 and native.serves(*others)


def _step_by_xla(dtype: Any, *arrays: Array) -> tuple[Array, Array]:
    weight_ih, weight_hh, bias_ih, bias_hh, x, h, c = arrays
    weight = jnp.concatenate([weight_ih, weight_hh], axis=1)
    return lstm_cell(weight, bias_ih + bias_hh, x, h, c, dtype)


@jax.custom_vjp
def _step_on_cpu(*arrays: Array) -> tuple[Array, Array]:
    *weights, x, h, c = arrays
    return native.lstm_step(*weights, x.astype(h.dtype), h, c)


_step_on_cpu.defvjp(
    lambda *arrays: (_step_on_cpu(*arrays), arrays),
    # Steps are for acting: their gradient is rarely asked for.
    lambda arrays, d_state: jax.vjp(partial(_step_by_xla, None), *arrays)[1](d_state),
)


def _join(x: Array, h: Array) -> Array:
    return jnp.concatenate([x.astype(h.dtype), h], axis=1)


# Jitted here so that eager calls do not trace and compile the loop anew each time.
@partial(jax.jit, static_argnames="dtype")
def lstm_scan(
    weight_ih: Float[Array, "gates input"],
    weight_hh: Float[Array, "gates hidden"],
    bias: Float[Array, "gates"],
    x: Float[Array, "batch time input"],
    h: Float[Array, "batch hidden"],
    c: Float[Array, "batch hidden"],
    done: Bool[Array, "batch time"] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
    """`lstm_cell` over time; the state is zeroed before steps where `done` is set.

    On a CPU it is `puffer_jax.native.lstm`, where that can be built. Elsewhere its gradient is
    written out (`jax.custom_vjp`): the gates are kept, the backward loop does one matmul a step,
    and those for weights and inputs follow it; autodiff keeps twice as much. The price: no
    forward-mode derivatives (`jax.jvp`, `jax.hessian`).
    """
    arrays = weight_ih, weight_hh, bias, x, h, c, done
    by_xla = partial(_scan_by_xla, dtype)
    if not _kernels_take(dtype, x, *arrays[:3], h, c):
        return by_xla(*arrays)

    def by_us(*arrays: Any) -> tuple[Array, Array, Array]:
        *weights, x, h, c, done = arrays
        done = jnp.zeros(x.shape[:2], bool) if done is None else done
        return _lstm_by_us(*weights, x.astype(h.dtype), h, c, done)

    return jax.lax.platform_dependent(*arrays, cpu=by_us, default=by_xla)


def _scan_by_xla(
    dtype: Any, weight_ih: Array, weight_hh: Array, *others: Any
) -> tuple[Array, Array, Array]:
    return _lstm_scan(dtype, jnp.concatenate([weight_ih, weight_hh], axis=1), *others)


def _at(t: Array, sequences: Any) -> Any:
    # Reading and writing rows of (batch, time, ...) saves two transposed copies of the sequence.
    pick = partial(jax.lax.dynamic_index_in_dim, index=t, axis=1, keepdims=False)
    return jax.tree.map(pick, sequences)


def _put(sequence: Array, t: Array, value: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(sequence, value, t, axis=1)


def _keep(state: tuple[Array, ...], done: Array | None) -> tuple[Array, ...]:
    """The state, zero in the rows of `done`."""
    if done is None:
        return state
    return tuple(jnp.where(done[:, None], 0, part) for part in state)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lstm_scan(
    dtype: Any, weight: Array, bias: Array, x: Array, h: Array, c: Array, done: Array | None
) -> tuple[Array, Array, Array]:
    # The results go where the inputs were if they are of a kind: on CPUs the first touch of fresh
    # memory costs as much as the arithmetic done on it.
    shape = (*x.shape[:2], h.shape[1])
    in_place = x.shape == shape and x.dtype == h.dtype

    def step(carry: tuple[Array, ...], t: Array):
        *state, outputs = carry
        x_t, done_t = _at(t, (outputs if in_place else x, done))
        h, c = _keep(tuple(state), done_t)
        h, c = lstm_cell(weight, bias, x_t, h, c, dtype)
        return (h, c, _put(outputs, t, h)), None

    start = x if in_place else jax.lax.empty(shape, h.dtype)
    (h, c, outputs), _ = jax.lax.scan(step, (h, c, start), jnp.arange(x.shape[1]))
    return outputs, h, c


def _lstm_scan_forward(
    dtype: Any, weight: Array, bias: Array, x: Array, h: Array, c: Array, done: Array | None
) -> tuple[Any, Any]:
    def step(carry: tuple[Array, ...], t: Array):
        *state, outputs = carry
        x_t, done_t = _at(t, (x, done))
        h, c = _keep(tuple(state), done_t)
        i, f, g, o = _gates(weight, bias, _join(x_t, h), dtype)
        c = f * c + i * g
        # XLA:CPU runs what it fuses into a write to a buffer of the loop on one core.
        h, *kept = jax.lax.optimization_barrier((o * jnp.tanh(c), c, i, f, g, o))
        return (h, kept[0], _put(outputs, t, h)), kept

    time = x.shape[1]
    outputs = jax.lax.empty((h.shape[0], time, h.shape[1]), h.dtype)
    (h_last, c_last, outputs), kept = jax.lax.scan(step, (h, c, outputs), jnp.arange(time))
    return (outputs, h_last, c_last), (weight, x, h, c, done, outputs, kept)


def _lstm_scan_backward(dtype: Any, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    weight, x, h, c, done, outputs, (cs, *gates) = residuals
    d_outputs, dh_last, dc_last = cotangents
    inputs, dtype = x.shape[2], weight.dtype if dtype is None else dtype
    of_x, of_h = jnp.split(weight.astype(dtype), (inputs,), axis=1)

    def step(carry: tuple[Array, ...], row: Any):
        dh, dc, c_t, d_gates = carry
        t, (i, f, g, o) = row
        d_h, done_t = _at(t, (d_outputs, done))
        c_before = jnp.where(t > 0, cs[jnp.maximum(t - 1, 0)], c)
        (c_kept,) = _keep((c_before,), done_t)
        tanh_c = jnp.tanh(c_t)
        dh = dh + d_h
        dc = dc + dh * o * (1 - tanh_c * tanh_c)
        parts = [
            dc * g * i * (1 - i),
            dc * c_kept * f * (1 - f),
            dc * i * (1 - g * g),
            dh * tanh_c * o * (1 - o),
        ]
        now = jax.lax.optimization_barrier(jnp.concatenate(parts, axis=1).astype(dtype))
        dh, dc = _keep(((now @ of_h).astype(h.dtype), dc * f), done_t)
        return (dh, dc, c_before, _put(d_gates, t, now)), None

    d_gates = jax.lax.empty((*x.shape[:2], weight.shape[0]), dtype)
    steps = jnp.arange(x.shape[1]), gates
    (dh, dc, _, d_gates), _ = jax.lax.scan(
        step, (dh_last, dc_last, cs[-1], d_gates), steps, reverse=True
    )
    # The rest needs no loop.
    h_before = jnp.concatenate([h[:, None], outputs[:, :-1]], axis=1)
    if done is not None:
        h_before = jnp.where(done[..., None], 0, h_before)
    joined = jnp.concatenate([x.astype(dtype), h_before.astype(dtype)], axis=2)
    flat, joined = (rows.reshape(-1, rows.shape[2]) for rows in (d_gates, joined))
    d_weight = jnp.matmul(flat.T, joined, preferred_element_type=weight.dtype)
    dx = (flat @ of_x).astype(x.dtype).reshape(x.shape)
    return d_weight, flat.sum(0, dtype=h.dtype), dx, dh, dc, None


_lstm_scan.defvjp(_lstm_scan_forward, _lstm_scan_backward)

_lstm_by_us = native.differentiable(native.lstm, native.lstm_gradient, partial(_scan_by_xla, None))
