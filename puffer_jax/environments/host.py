"""Environments of gymnasium, ALE, minigrid and PettingZoo by name, as they are without emulation.

Nothing is imported before it is asked for, and never JAX.
"""

import importlib
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from puffer_jax.environments import check_arguments, family, unknown

_PIP = {"gymnasium": "gymnasium"} | {
    module: f"'puffer_jax[{extra}]'"
    for module, extra in (
        ("ale_py", "atari"),
        ("minigrid", "minigrid"),
        ("pettingzoo", "pettingzoo"),
    )
}
_ATARI_OPTIONS = ("framestack", "noop_max", "terminal_on_life_loss", "clip_rewards")


def create(name: str, **kwargs: Any) -> Any:
    """The environment; raises as `puffer_jax.environments.make`."""
    match family(name):
        case "pettingzoo", known:
            return _pettingzoo(name, known, kwargs)
        case "atari", known:
            return atari(known, **kwargs)
        case "minigrid", known:
            _import(name, "minigrid")
            from minigrid.wrappers import ImgObsWrapper

            # The mission is a text, which is in no array; the direction is in the image.
            return ImgObsWrapper(_gymnasium(name, known, kwargs))
        case _, known:
            return _gymnasium(name, known, kwargs)


def atari(
    name: str,
    framestack: int = 4,
    frameskip: int = 4,
    noop_max: int = 30,
    terminal_on_life_loss: bool = False,
    clip_rewards: bool = False,
    **kwargs: Any,
) -> Any:
    """An Atari game with the usual preprocessing, by gymnasium's wrappers.

    Observations are (framestack, 84, 84) uint8. Infos have the `episode_return`, unclipped, and
    the `episode_length` of what ended, and nothing else.

    Args:
        name: such as "ALE/Breakout-v5".
        framestack: how many grey images an observation has, of the last steps.
        frameskip: frames that an action lasts; the last two are merged.
        noop_max: an episode starts after 1 to so many frames without action.
        terminal_on_life_loss: a lost life ends the episode.
        clip_rewards: only the sign of a reward counts.
        kwargs: of ALE's own environment: repeat_action_probability (0.25 if not given),
            full_action_space, render_mode, ...

    Raises:
        ImportError: ale-py or OpenCV is not installed.
        ValueError: there is no such game; the nearest is named.
    """
    _import(name, "ale_py")
    env = _gymnasium(name, name, kwargs | {"frameskip": 1}, _ATARI_OPTIONS)
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TransformReward

    from puffer_jax.environments.wrappers import EpisodeStats, sign

    with errors(name):
        env = AtariPreprocessing(
            env, noop_max, frameskip, terminal_on_life_loss=terminal_on_life_loss
        )
    env = EpisodeStats(env)
    if clip_rewards:
        env = TransformReward(env, sign)
    return FrameStackObservation(env, framestack)


@contextmanager
def errors(name: str) -> Iterator[None]:
    """Errors of gymnasium are made to name the environment.

    Raises:
        ImportError: something that the environment needs is not installed.
        ValueError: gymnasium does not know it.
    """
    gymnasium = _import(name, "gymnasium")
    try:
        yield
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"{name}: {error}") from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        known = [other for other in gymnasium.registry if isinstance(other, str)]
        raise unknown(name, known, f". gymnasium: {error}") from error


def check_gymnasium(name: str, known: str, arguments: Any, more: tuple[str, ...] = ()) -> None:
    """Raise what `errors` does if there is no such id, TypeError if it takes no such arguments."""
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


def _gymnasium(name: str, known: str, arguments: dict[str, Any], more: tuple[str, ...] = ()) -> Any:
    check_gymnasium(name, known, arguments, more)
    with errors(name):
        import gymnasium

        return gymnasium.make(known, **arguments)


def _pettingzoo(name: str, known: str, arguments: dict[str, Any]) -> Any:
    """The parallel environment of a module of PettingZoo; or the one of turns, if it has none."""
    package = _import(name, "pettingzoo")
    there = [
        f"{folder.name}/{module.name}"
        for folder in pkgutil.iter_modules(package.__path__)
        for module in pkgutil.iter_modules([os.path.join(package.__path__[0], folder.name)])
        if module.name.rpartition("_v")[2].isdecimal()
    ]
    if known not in there:
        raise unknown(name, [f"pettingzoo:{one}" for one in there])
    try:
        module = importlib.import_module(f"pettingzoo.{known.replace('/', '.')}")
    except ImportError as error:
        extra = known.partition("/")[0]
        raise ImportError(f"{name}: {error}: pip install 'pettingzoo[{extra}]'") from error
    make = getattr(module, "parallel_env", None) or module.env
    try:
        return make(**arguments)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


def _import(name: str, module: str) -> Any:
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{name} needs {module}: pip install {_PIP[module]}") from error
