"""Checksums of arrays and of JSON values: what a file said when it was written."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from puffer_jax.base.text import Json


def of_array(array: np.ndarray) -> str:
    """SHA-256 of the array's dtype, shape and numbers, as hexadecimal digits."""
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def of_json(value: Json) -> str:
    """SHA-256 of the value, however its text is written."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check(arrays: Mapping[str, np.ndarray], expected: Json) -> None:
    """Compare arrays with the checksums they had.

    Args:
        arrays: what was read.
        expected: name -> `of_array` of what was written, or of its parts: a list of (bounds,
            checksum), bounds a (start, stop) for each axis. It comes from a file.

    Raises:
        ValueError: arrays differ from what was written; all are named.
    """
    if not isinstance(expected, Mapping):
        raise ValueError(f"the checksums are {type(expected).__name__}, not an object by name")
    wrong = [name for name, array in arrays.items() if not _fits(array, expected.get(name))]
    if wrong:
        raise ValueError(f"damaged: the checksum does not fit {', '.join(wrong)}")


def _fits(array: np.ndarray, expected: Json) -> bool:
    if not isinstance(expected, list):
        return expected == of_array(array)
    parts = [(array[tuple(slice(*ends) for ends in bounds)], sha) for bounds, sha in expected]
    return sum(part.size for part, _ in parts) == array.size and all(
        of_array(part) == sha for part, sha in parts
    )
