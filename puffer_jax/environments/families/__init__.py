"""Families of environments: one file for each source of environments.

A family says how its environments' names begin, what to install for it, how to make one of its
environments, and which there are. `puffer_jax.environments.registry` has the list of families.
Nothing is imported before it is asked for, so that workers which step environments stay light.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from puffer_jax.base.spaces import Env
from puffer_jax.base.text import hint, near

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Environments from one source.

    Attributes:
        name: what the family is called.
        create: makes an environment, without emulation, from its full name, its id within the
            family, and the arguments of its constructor. Raises what
            `puffer_jax.environments.make` does.
        names: lists the full names of all its environments.
        prefixes: what its environments' names begin with. A prefix that ends in a colon is left
            out of the id.
        package: the module that must be installed, if any.
        install: the arguments of `pip install` that bring it.
        in_jax: whether its environments are JAX-native (`puffer_jax.jaxenv.JaxEnv`). Others run
            on the host, in one process or more, and are emulated.
        multi_agent: whether an environment has several agents (PettingZoo's protocol).
        make_vec: makes several copies of an environment as a `gymnasium.vector.VectorEnv`, where
            the family can: from its name, its id, how many, `vectorization_mode` and the arguments.
    """

    name: str
    create: Callable[[str, str, Arguments], Env]
    names: Callable[[], Iterable[str]]
    prefixes: tuple[str, ...] = ()
    package: str = ""
    install: str = ""
    in_jax: bool = False
    multi_agent: bool = False
    make_vec: Callable[[str, str, int, str | None, Arguments], Env] | None = None


def unknown(name: str, known: Iterable[str], why: str = "") -> ValueError:
    """The error for an environment's name that does not exist; it suggests the nearest."""
    return ValueError(f"no environment {name!r}{hint(name, known, cutoff=0.5)}{why}")


def check_arguments(
    name: str,
    constructor: Callable[..., object],
    arguments: Iterable[str],
    more: Iterable[str] = (),
) -> None:
    """Check that a constructor takes all arguments, or that they are among `more`.

    Raises:
        TypeError: it does not take one of them; the message names the nearest that it takes.
    """
    parameters = inspect.signature(constructor).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [*parameters, *more]
    wrong = [argument for argument in arguments if argument not in known]
    if wrong:
        raise TypeError(f"{name}: no such argument: {', '.join(near(wrong, known))}")
