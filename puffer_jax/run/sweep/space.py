"""What a sweep searches, in the words of PufferLib's `[sweep]` sections."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from puffer_jax.base.text import near

Real = float | int

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Kind:
    """A distribution: how values are laid out along a line, and how a study calls that line.

    Attributes:
        place: a value's place.
        value: the value of a place.
        title: of the line, from the parameter's name.
        whole: whether places are whole numbers.
        log: whether the study looks at the places' logarithm.
    """

    place: Callable[[Real], Real]
    value: Callable[[Real], Real]
    title: str = "{}"
    whole: bool = False
    log: bool = False


def _same(x: Real) -> Real:
    return x


KINDS = {
    "uniform": _Kind(_same, _same),
    "int_uniform": _Kind(_same, _same, whole=True),
    "uniform_pow2": _Kind(math.log2, lambda x: 2**x, "log2 {}", whole=True),
    "log_normal": _Kind(_same, _same, log=True),
    "logit_normal": _Kind(lambda x: 1 - x, lambda x: 1 - x, "1 - {}", log=True),
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Parameter:
    """One thing that is searched, as in `[sweep.train.learning_rate]`.

    `uniform` and `int_uniform` are even between `min` and `max`, `uniform_pow2` is even over the
    powers of two, `log_normal` over the logarithm, and `logit_normal` over the logarithm of 1 - x.
    (Those are PufferLib's names; none of them is normal there either.) The first trial is `mean`;
    the next few are drawn within `scale`, a part of half the range, to both sides of it.

    Args:
        name: "train.learning_rate", say.
        distribution: one of these.
        min: the lowest value.
        max: the highest.
        mean: where to begin; None: the middle.
        scale: "auto" is 0.5; "time" is one doubling of many, and is for budgets.

    Raises:
        ValueError: there is no such distribution, or the numbers do not fit it.
    """

    name: str
    distribution: str
    min: Any  # numbers, until they are checked
    max: Any
    mean: Any = None
    scale: Any = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        where = f"[sweep.{self.name}]"
        if self.distribution not in KINDS:
            raise ValueError(
                f"{where}: no such distribution: {near([self.distribution], KINDS)[0]}; there are "
                f"{', '.join(KINDS)}"
            )
        numbers = {"min": self.min, "max": self.max, "mean": self.mean}
        wrong = [k for k, x in numbers.items() if x is not None and not _is_number(x)]
        if wrong:
            raise ValueError(f"{where}: {wrong[0]} is {numbers[wrong[0]]!r}; must be a number")
        if not self.min < self.max:
            raise ValueError(f"{where}: min is {self.min}, max {self.max}; min must be below max")
        if self.mean is not None and not self.min <= self.mean <= self.max:
            raise ValueError(f"{where}: mean is {self.mean}; must be in [{self.min}, {self.max}]")
        positive = self.distribution in ("uniform_pow2", "log_normal")
        if (positive and self.min <= 0) or (self.distribution == "logit_normal" and self.max >= 1):
            bound = "above 0" if positive else "below 1"
            raise ValueError(f"{where}: {self.distribution} is of numbers {bound}")
        if self.scale not in ("auto", "time") and not _is_number(self.scale):
            raise ValueError(f"{where}: scale is {self.scale!r}; a number, 'auto' or 'time'")
        if self.kind.whole and any(end != round(end) for end in self.ends):
            what = "powers of two" if self.distribution == "uniform_pow2" else "whole numbers"
            raise ValueError(f"{where}: min is {self.min}, max {self.max}; must be {what}")

    @property
    def kind(self) -> _Kind:
        """The distribution."""
        return KINDS[self.distribution]

    @property
    def title(self) -> str:
        """What a study calls it: "1 - train.gamma", since that is what is even there."""
        return self.kind.title.format(self.name)

    @property
    def ends(self) -> tuple[Real, Real]:
        """The range of what the study has, the lower end first."""
        low, high = sorted(map(self.kind.place, (self.min, self.max)))
        return low, high

    def value(self, place: Real) -> Real:
        """The value for what the study has."""
        value = self.kind.value(round(place) if self.kind.whole else place)
        return int(value) if self.kind.whole else float(min(max(value, self.min), self.max))

    def centre(self) -> Real:
        """What the study has for `mean`."""
        return self._at(self._centre())

    def draw(self, rng: np.random.Generator) -> Real:
        """One of the first trials: what the study has, near `mean`."""
        place = self._centre() + self._width() * rng.uniform(-1, 1)
        return self._at(min(max(place, 0.0), 1.0))

    def _line(self) -> tuple[Real, Real]:
        low, high = self.ends
        return (math.log(low), math.log(high)) if self.kind.log else (low, high)

    def _centre(self) -> Real:
        """Where `mean` is between the ends, from 0 to 1."""
        if self.mean is None:
            return 0.5
        low, high = self._line()
        place = self.kind.place(self.mean)
        return ((math.log(place) if self.kind.log else place) - low) / (high - low)

    def _width(self) -> Real:
        if self.scale == "auto":
            return 0.25
        if self.scale == "time":
            return 0.5 / max(1.0, math.log2(self.max) - math.log2(self.min))
        return float(self.scale) / 2

    def _at(self, fraction: Real) -> Real:
        low, high = self._line()
        place = low + fraction * (high - low)
        if self.kind.whole:
            return round(place)
        first, last = self.ends
        return min(max(math.exp(place) if self.kind.log else place, first), last)


@dataclass(frozen=True)
class Space:
    """A `[sweep]`: what is searched for, and where.

    Attributes:
        metric: what is to be large or small: "score", "episode_return", ...
        maximize: which.
        parameters: where.
    """

    metric: str
    maximize: bool
    parameters: tuple[Parameter, ...]


# What matters first for PPO (Andrychowicz et al. 2021, "What Matters for On-Policy Deep
# Actor-Critic Methods?"), and can be traced.
OURS = Space(
    "episode_return",
    True,
    (
        Parameter("train.learning_rate", "log_normal", 1e-4, 3e-2, 3e-3),
        Parameter("train.ent_coef", "log_normal", 1e-4, 0.1, 5e-3),
        Parameter("train.gamma", "logit_normal", 0.9, 0.999, 0.99),
        Parameter("train.gae_lambda", "logit_normal", 0.8, 0.995, 0.95),
        Parameter("train.vf_coef", "log_normal", 0.1, 5.0, 1.0),
        Parameter("train.max_grad_norm", "log_normal", 0.1, 5.0, 1.0),
    ),
)

_IGNORED = ("method", "downsample", "max_cost", "early_stop_quantile", "gpus", "use_gpu")

_KEYS = ("distribution", "min", "max", "mean", "scale")


def read_space(sections: Sections, known: Iterable[str]) -> Space:
    """The space of an `.ini` file's `[sweep]` and `[sweep.GROUP.NAME]`; ours, if it has none.

    Args:
        sections: of the file, see `puffer_jax.ppo.presets.read_ini`.
        known: the names that can be searched, as "train.gamma"; "env.*" allows any in a group.

    Raises:
        ValueError: a name, a distribution or a number is none; all names are given.
    """
    mine = {name: dict(values) for name, values in sections.items() if _is_sweep(name)}
    head = mine.pop("sweep", {})
    if not mine:
        return OURS
    goal = head.pop("goal", "maximize")
    if goal not in ("maximize", "minimize"):
        raise ValueError(f"[sweep] goal is {goal!r}; expected maximize or minimize")
    metric = str(head.pop("metric", "episode_return"))
    if unknown := [name for name in head if name not in _IGNORED]:
        options = ("metric", "goal", *_IGNORED)
        raise ValueError(f"[sweep]: no such key: {', '.join(near(unknown, options))}")
    known = list(known)
    groups = {name[:-2] for name in known if name.endswith(".*")}
    names = [name.removeprefix("sweep.") for name in mine]
    strange = [n for n in names if n not in known and n.partition(".")[0] not in groups]
    if strange:
        raise ValueError(f"[sweep]: cannot search {', '.join(near(strange, known))}")
    return Space(metric, goal == "maximize", tuple(_parameter(n, mine) for n in names))


def _is_sweep(section: str) -> bool:
    return section.partition(".")[0] == "sweep"


def _parameter(name: str, sections: Mapping[str, Mapping[str, Any]]) -> Parameter:
    values = sections[f"sweep.{name}"]
    if unknown := [key for key in values if key not in _KEYS]:
        raise ValueError(f"[sweep.{name}]: no such key: {', '.join(near(unknown, _KEYS))}")
    if missing := [key for key in ("distribution", "min", "max") if key not in values]:
        raise ValueError(f"[sweep.{name}] lacks {', '.join(missing)}")
    return Parameter(name, **values)
