"""Environments of gymnax, which run in JAX."""

from collections.abc import Iterable

from puffer_jax.environments.families import Arguments, jax_family, parameters


def _ids() -> Iterable[str]:
    import gymnax

    return gymnax.registered_envs


def _options(known: str) -> list[str] | None:
    import gymnax

    return parameters(type(gymnax.make(known)[0]))


def _make(known: str, arguments: Arguments) -> object:
    import gymnax

    return gymnax.make(known, **arguments)


FAMILY = jax_family("gymnax", ids=_ids, make=_make, options=_options, install="gymnax six")
