"""What both sides share."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

Arrays = dict[str, np.ndarray]

# A policy's outputs by name, before they are NumPy's: JAX's arrays or torch's tensors.
Outputs = dict[str, Any]

# A `torch.nn.Module`; torch is optional and imported late, so no annotation can name its class.
TorchModule = Any


class Call(NamedTuple):
    """One call of a layer: its output, and its first argument if that is an array."""

    output: Any
    input: Any


class Run(NamedTuple):
    """What a policy computed in one precision.

    Attributes:
        outputs: those of the training call, and those of `forward_eval` as "eval.*".
        gradients: of the loss with respect to every parameter, by torch's names.
        layers: each layer's calls within the training call.
        differentiated: the outputs that make up the loss.
    """

    outputs: Arrays
    gradients: Arrays
    layers: dict[str, list[Call]]
    differentiated: frozenset[str]


class Inputs(NamedTuple):
    """What both policies are given, see `compare`; `evaluate`: whether to run `forward_eval`."""

    observations: PyTree
    state: Mapping[str, np.ndarray] | None
    done: np.ndarray | None
    state_names: tuple[str, ...]  # empty if the policies are not recurrent
    evaluate: bool
    seed: int

    @property
    def recurrent(self) -> bool:
        """Whether the policies carry a state from step to step."""
        return bool(self.state_names)


def named(output: PyTree, prefix: str = "") -> Outputs:
    """A policy's output as named arrays; for a distribution, its loc and scale."""
    if output is None:
        return {}
    if hasattr(output, "loc") and hasattr(output, "scale"):
        items = {f"{prefix}.loc": output.loc, f"{prefix}.scale": output.scale}
    elif isinstance(output, Mapping):
        items = {f"{prefix}.{key}" if prefix else key: value for key, value in output.items()}
    elif isinstance(output, tuple | list):
        items = {f"{prefix}[{i}]": value for i, value in enumerate(output)}
    else:
        return {prefix: output}
    return {k: v for name, value in items.items() for k, v in named(value, name).items()}


def named_outputs(result: PyTree) -> Outputs:
    """What a policy returned, as named arrays: logits, values and state, or one output."""
    if isinstance(result, tuple) and len(result) in (2, 3):
        return named(dict(zip(("logits", "values", "state"), result, strict=False)))
    return named(result, "output")


def decode_encoded(policy: Any) -> Callable[[PyTree], PyTree]:
    """The forward pass of a policy that has only its two halves."""
    return lambda observations: policy.decode_actions(policy.encode_observations(observations))


def first_step(observations: PyTree) -> PyTree:
    """(batch, time, *obs) -> (batch, *obs), for every leaf."""
    return jax.tree.map(lambda x: x[:, 0], observations)


def loss_weights(outputs: Outputs, seed: int) -> Arrays:
    """What the loss multiplies each output by before summing; states are left out."""
    # A stream for each name, so that an output missing on one side does not shift the others; and
    # float32 numbers, so that both precisions differentiate the same loss.
    return {
        name: np.random.default_rng([seed, zlib.crc32(name.encode())])
        .standard_normal(tuple(output.shape))
        .astype(np.float32)
        for name, output in outputs.items()
        if not name.startswith(("state.", "eval.state."))
    }


def cast_floats(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """The tree as NumPy arrays, the floating ones in `dtype`."""

    def cast(leaf: object) -> np.ndarray:
        array = np.asarray(leaf)
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(cast, tree)
