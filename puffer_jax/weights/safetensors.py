"""`.safetensors`: torch's names and layouts, with a description of the policy."""

from collections.abc import Mapping
from pathlib import Path

from flax import nnx

from puffer_jax.base.files import write_atomically
from puffer_jax.base.text import from_json, to_json
from puffer_jax.weights.description import describe
from puffer_jax.weights.pt import Contents
from puffer_jax.weights.state_dicts import named_parameters

_METADATA_KEY = "puffer_jax"


def save_safetensors(policy: nnx.Module, path: Path) -> None:
    """Write the file."""
    from safetensors.numpy import save

    # Tied keys are left out: the format has no tied tensors, and loading restores them.
    tensors = {name: p.to_torch() for name, p in named_parameters(policy)[0].items()}
    metadata = {"format": "pt", _METADATA_KEY: to_json(describe(policy))}
    data = save(tensors, metadata)
    write_atomically(path, lambda file: file.write(data))


def read_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> Contents:
    """Read the file; it names its own shapes. Raises ValueError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # its errors name the path; those of safe_open may not
        pass
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    # AttributeError: a number format that NumPy does not have.
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"not a readable safetensors file: {error}") from error
    return tensors, from_json(metadata.get(_METADATA_KEY, "null"))
