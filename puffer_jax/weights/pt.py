"""`.pt`: the state_dict that PufferLib's trainer writes and reads."""

import os
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from puffer_jax.base.files import write_atomically
from puffer_jax.base.packages import TORCH, require
from puffer_jax.base.text import Json
from puffer_jax.weights.foreign import one_level_down, refusal
from puffer_jax.weights.state_dicts import StateDict, named_parameters


def import_torch() -> Any:
    """The package torch, if its loader is safe.

    Raises:
        ImportError: torch is missing or older than 2.10; the message says how to install it.
    """
    # From this version on, torch's loader is safe against hostile files.
    note = " (.safetensors needs nothing more)"
    return require("torch", "a .pt file", TORCH, oldest=(2, 10), note=note)


def save_pt(policy: nnx.Module, path: Path) -> None:
    """Write the file."""
    torch = import_torch()

    def to_tensor(array: np.ndarray) -> Any:
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.astype(np.float32)).bfloat16()
        return torch.from_numpy(array)

    parameters, aliases = named_parameters(policy)
    tensors = OrderedDict((name, to_tensor(p.to_torch())) for name, p in parameters.items())
    # The same tensor under both names: torch then stores it once, as the reference does.
    tensors.update((alias, tensors[name]) for alias, name in aliases.items())
    write_atomically(path, lambda file: torch.save(tensors, file))


# How much more than a file's size may be read from it.
_SLACK = 1 << 26

# The attribute of a folder in a zip archive.
_FOLDER = 0x10

# What a reader gives: tensors under torch's names, and the policy's description if there is one.
Contents = tuple[StateDict, Json]


def read_pt(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> Contents:
    """Read the file; it names its own shapes.

    Raises:
        ValueError: it holds anything but tensors under names.
    """
    torch = import_torch()
    with open(path, "rb") as file:
        _check_zip(file)
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        # A damaged pickle is a program gone wrong: it can raise any exception.
        except Exception as error:
            raise ValueError(
                f"not a readable state_dict: {refusal(error)}. It is refused unless torch.load "
                "with weights_only=True accepts it, since unpickling anything else can run code. "
                "If it holds a whole module, save module.state_dict() instead"
            ) from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"holds a {type(tensors).__name__}, not a state_dict")
    others = [
        str(name)
        for name, tensor in tensors.items()
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor))
    ]
    if others:
        inside = one_level_down(tensors, torch.Tensor)
        raise ValueError(
            f"not a state_dict; these do not name tensors: {', '.join(others)}"
            + (f"; {inside}" if inside else "")
        )
    # A view that repeats one number claims any size, and a policy of that size would be built.
    hollow = [str(name) for name, t in tensors.items() if not _is_dense(t, torch)]
    if hollow:
        raise ValueError(f"tensors that do not hold their own numbers: {', '.join(hollow)}")
    return dict(tensors), None


def _check_zip(file: IO[bytes]) -> None:
    """Check what torch does not: checksums, names that occur twice, and sizes once inflated."""
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if not is_zip:  # the form before torch 1.6, which has no checksums
        return
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            _check_records(records, os.fstat(file.fileno()).st_size)
            # torch can be told to write zeros for all of them.
            checked = any(record.CRC for record in records)
            damaged = archive.testzip() if checked else None
    # Offsets that lie lead anywhere, before the file's beginning, too.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"not a readable state_dict: a broken zip archive ({error})") from error
    if damaged:
        raise ValueError(f"damaged: the checksum does not fit {damaged}")
    file.seek(0)


def _check_records(records: list[zipfile.ZipInfo], size: int) -> None:
    inflated = sum(record.file_size for record in records)
    if inflated > size + _SLACK:
        raise ValueError(
            f"{size} bytes that would inflate to {inflated}; torch.save does not compress, so it "
            "is not what it seems. If it is yours, load and save it again with torch"
        )
    # torch finds a record whatever its case.
    counts = Counter(record.filename.casefold() for record in records)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"not a readable state_dict: records that occur twice: {', '.join(twice)}")
    # torch would take what happens to be in memory for the numbers of such a record.
    folders = [
        record.filename
        for record in records
        if record.external_attr & _FOLDER and not record.filename.endswith("/")
    ]
    if folders:
        raise ValueError(f"damaged: records that are marked as folders: {', '.join(folders)}")


def _is_dense(tensor: Any, torch: Any) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
