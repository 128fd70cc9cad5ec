"""`.bin`: the flat float32 file of PufferLib's C inference, with a JSON sidecar."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from puffer_jax.base.files import write_atomically
from puffer_jax.base.text import Json, from_json, to_json
from puffer_jax.nn.params import mismatches
from puffer_jax.weights.description import describe
from puffer_jax.weights.pt import Contents
from puffer_jax.weights.state_dicts import named_parameters


def sidecar_path(path: Path) -> Path:
    """The file beside a `.bin` that names its parameters."""
    return path.with_name(path.name + ".json")


def save_bin(policy: nnx.Module, path: Path) -> None:
    """Write the file and its sidecar."""
    tensors = {name: p.to_torch() for name, p in named_parameters(policy)[0].items()}
    data = b"".join(tensor.astype("<f4").tobytes() for tensor in tensors.values())
    sidecar = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "parameters": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "policy": describe(policy),
    }
    # Two files cannot be replaced in one step. Without a sidecar the weights still load, so the
    # old one goes first: a crash may leave a file without its sidecar, but never with a false one.
    sidecar_path(path).unlink(missing_ok=True)
    write_atomically(path, lambda file: file.write(data))
    text = to_json(sidecar, indent=1).encode()
    write_atomically(sidecar_path(path), lambda file: file.write(text))


class _Sidecar(NamedTuple):
    sha256: str
    shapes: dict[str, tuple[int, ...]]
    description: Json


def _read_sidecar(path: Path) -> _Sidecar | None:
    sidecar = sidecar_path(path)
    try:
        content = from_json(sidecar.read_bytes())
        shapes = {name: tuple(shape) for name, shape in content["parameters"].items()}
        if not all(type(size) is int and size >= 0 for s in shapes.values() for size in s):
            raise ValueError("a size must be a whole number, at least 0")
        return _Sidecar(content["sha256"], shapes, content["policy"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{sidecar.name} is not a sidecar of weights: {error!r}") from error


def read_bin(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> Contents:
    """Read the file; `shapes` are those to expect (None: those in the sidecar).

    Raises:
        ValueError: the file or its sidecar is damaged or does not fit.
    """
    data = path.read_bytes()
    sidecar = _read_sidecar(path)
    name = sidecar_path(path).name
    if shapes is None:
        if sidecar is None:
            raise ValueError(
                f"no sidecar {name}, and a .bin file names nothing; build the policy yourself "
                "and use load_weights"
            )
        shapes = sidecar.shapes
    if sidecar is not None:
        problems = mismatches(shapes, sidecar.shapes)
        if not problems and list(shapes) != list(sidecar.shapes):
            problems = [f"the order {list(sidecar.shapes)}, not {list(shapes)}"]
        if problems:
            raise ValueError(f"{name} does not fit the policy; it has {'; '.join(problems)}")
        if hashlib.sha256(data).hexdigest() != sidecar.sha256:
            raise ValueError(
                f"the checksum is not the one in {name}: the file is damaged, or another program "
                f"wrote it; delete {name} to load it unchecked"
            )
    sizes = [math.prod(shape) for shape in shapes.values()]
    if len(data) != 4 * sum(sizes):
        raise ValueError(
            f"{len(data)} bytes, {len(data) / 4:g} float32 numbers; the policy has {sum(sizes)} "
            "parameters"
        )
    numbers = np.split(np.frombuffer(data, "<f4"), np.cumsum(sizes)[:-1])
    tensors = {
        name: part.reshape(shape)
        for (name, shape), part in zip(shapes.items(), numbers, strict=True)
    }
    return tensors, sidecar and sidecar.description
