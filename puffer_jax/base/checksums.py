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
        expected: name -> `of_array` of what was written; it comes from a file.

    Raises:
        ValueError: arrays differ from what was written; all are named.
    """
    if not isinstance(expected, Mapping):
        raise ValueError(f"the checksums are {type(expected).__name__}, not an object by name")
    wrong = [name for name, array in arrays.items() if expected.get(name) != of_array(array)]
    if wrong:
        raise ValueError(f"damaged: the checksum does not fit {', '.join(wrong)}")
