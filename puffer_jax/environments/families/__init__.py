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
    known = parameters(constructor)
    if known is not None:
        _check_options(name, arguments, [*known, *more])


def parameters(constructor: Callable[..., object]) -> list[str] | None:
    """The names of a constructor's parameters; None if it takes any keyword."""
    found = inspect.signature(constructor).parameters
    return None if any(p.kind is p.VAR_KEYWORD for p in found.values()) else list(found)


def _check_options(name: str, arguments: Iterable[str], options: Iterable[str]) -> None:
    options = list(options)
    wrong = [argument for argument in arguments if argument not in options]
    if wrong:
        raise TypeError(f"{name}: no such argument: {', '.join(near(wrong, options))}")


def jax_family(
    name: str,
    *,
    ids: Callable[[], Iterable[str]],
    make: Callable[[str, Arguments], object],
    options: Callable[[str], Iterable[str] | None] = lambda known: None,
    package: str = "",
    install: str = "",
) -> Family:
    """A family of environments that run in JAX, with the prefix `name:`.

    Args:
        name: what the family is called.
        ids: lists its environments, without the prefix.
        make: makes what `puffer_jax.jaxenv.as_jax_env` takes, from an id and arguments.
        options: the names of the arguments that an id takes; None if only `make` knows.
        package: the module that must be installed; by default `name`.
        install: the arguments of `pip install` that bring it; by default `name`.
    """

    def names() -> list[str]:
        return [f"{name}:{known}" for known in ids()]

    def create(full: str, known: str, arguments: Arguments) -> Env:
        from puffer_jax.environments.jax_native import as_jax_env

        if full not in (listed := names()):
            raise unknown(full, listed)
        taken = options(known)
        if taken is not None:
            _check_options(full, arguments, taken)
        try:
            env = make(known, arguments)
        except TypeError as error:
            raise TypeError(f"{full}: {error}") from error
        return as_jax_env(env)

    return Family(
        name=name,
        create=create,
        names=names,
        prefixes=(f"{name}:",),
        package=package or name,
        install=install or name,
        in_jax=True,
    )
