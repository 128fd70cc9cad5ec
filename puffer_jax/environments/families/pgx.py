"""Games of pgx, which run in JAX: in self-play, or against a random opponent."""

import importlib
from collections.abc import Iterable

from puffer_jax.environments.families import Arguments, jax_family


def _ids() -> Iterable[str]:
    return importlib.import_module("pgx").available_envs()


def _make(known: str, arguments: Arguments) -> object:
    from puffer_jax.environments.adapters.pgx import adapt

    return adapt(importlib.import_module("pgx").make(known), **arguments)


FAMILY = jax_family(
    "pgx",
    ids=_ids,
    make=_make,
    options=lambda known: ["opponent"],
    install="'puffer_jax[pgx]'",
)
