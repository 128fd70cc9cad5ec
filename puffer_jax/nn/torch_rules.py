"""How torch names and lays out the parameters of each kind of layer.

The rules of all layers are one registry, which `rule` adds to. Files, state_dicts, optimizers and
comparisons ask it and nothing else.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array

from puffer_jax.nn.params import Shape

Tensor = Array | np.ndarray
"""A parameter in either layout, as an array of JAX or NumPy."""


def same(array: Any) -> Any:
    """The array itself, for parameters that both sides lay out alike; also a NumPy scalar."""
    return array


def same_back(tensor: Any, shape: Shape) -> Any:
    """The inverse of `same`."""
    return tensor


@dataclass(frozen=True)
class Layout:
    """Where Flax holds the numbers of one of torch's tensors, and in what order.

    Both functions only rearrange numbers: they transpose, reshape, join or cut. They are given
    gradients and optimizer moments as well, as arrays of NumPy or JAX or tracers.

    Attributes:
        held: the layer's attribute with the numbers, with dots where it is a layer's within
            ("dense.kernel"); several, if the tensor joins them.
        to_torch: (the attributes' arrays) -> the tensor.
        from_torch: (the tensor, the attributes' shapes) -> the array; a tuple of them if `held` is
            one.
    """

    held: str | tuple[str, ...]
    to_torch: Callable[..., Any] = same
    from_torch: Callable[..., Any] = same_back

    @property
    def paths(self) -> tuple[str, ...]:
        """The attributes, also if it is one."""
        return (self.held,) if isinstance(self.held, str) else self.held

    def unpack(self, tensor: Tensor, *shapes: Shape) -> tuple[Tensor, ...]:
        """The arrays of all attributes."""
        arrays = self.from_torch(tensor, *shapes)
        return (arrays,) if isinstance(self.held, str) else tuple(arrays)


@dataclass(frozen=True)
class Constant:
    """A tensor that torch's layer computes with and Flax's does not, as if it had this value.

    It is written as that value; reading another one is an error, for Flax's layer would compute
    something else.

    Attributes:
        value: the layer -> the tensor.
        why: what to say when it is another one.
    """

    value: Callable[[Any], Tensor]
    why: str


Rule = Mapping[str, Layout | Constant | None]
"""Torch's name of a tensor -> what Flax has of it; None: nothing, and nothing is lost by that."""


def _linear(kernel: Tensor) -> Tensor:
    return kernel.T


def _linear_back(tensor: Tensor, shape: Shape) -> Tensor:
    return tensor.T


def _conv(kernel: Tensor) -> Tensor:
    # (*window, in, out) -> (out, in, *window)
    spatial = range(kernel.ndim - 2)
    return kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *spatial)


def _conv_back(tensor: Tensor, shape: Shape) -> Tensor:
    return tensor.transpose(*range(2, tensor.ndim), 1, 0)


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


def _attention_out_back(tensor: Tensor, shape: Shape) -> Tensor:
    return tensor.T.reshape(shape)


def _slope(slope: Tensor) -> Tensor:
    return slope.reshape(1)


def _slope_back(tensor: Tensor, shape: Shape) -> Tensor:
    return tensor.reshape(shape)


def _no_bias(cell: nnx.GRUCell) -> np.ndarray:
    return np.zeros(3 * cell.hidden_features, cell.dense_h.kernel.dtype)


def _swapped(held: str) -> Layout:
    return Layout(held, _linear, _linear_back)


_QKV = ("query", "key", "value")

RULES: dict[type, Rule] = {
    nnx.Linear: {"weight": _swapped("kernel"), "bias": Layout("bias")},
    nnx.Conv: {"weight": Layout("kernel", _conv, _conv_back), "bias": Layout("bias")},
    nnx.Embed: {"weight": Layout("embedding")},
    nnx.LayerNorm: {"weight": Layout("scale"), "bias": Layout("bias")},
    nnx.GroupNorm: {"weight": Layout("scale"), "bias": Layout("bias")},
    nnx.RMSNorm: {"weight": Layout("scale")},
    nnx.BatchNorm: {
        "weight": Layout("scale"),
        "bias": Layout("bias"),
        "running_mean": Layout("mean"),
        "running_var": Layout("var"),
        # How long they have been averaged: torch fills it in, and uses it in training only.
        "num_batches_tracked": None,
    },
    nnx.PReLU: {"weight": Layout("negative_slope", _slope, _slope_back)},
    nnx.GRUCell: {
        "weight_ih": _swapped("dense_i.kernel"),
        "weight_hh": _swapped("dense_h.kernel"),
        "bias_ih": Layout("dense_i.bias"),
        "bias_hh": Constant(
            _no_bias, "nnx.GRUCell adds no bias to the state's product; puffer_jax.GRU does"
        ),
    },
    nnx.MultiHeadAttention: {
        "in_proj_weight": Layout(
            tuple(f"{name}.kernel" for name in _QKV), _attention_in, _attention_in_back
        ),
        "in_proj_bias": Layout(
            tuple(f"{name}.bias" for name in _QKV), _attention_bias, _attention_bias_back
        ),
        "out_proj.weight": Layout("out.kernel", _attention_out, _attention_out_back),
        "out_proj.bias": Layout("out.bias"),
    },
}

# What the tests prove, whatever the shapes, need not be proved for each.
_PROVED = frozenset(entry for rule in RULES.values() for entry in rule.values())

CONTAINERS = (nnx.Sequential, nnx.List, nnx.Dict)


def rule(
    layer: object, tensors: Mapping[str, str | Layout | Constant | None], *, replace: bool = False
) -> None:
    """Say how torch names and lays out the parameters of a kind of layer.

    From then on the layer and its subclasses convert wherever a policy does: state_dicts, files of
    every format, `parity.compare`, optimizers.

    Args:
        layer: its class, an `nnx.Module`.
        tensors: the names of the torch layer's tensors, in the order of its state_dict -> the
            attribute that holds the same array; a `Layout` if it is laid out otherwise; a
            `Constant` if Flax's layer has no such tensor and computes as if it had that value; None
            if it has none, and needs none. A tensor whose attribute is None, a bias that was left
            out say, is left out.
        replace: whether to take the place of a rule that there is.

    Raises:
        TypeError: `layer` is no class of layers, or a tensor is described by something else.
        ValueError: there is a rule already, or this one says nothing, or uses an attribute twice.
            A rule that does not fit the layer is a TypeError where it is first used: an attribute
            that is not there, one that no tensor covers, a `Layout` whose functions are not each
            other's inverse or do more than rearrange.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> class Scaled(nnx.Module):  # torch's has a weight (out, in) and a gain (1,)
        ...     def __init__(self, inputs, outputs, rngs):
        ...         self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)))
        ...         self.gain = nnx.Param(jax.numpy.ones(1))
        ...
        ...     def __call__(self, x):
        ...         return x @ self.kernel[...] * self.gain[...]
        >>> swapped = puffer_jax.weights.Layout("kernel", lambda k: k.T, lambda w, shape: w.T)
        >>> puffer_jax.weights.rule(Scaled, {"weight": swapped, "gain": "gain"})
        >>> puffer_jax.state_dict(Scaled(2, 3, nnx.Rngs(0)))["weight"].shape
        (3, 2)
    """
    if not (isinstance(layer, type) and issubclass(layer, nnx.Module)) or layer is nnx.Module:
        got = getattr(layer, "__name__", None) or f"an object of {type(layer).__name__}"
        raise TypeError(f"layer must be a class that derives from nnx.Module; got {got}")
    if layer in RULES and not replace:
        raise ValueError(f"there is a rule for {layer.__name__}; replace=True takes its place")
    if not tensors:
        raise ValueError(f"the rule of {layer.__name__} names no tensors")
    entries = {
        name: Layout(entry) if isinstance(entry, str) else entry for name, entry in tensors.items()
    }
    wrong = [
        f"{name!r}: {entry!r}"
        for name, entry in entries.items()
        if not (isinstance(entry, Layout | Constant | None) and isinstance(name, str) and name)
    ]
    if wrong:
        raise TypeError(
            f"the rule of {layer.__name__} maps names to an attribute's name, a Layout, a Constant "
            f"or None; got {', '.join(wrong)}"
        )
    paths = [
        path for entry in entries.values() if isinstance(entry, Layout) for path in entry.paths
    ]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"the rule of {layer.__name__} uses twice: {', '.join(twice)}")
    RULES[layer] = entries


def rule_for(module: object) -> Rule | None:
    """The rule of a layer's class, or of the nearest class it derives from; None: no rule."""
    return next((RULES[cls] for cls in type(module).__mro__ if cls in RULES), None)


def held(layer: object, layout: Layout) -> tuple[nnx.Variable, ...] | None:
    """The variables that a layout speaks of; None if the layer was built without them.

    Raises:
        TypeError: the layout does not fit the layer; the message has no name of either.
    """
    found = [_attribute_at(layer, path) for path in layout.paths]
    if all(variable is None for variable in found):
        return None
    for path, variable in zip(layout.paths, found, strict=True):
        if not isinstance(variable, nnx.Variable):
            raise TypeError(f"{path} is no nnx.Variable but {type(variable).__name__}")
    if layout not in _PROVED and layout.to_torch is not same:
        if problem := _fault(layout, tuple(tuple(variable.shape) for variable in found)):
            raise TypeError(problem)
    return tuple(found)


def _attribute_at(module: object, path: str) -> Any:
    for name in path.split("."):
        if not hasattr(module, name):
            raise TypeError(f"there is no attribute {path}")
        module = getattr(module, name)
    return module


@lru_cache(maxsize=1024)
def _fault(layout: Layout, shapes: tuple[Shape, ...]) -> str:
    """What is wrong with a layout's two functions, or an empty text."""
    sizes = [math.prod(shape) for shape in shapes]
    numbers = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    arrays = [part.reshape(shape) for part, shape in zip(numbers, shapes, strict=True)]
    try:
        tensor = np.asarray(layout.to_torch(*arrays))
        back = [np.asarray(array) for array in layout.unpack(tensor, *shapes)]
    except Exception as error:
        return f"its functions fail on {', '.join(map(str, shapes))}: {error!r}"
    if not np.array_equal(np.sort(tensor, axis=None), np.arange(sum(sizes))):
        return f"to_torch must only rearrange the numbers of {', '.join(layout.paths)}"
    if len(back) != len(arrays) or not all(map(np.array_equal, back, arrays)):
        found = ", ".join(str(array.shape) for array in back)
        return (
            f"from_torch is not the inverse of to_torch: of {', '.join(layout.paths)} of shape "
            f"{', '.join(map(str, shapes))} it makes {found}"
            + (", in another order" if [a.shape for a in back] == list(shapes) else "")
        )
    return ""
