"""Games of pgx, which run in JAX: in self-play, or against a random opponent."""

import importlib
from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, check_arguments, unknown


def _names() -> Iterable[str]:
    pgx = importlib.import_module("pgx")
    return [f"pgx:{known}" for known in pgx.available_envs()]


def _create(name: str, known: str, arguments: Arguments) -> Env:
    from puffer_jax.environments.adapters.pgx import adapt
    from puffer_jax.environments.jax_native import as_jax_env

    if f"pgx:{known}" not in _names():
        raise unknown(name, _names())
    env = importlib.import_module("pgx").make(known)
    check_arguments(name, lambda opponent="self": None, arguments)
    return as_jax_env(adapt(env, **arguments))


FAMILY = Family(
    name="pgx",
    create=_create,
    names=_names,
    prefixes=("pgx:",),
    package="pgx",
    install="'puffer_jax[pgx]'",
    in_jax=True,
)
