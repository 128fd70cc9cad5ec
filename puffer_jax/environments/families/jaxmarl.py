"""Environments of JaxMARL, which run in JAX and have several agents."""

import importlib
from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, unknown


def _names() -> Iterable[str]:
    jaxmarl = importlib.import_module("jaxmarl")
    return [f"jaxmarl:{known}" for known in jaxmarl.registered_envs]


def _create(name: str, known: str, arguments: Arguments) -> Env:
    from puffer_jax.environments.jax_native import as_jax_env

    jaxmarl = importlib.import_module("jaxmarl")
    if known not in jaxmarl.registered_envs:
        raise unknown(name, _names())
    try:
        env = jaxmarl.make(known, **arguments)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    return as_jax_env(env)


FAMILY = Family(
    name="jaxmarl",
    create=_create,
    names=_names,
    prefixes=("jaxmarl:",),
    package="jaxmarl",
    install="jaxmarl",
    in_jax=True,
)
