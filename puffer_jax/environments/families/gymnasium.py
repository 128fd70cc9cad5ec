"""Environments registered with gymnasium, whose names need no prefix."""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from puffer_jax.base.packages import require
from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, check_arguments, unknown
from puffer_jax.environments.families.native import CLASSES


@contextmanager
def errors(name: str) -> Iterator[None]:
    """Make gymnasium's errors name the environment.

    Raises:
        ImportError: something that the environment needs is not installed.
        ValueError: gymnasium does not know it.
    """
    gymnasium = require("gymnasium", name)
    try:
        yield
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"{name}: {error}") from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        why = f"; JAX-native are: {', '.join(CLASSES)}; gymnasium: {error}"
        raise unknown(name, _names(), why) from error


def create(name: str, known: str, arguments: Arguments, more: Iterable[str] = ()) -> Env:
    """Make an environment by its id.

    Args:
        name: its name, for messages.
        known: its id.
        arguments: of its constructor.
        more: names of arguments that its wrappers take, for messages.

    Raises:
        ImportError: something that the environment needs is not installed.
        TypeError: it takes no such argument.
        ValueError: gymnasium does not know the id.
    """
    _check(name, known, arguments, more)
    with errors(name):
        import gymnasium

        return gymnasium.make(known, **arguments)


def _make_vec(name: str, known: str, count: int, mode: str | None, arguments: Arguments) -> Env:
    _check(name, known, arguments)
    with errors(name):
        import gymnasium

        return gymnasium.make_vec(
            known,
            num_envs=count,
            vectorization_mode=mode,  # type: ignore[reportArgumentType]
            **arguments,
        )


def _check(name: str, known: str, arguments: Arguments, more: Iterable[str] = ()) -> None:
    with errors(name):
        import gymnasium
        from gymnasium.envs.registration import load_env_creator

        module, _, registered = known.rpartition(":")
        if module:
            importlib.import_module(module)
        entry = gymnasium.spec(registered).entry_point
        if entry is not None:
            constructor = load_env_creator(entry) if isinstance(entry, str) else entry
            check_arguments(name, constructor, arguments, ("max_episode_steps", *more))


def _names() -> Iterable[str]:
    import gymnasium

    # A name without a prefix may also be meant for one of ours.
    return [*CLASSES, *(known for known in gymnasium.registry if isinstance(known, str))]


FAMILY = Family(
    name="gymnasium",
    create=create,
    names=_names,
    prefixes=("gymnasium:",),
    package="gymnasium",
    install="gymnasium",
    make_vec=_make_vec,
)
