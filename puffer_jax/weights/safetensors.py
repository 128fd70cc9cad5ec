"""`.safetensors`: torch's names and layouts, a description of the policy, and checksums."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from puffer_jax.base import checksums
from puffer_jax.base.files import write_atomically
from puffer_jax.base.text import Json, from_json, to_json
from puffer_jax.weights.description import describe
from puffer_jax.weights.pt import Contents
from puffer_jax.weights.state_dicts import named_parameters

_DESCRIPTION, _CHECKSUMS = "puffer_jax", "puffer_jax.sha256"

# In the description, of files with checksums; those of version 0.1 have neither.
_CHECKED = {"checked": True}


def save_safetensors(policy: nnx.Module, path: Path) -> None:
    """Write the file."""
    from safetensors.numpy import save

    # Tied keys are left out: the format has no tied tensors, and loading restores them.
    tensors = {name: p.to_torch() for name, p in named_parameters(policy)[0].items()}
    description = from_json(to_json({**describe(policy), **_CHECKED}))
    sums = {
        "description": checksums.of_json(description),
        "tensors": {name: checksums.of_array(tensor) for name, tensor in tensors.items()},
    }
    metadata = {"format": "pt", _DESCRIPTION: to_json(description), _CHECKSUMS: to_json(sums)}
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
    description = from_json(metadata.get(_DESCRIPTION, "null"))
    _check(tensors, description, from_json(metadata.get(_CHECKSUMS, "null")))
    return tensors, description


def _check(tensors: Mapping[str, np.ndarray], description: Json, sums: Json) -> None:
    """Hold what was read to the file's own checksums; other libraries' files have none."""
    promised = isinstance(description, Mapping) and _CHECKED.items() <= description.items()
    if sums is None and not promised:
        return
    if not (isinstance(sums, Mapping) and sums.keys() == {"description", "tensors"} and promised):
        raise ValueError("damaged: the checksums or the description in the metadata are broken")
    if checksums.of_json(description) != sums["description"]:
        raise ValueError("damaged: the checksum does not fit the description in the metadata")
    checksums.check(tensors, sums["tensors"])
