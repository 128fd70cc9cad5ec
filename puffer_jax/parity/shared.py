"""What both sides share."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


class _Run(NamedTuple):
    outputs: Arrays
    gradients: Arrays
    layers: dict[str, list[np.ndarray]]


class _Inputs(NamedTuple):
    observations: Any
    state: Mapping[str, np.ndarray] | None
    done: np.ndarray | None
    state_names: tuple[str, ...]  # none: the policies are not recurrent
    evaluate: bool
    seed: int

    @property
    def recurrent(self) -> bool:
        return bool(self.state_names)


def _named(output: Any, prefix: str = "") -> dict[str, Any]:
    """A policy's output as named arrays; of a distribution, its loc and scale."""
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
    return {k: v for name, value in items.items() for k, v in _named(value, name).items()}


def _outputs(result: Any) -> dict[str, Any]:
    if isinstance(result, tuple) and len(result) in (2, 3):
        return _named(dict(zip(("logits", "values", "state"), result, strict=False)))
    return _named(result, "output")


def _decode_encoded(policy: Any) -> Callable[[Any], Any]:
    return lambda observations: policy.decode_actions(policy.encode_observations(observations))


def _first_step(observations: Any) -> Any:
    return jax.tree.map(lambda x: x[:, 0], observations)


def _loss_weights(outputs: dict[str, Any], seed: int) -> Arrays:
    # A stream for each name: an output missing on one side must not shift the others. And
    # float32 numbers, so that both precisions differentiate the same loss.
    return {
        name: np.random.default_rng([seed, zlib.crc32(name.encode())])
        .standard_normal(tuple(output.shape))
        .astype(np.float32)
        for name, output in outputs.items()
        if not name.startswith("state.")
    }


def _cast_floats(tree: Any, dtype: Any) -> Any:
    def cast(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
