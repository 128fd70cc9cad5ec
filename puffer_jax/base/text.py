"""Short texts: the nearest known name, and JSON."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

Json = Any
"""What a JSON text stands for: anything, until it is checked."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`, whatever its case; None if no name is like it.

    Args:
        name: what somebody wrote.
        known: the names that exist.
        cutoff: how alike two names must be, from 0 to 1.
    """
    spelling = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), spelling, n=1, cutoff=cutoff)
    return spelling[close[0]] if close else None


def near(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Each name with the nearest known one in parentheses."""
    known = list(known)
    close = {name: nearest(name, known) for name in names}
    return [f"{name} (did you mean {other}?)" if other else name for name, other in close.items()]


def hint(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """What to write after an unknown name: "; did you mean ...?", or "" if no name is like it."""
    other = nearest(name, known, cutoff)
    return f"; did you mean {other!r}?" if other else ""


def to_json(value: object, **options: Any) -> str:
    """`value` as JSON text; sizes may be NumPy's integers, such as flat_size=np.prod(...)."""
    return json.dumps(value, default=np.generic.item, **options)


def from_json(text: str | bytes) -> Json:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, or it is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
