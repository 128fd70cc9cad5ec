"""`.bin`: the flat float32 file of PufferLib's C inference, with a JSON sidecar.

PufferLib 4's native trainer writes such files, too, and moves the start of every tensor to a
multiple of 8 floats (`padding`); zeros fill what is left out.
"""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from puffer_jax.base import checksums
from puffer_jax.base.files import write_together
from puffer_jax.base.text import Json, from_json, to_json
from puffer_jax.nn.params import mismatches
from puffer_jax.weights.description import describe
from puffer_jax.weights.foreign import misnamed
from puffer_jax.weights.pt import Contents
from puffer_jax.weights.state_dicts import named_parameters


def sidecar_path(path: Path) -> Path:
    """The file beside a `.bin` that names its parameters."""
    return path.with_name(path.name + ".json")


def is_bare(path: Path) -> bool:
    """Whether nothing is known about a file: it is no torch file, and has no sidecar."""
    return path.is_file() and misnamed(path) is None and not sidecar_path(path).exists()


def padding_of(policy: nnx.Module, padding: int | None) -> int:
    """The padding to use: the given one, or else the policy's own, which is 1 if it has none.

    Raises:
        ValueError: it is below 1.
    """
    found: int = getattr(policy, "bin_padding", 1) if padding is None else padding
    if found < 1:
        raise ValueError(f"padding is {found}; it must be at least 1")
    return found


def _starts(sizes: Sequence[int], padding: int) -> tuple[list[int], int]:
    """Where each tensor starts and where the last one ends, in floats."""
    starts, end = [], 0
    for size in sizes:
        starts.append(-(-end // padding) * padding)
        end = starts[-1] + size
    return starts, end


def save_bin(policy: nnx.Module, path: Path, padding: int | None = None) -> None:
    """Write the file and its sidecar.

    Raises:
        ValueError: the padding is below 1.
    """
    padding = padding_of(policy, padding)
    tensors = {name: p.to_torch() for name, p in named_parameters(policy)[0].items()}
    starts, end = _starts([tensor.size for tensor in tensors.values()], padding)
    numbers = np.zeros(end, "<f4")
    for start, tensor in zip(starts, tensors.values(), strict=True):
        numbers[start : start + tensor.size] = tensor.astype("<f4").reshape(-1)
    data = numbers.tobytes()
    description = from_json(to_json(describe(policy)))
    sidecar: Json = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "parameters": {name: list(tensor.shape) for name, tensor in tensors.items()},
        **({} if padding == 1 else {"padding": padding}),
        "policy": description,
        "policy_sha256": checksums.of_json(description),
    }
    # Two files cannot be replaced in one step. The sidecar comes first and speaks of the file
    # before, too, so that a process killed in between leaves two that belong together.
    if path.is_file():
        sidecar["before"] = _entry_of(path)
    text = to_json(sidecar, indent=1).encode()
    write_together(
        {sidecar_path(path): lambda file: file.write(text), path: lambda file: file.write(data)}
    )


def _entry_of(path: Path) -> Json:
    """What a sidecar says of the file that is there now; only its hash, if nothing is known."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        content = from_json(sidecar_path(path).read_bytes())
    except (OSError, ValueError):
        content = None
    known = next((e for e in _entries(content) if e.get("sha256") == sha256), {})
    return {name: value for name, value in known.items() if name != "before"} | {"sha256": sha256}


class _Sidecar(NamedTuple):
    sha256: Json
    shapes: dict[str, tuple[int, ...]]
    description: Json
    padding: int


def _entries(content: Json) -> list[dict[str, Json]]:
    """What the sidecar says of the file, and of the one before it."""
    both = [content, content.get("before")] if isinstance(content, dict) else []
    return [entry for entry in both if isinstance(entry, dict)]


def _read_sidecar(path: Path, sha256: str) -> _Sidecar | None:
    """What the sidecar says of the file; None if there is none, or it knows only that it was there.

    Raises:
        ValueError: it is damaged.
    """
    sidecar = sidecar_path(path)
    try:
        entries = _entries(from_json(sidecar.read_bytes()))
        entry = next((e for e in entries if e["sha256"] == sha256), entries[0])
        if entry == {"sha256": sha256}:
            return None
        shapes = {name: tuple(shape) for name, shape in entry["parameters"].items()}
        if not all(type(size) is int and size >= 0 for s in shapes.values() for size in s):
            raise ValueError("a size must be a whole number, at least 0")
        # Version 0.1 wrote none.
        if entry.get("policy_sha256", own := checksums.of_json(entry["policy"])) != own:
            raise ValueError("its own checksum does not fit the policy that it describes")
        if type(padding := entry.get("padding", 1)) is not int or padding < 1:
            raise ValueError("the padding must be a whole number, at least 1")
        return _Sidecar(entry["sha256"], shapes, entry["policy"], padding)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{sidecar.name} is not a sidecar of weights: {error!r}") from error


def read_bin(
    path: Path, shapes: Mapping[str, tuple[int, ...]] | None, padding: int = 1
) -> Contents:
    """Read the file; `shapes` are those to expect (None: those in the sidecar).

    Without a sidecar a warning says what cannot be known, and `padding` is the file's.

    Raises:
        ValueError: the file or its sidecar is damaged or does not fit.
    """
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    sidecar = _read_sidecar(path, sha256)
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
        if sidecar.sha256 != sha256:
            raise ValueError(
                f"it and {name} do not belong together: the checksum is another one, so a file is "
                f"damaged, or was replaced by itself; delete {name} to load the numbers unchecked"
            )
    sizes = [math.prod(shape) for shape in shapes.values()]
    padding = padding if sidecar is None else sidecar.padding
    starts = _fitting(len(data), sizes, padding)
    numbers = np.frombuffer(data, "<f4")
    tensors = {
        name: numbers[start : start + size].reshape(shape)
        for (name, shape), start, size in zip(shapes.items(), starts, sizes, strict=True)
    }
    if sidecar is None:
        warnings.warn(
            f"{path} has no sidecar {name}: that it is whole, and that its numbers are in this "
            "policy's order, cannot be known; only their count fits",
            stacklevel=4,
        )
    return tensors, sidecar and sidecar.description


# The native trainer's, built for bfloat16 and for float32; the last is that of PufferLib 3.
_PADDINGS = (8, 4, 1)


def _fits(length: int, end: int, padding: int) -> bool:
    # What follows the last tensor may be padded, too.
    return length in (4 * end, 4 * -(-end // padding) * padding)


def _fitting(length: int, sizes: Sequence[int], padding: int) -> list[int]:
    """Where each tensor starts in a file of so many bytes.

    Raises:
        ValueError: it has another number of floats.
    """
    starts, end = _starts(sizes, padding)
    if _fits(length, end, padding):
        return starts
    others = [p for p in _PADDINGS if p != padding and _fits(length, _starts(sizes, p)[1], p)]
    padded = f", {end} with padding={padding}" if padding > 1 else ""
    raise ValueError(
        f"{length} bytes, {length / 4:g} float32 numbers; the policy has {sum(sizes)} "
        f"parameters{padded}"
        + (f"; padding={' or '.join(map(str, others))} would fit" if others else "")
    )
