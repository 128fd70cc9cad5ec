"""Environments of jumanji, which run in JAX."""

import importlib
from collections.abc import Iterable

from puffer_jax.environments.families import Arguments, jax_family, parameters


def _ids() -> Iterable[str]:
    return sorted(importlib.import_module("jumanji").registered_environments())


def _options(known: str) -> list[str] | None:
    registration = importlib.import_module("jumanji.registration")
    return parameters(registration.load(registration._REGISTRY[known].entry_point))


def _make(known: str, arguments: Arguments) -> object:
    return importlib.import_module("jumanji").make(known, **arguments)


FAMILY = jax_family("jumanji", ids=_ids, make=_make, options=_options)
