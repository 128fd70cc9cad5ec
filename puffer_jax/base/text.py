"""Small texts: the nearest known name, JSON."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np


def near(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Each name with the nearest known one in parentheses."""
    known = list(known)
    close = {name: difflib.get_close_matches(name, known, 1) for name in names}
    return [f"{n} (did you mean {c[0]}?)" if c else n for n, c in close.items()]


def _to_json(value: Any, **options: Any) -> str:
    # Sizes may be NumPy's integers, flat_size=np.prod(...) say.
    return json.dumps(value, default=np.generic.item, **options)


def _from_json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
