"""Environments of PettingZoo, which have several agents."""

import importlib
import os
import pkgutil
import sys
from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, unknown


def _create(name: str, known: str, arguments: Arguments) -> Env:
    """The parallel environment of one of PettingZoo's modules; if it has none, the one in turns."""
    names = _names()
    folder, _, file = known.partition("/")
    moved = folder == "mpe" and f"pettingzoo:{known}" not in names
    if not moved and f"pettingzoo:{known}" not in names:
        raise unknown(name, names)
    try:
        module = importlib.import_module(f"mpe2.{file}" if moved else f"pettingzoo.{folder}.{file}")
    except ImportError as error:
        if moved and sys.modules.get("mpe2") is not None:
            raise unknown(name, names) from error
        package = "mpe2" if moved else f"'pettingzoo[{folder}]'"
        raise ImportError(f"{name}: {error}: pip install {package}") from error
    make = getattr(module, "parallel_env", None) or module.env
    try:
        return make(**arguments)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


def _names() -> Iterable[str]:
    import pettingzoo

    return [
        f"pettingzoo:{folder.name}/{module.name}"
        for folder in pkgutil.iter_modules(pettingzoo.__path__)
        for module in pkgutil.iter_modules([os.path.join(pettingzoo.__path__[0], folder.name)])
        if module.name.rpartition("_v")[2].isdecimal()
    ]


FAMILY = Family(
    name="pettingzoo",
    create=_create,
    names=_names,
    prefixes=("pettingzoo:",),
    package="pettingzoo",
    install="'puffer_jax[pettingzoo]'",
    multi_agent=True,
)
