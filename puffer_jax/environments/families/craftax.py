"""Craftax and Craftax-Classic, which run in JAX."""

import dataclasses
import importlib
from typing import Any

from puffer_jax.environments.families import Arguments, jax_family

_IDS = [
    f"{game}-{view}-v1"
    for game in ("Craftax", "Craftax-Classic")
    for view in ("Symbolic", "Pixels")
]


def _env(known: str) -> Any:
    made = importlib.import_module("craftax.craftax_env")
    return made.make_craftax_env_from_name(known, auto_reset=False)


def _options(known: str) -> list[str]:
    return [field.name for field in dataclasses.fields(_env(known).default_params)]


def _make(known: str, arguments: Arguments) -> object:
    """An environment whose arguments replace those of its parameters."""
    env = _env(known)
    return env, env.default_params.replace(**arguments)


FAMILY = jax_family("craftax", ids=lambda: _IDS, make=_make, options=_options)
