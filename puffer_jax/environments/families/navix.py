"""Environments of navix, MiniGrid's in JAX."""

import importlib
from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, unknown


def _names() -> Iterable[str]:
    navix = importlib.import_module("navix")
    return [f"navix:{known}" for known in navix.registry()]


def _create(name: str, known: str, arguments: Arguments) -> Env:
    from puffer_jax.environments.jax_native import as_jax_env

    navix = importlib.import_module("navix")
    if known not in navix.registry():
        raise unknown(name, _names())
    try:
        env = navix.make(known, **arguments)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    return as_jax_env(env)


FAMILY = Family(
    name="navix",
    create=_create,
    names=_names,
    prefixes=("navix:",),
    package="navix",
    install="navix",
    in_jax=True,
)
