"""Environments of gymnax, which run in JAX."""

from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, check_arguments, unknown


def _names() -> Iterable[str]:
    import gymnax

    return [f"gymnax:{known}" for known in gymnax.registered_envs]


def _create(name: str, known: str, arguments: Arguments) -> Env:
    import gymnax

    from puffer_jax.environments.jax_native import as_jax_env

    if known not in gymnax.registered_envs:
        raise unknown(name, _names())
    check_arguments(name, type(gymnax.make(known)[0]), arguments)
    return as_jax_env(gymnax.make(known, **arguments))


FAMILY = Family(
    name="gymnax",
    create=_create,
    names=_names,
    prefixes=("gymnax:",),
    package="gymnax",
    install="gymnax six",
    in_jax=True,
)
