"""Layers and initialisers with torch's meaning: layer_init, torch_init, LSTM, flatten, pooling."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.convolution import convolution
from puffer_jax.kernels.cpu import library
from puffer_jax.kernels.lstm import lstm_scan, lstm_step
from puffer_jax.kernels.perceptron import (
    _linear_by_us,
    _linear_by_xla,
    _perceptron_by_us,
    _perceptron_by_xla,
)
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


def perceptron(
    x: Float[Array, "batch inputs"], first: Any, heads: Sequence[Any] = ()
) -> tuple[Float[Array, "batch outputs_or_hidden"], ...]:
    """The outputs of each of the heads for `gelu(first(x))`; that itself if there are none.

    All are `nnx.Linear` with bias.

    On a CPU, in float32 and float64, it is `puffer_jax.kernels.cpu.perceptron`, where that can be
    built, and has no forward-mode derivatives (`jax.jvp`). Elsewhere it is XLA's.
    """
    dtype = first.param_dtype if first.dtype is None else first.dtype
    layers = [array for layer in (first, *heads) for array in (layer.kernel[...], layer.bias[...])]
    arrays = [jnp.asarray(array, dtype) for array in (x, *layers)]
    if not library.serves(*arrays):
        return _perceptron_by_xla(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=_perceptron_by_us, default=_perceptron_by_xla)


def linear(x: Float[Array, "batch inputs"], layers: Sequence[Any]) -> tuple[Array, ...]:
    """The outputs of each of some `nnx.Linear` for the same vectors.

    On a CPU, in float32 and float64, they are `puffer_jax.kernels.cpu.linear`, where that can be
    built, and have no forward-mode derivatives (`jax.jvp`). Elsewhere they are XLA's.
    """
    if not all(type(layer) is nnx.Linear and layer.bias is not None for layer in layers):
        return tuple(layer(x) for layer in layers)
    weights = [array for layer in layers for array in (layer.kernel[...], layer.bias[...])]
    arrays = [jnp.asarray(array) for array in (x, *weights)]
    dtypes = {layer.dtype or x.dtype for layer in layers}
    if dtypes != {x.dtype} or not library.serves(*arrays):
        return tuple(layer(x) for layer in layers)
    return jax.lax.platform_dependent(*arrays, cpu=_linear_by_us, default=_linear_by_xla)


def flatten(x: Float[Array, "batch _ _ _"]) -> Array:
    """(batch, C, H, W) -> (batch, C*H*W)."""
    return x.reshape(x.shape[0], -1)


def flatten_channels_first(x: Float[Array, "batch height width channels"]) -> Array:
    """(batch, H, W, C) -> (batch, C*H*W), the order of torch's Linear weights."""
    return flatten(x.transpose(0, 3, 1, 2))


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
        windows = cpu.Windows(
            (self.stride, self.stride),
            (self.pad, self.pad),
            self.channels_first,
            self.rectify,
            self.out_channels_first,
        )
        return convolution(images, kernel, bias, windows)


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
