"""Environments of brax, which run in JAX."""

import importlib
from collections.abc import Iterable

from puffer_jax.environments.families import Arguments, jax_family, parameters


def _ids() -> Iterable[str]:
    return importlib.import_module("brax.envs")._envs


def _options(known: str) -> list[str] | None:
    taken = parameters(importlib.import_module("brax.envs")._envs[known])
    return taken and [*taken, "episode_length", "action_repeat"]


def _make(known: str, arguments: Arguments) -> object:
    return importlib.import_module("brax.envs").create(known, auto_reset=False, **arguments)


FAMILY = jax_family("brax", ids=_ids, make=_make, options=_options)
