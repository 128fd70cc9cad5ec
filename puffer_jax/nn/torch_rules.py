"""How torch names and lays out the parameters of each kind of layer."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array

from puffer_jax.nn.params import Shape

Tensor = Array | np.ndarray
"""A parameter in either layout, as an array of JAX or NumPy."""


def rule_for(module: object) -> "tuple[Rule, ...] | None":
    """The rules of a layer's class, or of the nearest class it derives from; None: no rules."""
    return next((RULES[cls] for cls in type(module).__mro__ if cls in RULES), None)


def attribute_at(module: object, path: str) -> Any:
    """The attribute at a path of names with dots between them."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


Rule = tuple[str, tuple[str, ...], Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]
"""Torch's name, paths of Flax attributes, Flax arrays -> tensor, (tensor, *shapes) -> arrays."""


def same(array: Any) -> Any:
    """The array itself, for parameters that both sides lay out alike; also a NumPy scalar."""
    return array


def same_back(tensor: Any, shape: Shape) -> tuple[Any]:
    """The inverse of `same`."""
    return (tensor,)


def _linear(kernel: Tensor) -> Tensor:
    return kernel.T


def _linear_back(tensor: Tensor, shape: Shape) -> tuple[Tensor]:
    return (tensor.T,)


def _conv(kernel: Tensor) -> Tensor:
    # (*window, in, out) -> (out, in, *window)
    spatial = range(kernel.ndim - 2)
    return kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *spatial)


def _conv_back(tensor: Tensor, shape: Shape) -> tuple[Tensor]:
    return (tensor.transpose(*range(2, tensor.ndim), 1, 0),)


def _concatenate(arrays: list[Tensor]) -> Tensor:
    return arrays[0].__array_namespace__().concat(arrays)  # NumPy's arrays, JAX's and tracers


def _attention_in(*kernels: Tensor) -> Tensor:
    # three (in, heads, head_dim) -> (3 * heads * head_dim, in)
    return _concatenate([kernel.reshape(kernel.shape[0], -1).T for kernel in kernels])


def _attention_in_back(tensor: Tensor, *shapes: Shape) -> tuple[Tensor, ...]:
    rows = tensor.shape[0] // 3
    return tuple(
        tensor[i * rows : (i + 1) * rows].T.reshape(shape) for i, shape in enumerate(shapes)
    )


def _attention_bias(*biases: Tensor) -> Tensor:
    return _concatenate([bias.reshape(-1) for bias in biases])


def _attention_bias_back(tensor: Tensor, *shapes: Shape) -> tuple[Tensor, ...]:
    rows = tensor.shape[0] // 3
    return tuple(tensor[i * rows : (i + 1) * rows].reshape(s) for i, s in enumerate(shapes))


def _attention_out(kernel: Tensor) -> Tensor:
    # (heads, head_dim, out) -> (out, heads * head_dim)
    return kernel.reshape(-1, kernel.shape[-1]).T


def _attention_out_back(tensor: Tensor, shape: Shape) -> tuple[Tensor]:
    return (tensor.T.reshape(shape),)


_BIAS: Rule = ("bias", ("bias",), same, same_back)

_SCALE: Rule = ("weight", ("scale",), same, same_back)

_QKV = ("query", "key", "value")

RULES: dict[type, tuple[Rule, ...]] = {
    nnx.Linear: (("weight", ("kernel",), _linear, _linear_back), _BIAS),
    nnx.Conv: (("weight", ("kernel",), _conv, _conv_back), _BIAS),
    nnx.Embed: (("weight", ("embedding",), same, same_back),),
    nnx.LayerNorm: (_SCALE, _BIAS),
    nnx.GroupNorm: (_SCALE, _BIAS),
    nnx.RMSNorm: (_SCALE,),
    nnx.MultiHeadAttention: (
        (
            "in_proj_weight",
            tuple(f"{name}.kernel" for name in _QKV),
            _attention_in,
            _attention_in_back,
        ),
        (
            "in_proj_bias",
            tuple(f"{name}.bias" for name in _QKV),
            _attention_bias,
            _attention_bias_back,
        ),
        ("out_proj.weight", ("out.kernel",), _attention_out, _attention_out_back),
        ("out_proj.bias", ("out.bias",), same, same_back),
    ),
}

CONTAINERS = (nnx.Sequential, nnx.List, nnx.Dict)
