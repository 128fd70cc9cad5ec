"""Environments of navix, MiniGrid's in JAX."""

import importlib
from collections.abc import Iterable

from puffer_jax.environments.families import Arguments, jax_family


def _ids() -> Iterable[str]:
    return importlib.import_module("navix").registry()


def _make(known: str, arguments: Arguments) -> object:
    return importlib.import_module("navix").make(known, **arguments)


FAMILY = jax_family("navix", ids=_ids, make=_make)
