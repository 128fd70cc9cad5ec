"""Craftax and Craftax-Classic, which run in JAX."""

import dataclasses
import importlib
from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.base.text import near
from puffer_jax.environments.families import Arguments, Family, unknown

_KINDS = [
    f"{game}-{view}" for game in ("Craftax", "Craftax-Classic") for view in ("Symbolic", "Pixels")
]


def _names() -> Iterable[str]:
    return [f"craftax:{kind}-v1" for kind in _KINDS]


def _create(name: str, known: str, arguments: Arguments) -> Env:
    """An environment whose arguments replace those of its parameters."""
    from puffer_jax.environments.jax_native import as_jax_env

    if name not in _names():
        raise unknown(name, _names())
    made = importlib.import_module("craftax.craftax_env")
    env = made.make_craftax_env_from_name(known, auto_reset=False)
    params = env.default_params
    options = [field.name for field in dataclasses.fields(params)]
    if wrong := [argument for argument in arguments if argument not in options]:
        raise TypeError(f"{name}: no such argument: {', '.join(near(wrong, options))}")
    return as_jax_env((env, params.replace(**arguments)))


FAMILY = Family(
    name="craftax",
    create=_create,
    names=_names,
    prefixes=("craftax:",),
    package="craftax",
    install="craftax",
    in_jax=True,
)
