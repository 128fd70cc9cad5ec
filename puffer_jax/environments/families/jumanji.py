"""Environments of jumanji, which run in JAX."""

import importlib
from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, check_arguments, unknown


def _names() -> Iterable[str]:
    jumanji = importlib.import_module("jumanji")
    return [f"jumanji:{known}" for known in sorted(jumanji.registered_environments())]


def _create(name: str, known: str, arguments: Arguments) -> Env:
    from puffer_jax.environments.jax_native import as_jax_env

    jumanji = importlib.import_module("jumanji")
    registration = importlib.import_module("jumanji.registration")
    if known not in jumanji.registered_environments():
        raise unknown(name, _names())
    check_arguments(name, registration.load(registration._REGISTRY[known].entry_point), arguments)
    return as_jax_env(jumanji.make(known, **arguments))


FAMILY = Family(
    name="jumanji",
    create=_create,
    names=_names,
    prefixes=("jumanji:",),
    package="jumanji",
    install="jumanji",
    in_jax=True,
)
