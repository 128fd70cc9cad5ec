"""The families of environments, and what an environment's name says.

To add a family, write a file with its `FAMILY` in `puffer_jax/environments/families`, and add that
to `FAMILIES`.
"""

import os

from puffer_jax.base.packages import require
from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import (
    Family,
    atari,
    brax,
    craftax,
    gymnasium,
    gymnax,
    jaxmarl,
    jumanji,
    minigrid,
    native,
    navix,
    pettingzoo,
    pgx,
    playground,
)

FAMILIES: tuple[Family, ...] = (
    native.FAMILY,
    gymnax.FAMILY,
    brax.FAMILY,
    craftax.FAMILY,
    jaxmarl.FAMILY,
    jumanji.FAMILY,
    navix.FAMILY,
    pgx.FAMILY,
    playground.FAMILY,
    gymnasium.FAMILY,
    atari.FAMILY,
    minigrid.FAMILY,
    pettingzoo.FAMILY,
)


def find(name: str) -> tuple[Family, str]:
    """The family of the environment `name`, and its id there."""
    if name in native.CLASSES:
        return native.FAMILY, name
    for family in FAMILIES:
        for prefix in family.prefixes:
            if name.startswith(prefix):
                return family, name.removeprefix(prefix) if prefix.endswith(":") else name
    return gymnasium.FAMILY, name


def create(name: str, **kwargs: object) -> Env:
    """The environment without emulation; raises what `puffer_jax.environments.make` does.

    Args:
        name: of the environment.
        kwargs: arguments of its constructor.
    """
    family, known = find(name)
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if family.package:
        require(family.package, name, family.install)
    return family.create(name, known, kwargs)
