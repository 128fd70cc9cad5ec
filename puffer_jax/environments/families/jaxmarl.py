"""Environments of JaxMARL, which run in JAX and have several agents."""

import importlib
from collections.abc import Iterable

from puffer_jax.environments.families import Arguments, jax_family


def _ids() -> Iterable[str]:
    return importlib.import_module("jaxmarl").registered_envs


def _make(known: str, arguments: Arguments) -> object:
    return importlib.import_module("jaxmarl").make(known, **arguments)


FAMILY = jax_family("jaxmarl", ids=_ids, make=_make)
