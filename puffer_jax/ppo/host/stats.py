"""What environments on the host say about their episodes, as lists of numbers by name."""

import numbers
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from puffer_jax.ppo.source import Stats

Info = Any
"""What an environment says besides; a mapping, if it keeps to the protocol."""

# The names of what gymnasium's RecordEpisodeStatistics tells.
_TOLD = {"episode_return": "r", "episode_length": "l"}

# A list with more numbers than this (or than there are agents) is data, not statistics.
_MOST = 64

# A mapping may contain itself.
_DEEPEST = 16


def number(value: object) -> float | None:
    """A real number of any library, also as an array without axes, as a float; else None.

    Example:
        >>> import numpy as np
        >>> from puffer_jax.ppo.host.stats import number
        >>> number(np.bool_(True)), number(np.array(2)), number("3"), number(np.zeros(2))
        (1.0, 2.0, None, None)
    """
    if type(value) is float:
        return value
    try:
        if getattr(value, "shape", None) == ():
            array = np.asarray(value)
            # V: numbers that NumPy does not know, such as bfloat16; others are refused by float().
            return float(array) if array.dtype.kind in "biufV" else None
        return float(value) if isinstance(value, numbers.Number) else None  # type: ignore[reportArgumentType]
    except Exception:
        return None


def numbers_of(stats: Stats) -> dict[str, list[float]]:
    """The numbers among the values of each name, which users may have put there, too."""
    return {
        name: [n for n in map(number, values) if n is not None] for name, values in stats.items()
    }


def collect(infos: Info, agents: int) -> Stats:
    """The numbers in a list of nested infos, by path, as the reference's `evaluate` keeps them.

    What is no number, nor a list of at most 64 (or of one for each agent), is left out; whatever
    the infos hold, nothing is raised.

    Args:
        infos: a list of mappings, or one.
        agents: number of agents.
    """
    stats: Stats = {}
    for info in infos if isinstance(infos, list | tuple) else [infos]:
        try:
            leaves = [*_leaves(info)]
        except Exception:  # a mapping of its own kind
            continue
        for name, value in leaves:
            found = _numbers(value, max(_MOST, agents))
            if found:
                stats.setdefault(name, []).extend(found)
    for name, key in _TOLD.items():
        if name not in stats and f"episode/{key}" in stats:
            stats[name] = list(stats[f"episode/{key}"])
    return stats


def _leaves(info: Info, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    if not isinstance(info, Mapping) or depth > _DEEPEST:
        return
    for name, value in info.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/", depth + 1)
        else:
            yield f"{prefix}{name}", value


def _numbers(value: Any, most: int) -> list[float]:
    one = number(value)
    if one is not None:
        return [one]
    try:
        is_list = isinstance(value, list | tuple) or len(value.shape) == 1
        if not is_list or len(value) > most:
            return []
        parts = value if isinstance(value, list | tuple) else [*np.asarray(value)]
    except Exception:  # a string, an object, an array that is gone
        return []
    return [n for n in map(number, parts) if n is not None]


def told(infos: Info, done: np.ndarray) -> Stats:
    """Returns and lengths as RecordEpisodeStatistics tells them in a vector environment's infos.

    Args:
        infos: those of a step. In SAME_STEP, single environments tell them in "final_info".
        done: whether an episode ended, for each environment; used if the infos do not say where
            they tell something.
    """
    if not isinstance(infos, Mapping):
        return {}
    final = infos.get("final_info")
    if isinstance(final, Mapping) and "episode" in final:
        infos = final
    episode = infos.get("episode")
    if not isinstance(episode, Mapping):
        return {}
    stats: Stats = {}
    ended = _array(infos.get("_episode"), done.size)
    ended = done if ended is None else ended.astype(bool)
    for name, key in _TOLD.items():
        values = _array(episode.get(key), done.size)
        if values is not None:
            stats[name] = values[ended].tolist()
    return stats


def _array(value: object, size: int) -> np.ndarray | None:
    """`value` as (size,) numbers, None if it is none."""
    try:
        array = np.asarray(value)
    except Exception:  # a ragged list
        return None
    return array.ravel() if array.size == size and array.dtype.kind in "biuf" else None


class Recorders:
    """gymnasium's vector RecordEpisodeStatistics among the wrappers of `envs`, helped to count.

    It (1.3) knows NEXT_STEP alone, where the step after an end is a reset and counts nothing; and
    it takes a reset of some environments for one of all, as the mask is taken out of the options
    before it looks.
    """

    _COUNTS = ("episode_returns", "episode_lengths")

    def __init__(self, envs: Any):
        self._found = []
        while envs is not None:
            own = getattr(envs, "__dict__", {})
            if {*self._COUNTS, "prev_dones"} <= own.keys():
                self._found.append(envs)
            envs = own.get("env")

    def begin(self, done: np.ndarray) -> None:
        """Begin new episodes where the environment has: after a step in SAME_STEP."""
        for recorder in self._found:
            for name in self._COUNTS:
                getattr(recorder, name)[done] = 0
            if hasattr(recorder, "episode_start_times"):
                recorder.episode_start_times[done] = time.perf_counter()
            recorder.prev_dones = np.zeros_like(done)

    def reset(self, reset: Any, done: np.ndarray) -> Any:
        """What `reset()` returns, which resets the environments in `done` alone."""
        names = (*self._COUNTS, "episode_start_times")
        kept = [
            (recorder, name, np.array(getattr(recorder, name)))
            for recorder in self._found
            for name in names
            if hasattr(recorder, name)
        ]
        result = reset()
        for recorder, name, values in kept:
            getattr(recorder, name)[~done] = values[~done]
        return result
