"""Environments of brax, which run in JAX."""

import importlib
from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, check_arguments, unknown


def _names() -> Iterable[str]:
    envs = importlib.import_module("brax.envs")
    return [f"brax:{known}" for known in envs._envs]


def _create(name: str, known: str, arguments: Arguments) -> Env:
    from puffer_jax.environments.jax_native import as_jax_env

    envs = importlib.import_module("brax.envs")
    if known not in envs._envs:
        raise unknown(name, _names())
    check_arguments(name, envs._envs[known], arguments, ("episode_length", "action_repeat"))
    return as_jax_env(envs.create(known, auto_reset=False, **arguments))


FAMILY = Family(
    name="brax",
    create=_create,
    names=_names,
    prefixes=("brax:",),
    package="brax",
    install="brax",
    in_jax=True,
)
