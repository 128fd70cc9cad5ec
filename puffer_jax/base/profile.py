"""Wall time by phase."""

from collections.abc import Callable, Iterable
from time import perf_counter


class _Phase:
    __slots__ = ("children", "parent", "profile", "seconds", "start")

    def __init__(self, profile: "Profile", parent: "_Phase | None"):
        self.profile, self.parent = profile, parent
        self.children: dict[str, _Phase] = {}
        self.seconds = self.start = 0.0

    def __enter__(self) -> None:
        self.profile._open = self
        self.start = perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += perf_counter() - self.start
        if self.parent is not None:
            self.profile._open = self.parent


class Profile:
    """Wall time by named phase: `with profile("env"): ...`; costs less than a microsecond a phase.

    Phases nest: one entered inside another is reported as "outer/inner", and the outer's time
    includes it. Not for use from several threads. Work that JAX has only dispatched is counted
    where it is waited for.
    """

    def __init__(self) -> None:
        self._root = self._open = _Phase(self, None)

    def __call__(self, name: str) -> _Phase:
        """The phase `name` inside the phase that is open now, to be entered at once."""
        parent = self._open
        phase = parent.children.get(name)
        if phase is None:
            phase = parent.children[name] = _Phase(self, parent)
        return phase

    def laps(self) -> Callable[[str], None]:
        """The phases of a loop inside the phase that is open now, one after the other.

        Returns:
            A function to call at the end of each phase, with its name; it counts the time since
            the last call. In a loop with much Python in it, `with` takes three times as long.
        """
        last = perf_counter()

        def lap(name: str) -> None:
            nonlocal last
            now = perf_counter()
            self(name).seconds += now - last
            last = now

        return lap

    def seconds(self) -> dict[str, float]:
        """Total seconds of each phase, of finished passes only; every phase before its parts."""

        def walk(phase: _Phase, path: str) -> Iterable[tuple[str, float]]:
            for name, child in phase.children.items():
                yield path + name, child.seconds
                yield from walk(child, f"{path}{name}/")

        return dict(walk(self._root, ""))
