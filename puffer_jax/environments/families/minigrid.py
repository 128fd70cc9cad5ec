"""Environments of minigrid: MiniGrid and BabyAI."""

from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, gymnasium

_PREFIXES = ("MiniGrid-", "BabyAI-")


def _create(name: str, known: str, arguments: Arguments) -> Env:
    from minigrid.wrappers import ImgObsWrapper

    # The mission is text, which no array can hold; the image shows the direction.
    return ImgObsWrapper(gymnasium.create(name, known, arguments))


def _names() -> Iterable[str]:
    return [name for name in gymnasium.FAMILY.names() if name.startswith(_PREFIXES)]


FAMILY = Family(
    name="minigrid",
    create=_create,
    names=_names,
    prefixes=_PREFIXES,
    package="minigrid",
    install="'puffer_jax[minigrid]'",
)
