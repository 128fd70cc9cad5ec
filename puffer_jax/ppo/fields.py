"""The fields of a configuration: limits on their values, and values from a file as their types."""

import configparser
import dataclasses
import math
import os
import sys
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

# An int may be too large to become a float, but compares with one.
_LARGEST = sys.float_info.max


def option(
    default: Any,
    *,
    traced: bool = False,
    positive: bool = False,
    within: tuple[int | float, int | float] | None = None,
) -> Any:
    """A field of a configuration, with limits on its value that its type does not express.

    Args:
        default: its value if none is given.
        traced: whether it is a number in the update that may change without recompiling.
        positive: whether it must be greater than 0.
        within: its least and greatest values.
    """
    metadata = {"traced": traced, "positive": positive, "within": within}
    return dataclasses.field(default=default, metadata=metadata)


def _kinds(field: dataclasses.Field[Any]) -> tuple[Any, ...]:
    union = get_origin(field.type) in (Union, UnionType)
    return get_args(field.type) if union else (field.type,)


def _broken_rule(field: dataclasses.Field[Any], value: Any) -> str | None:
    """What the field's type or `option` demands and `value` is not; None if it is all of it."""
    kinds = _kinds(field)
    named = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    plain = [kind for kind in kinds if get_origin(kind) is not Literal]
    if isinstance(value, str) and value in named:
        return None
    if value is None and NoneType in plain:
        return None
    if not plain:
        return f"one of {', '.join(named)}"
    numeric = int in plain or float in plain
    if numeric and _is_number(value) and not abs(value) <= _LARGEST:
        return "a finite number"
    if field.metadata.get("positive") and not (_is_number(value) and value > 0):
        return "a positive number"
    if within := field.metadata.get("within"):
        low, high = within
        if not (_is_number(value) and low <= value <= high):
            return f"at least {low}" if math.isinf(high) else f"between {low} and {high}"
    if int in plain and isinstance(value, float):
        return "a whole number"
    if bool in plain and not isinstance(value, bool):
        return " or ".join(["true or false", *named])
    if numeric and not _is_number(value):
        return " or ".join(["a number", *named])
    if str in plain and not isinstance(value, str):
        return "a text"
    return None


def checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value as a field's type.

    Raises:
        ValueError: the field does not take it.
    """
    value = _typed(field, value)
    if rule := _broken_rule(field, value):
        raise ValueError(f"{field.name} must be {rule}; got {value!r}")
    return value


# As configparser reads them.
_WORDS = configparser.ConfigParser.BOOLEAN_STATES


def _typed(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value as the field's type: 1e6 for a number of steps, "off", NumPy's and JAX's scalars."""
    kinds = _kinds(field)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, str | bool | int | float) and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, str) and str not in kinds:
        word = value.strip().lower()
        if bool in kinds and word in _WORDS:
            value = _WORDS[word]
        elif word == "none":
            value = None
        elif int in kinds or float in kinds:
            try:
                value = float(word)
            except ValueError:
                return value
    if float in kinds and _is_number(value) and abs(value) <= _LARGEST:
        return float(value)
    if int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
