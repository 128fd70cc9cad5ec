"""A live picture of the run in the terminal."""

import atexit
import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, SupportsFloat, TypeGuard

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_LABEL, _VALUE, _HEADING = "grey62", "bold", "bold dark_cyan"

_MOST_STATS = 30


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What the dashboard shows.

    Attributes:
        env: the name of the environment.
        params: number of the policy's parameters.
        steps: agent steps so far.
        total_steps: agent steps at which the run ends.
        sps: recent agent steps per second, which give the remaining time.
        epoch: updates so far.
        uptime: seconds since the start.
        phases: seconds by phase, as `Profile.seconds` gives them.
        losses: the losses, by name.
        stats: episode statistics by name; any that are not numbers are left out.
        message: the last thing that happened.
        utilization: percent by name, such as {"CPU": 51.0}.
    """

    env: str
    params: int
    steps: int
    total_steps: int
    sps: float
    epoch: int
    uptime: float
    phases: Mapping[str, float]
    losses: Mapping[str, float]
    stats: Mapping[str, object]
    message: str = ""
    utilization: Mapping[str, float] = field(default_factory=dict)


def render(snapshot: Snapshot) -> RenderableType:
    """Draw a snapshot; it fits 80 columns, and long names are cut short."""
    top = Table.grid(expand=True, padding=(0, 2))
    for ratio in (9, 8, 9):
        top.add_column(ratio=ratio)
    top.add_row(
        _table("Run", _summary(snapshot)),
        _table("Time", _times(snapshot.phases)),
        _table("Losses", ((name, (_number(x),)) for name, x in snapshot.losses.items())),
    )
    parts: list[RenderableType] = [top]

    stats = [(name, (_number(x),)) for name, x in snapshot.stats.items() if _is_number(x)]
    if stats:
        left_out = len(stats) - _MOST_STATS
        if left_out > 0:
            stats[_MOST_STATS:] = [(f"and {left_out} more", ("",))]
        half = (len(stats) + 1) // 2
        bottom = Table.grid(expand=True, padding=(0, 2))
        bottom.add_column(ratio=1)
        bottom.add_column(ratio=1)
        bottom.add_row(_table("Episodes", stats[:half]), _table("", stats[half:]))
        parts += [Text(), bottom]
    if snapshot.message:
        parts += [Text(), Text(snapshot.message, style=_LABEL, no_wrap=True, overflow="ellipsis")]

    load = "  ".join(f"{name} {percent:.0f}%" for name, percent in snapshot.utilization.items())
    return Panel(
        Group(*parts),
        title=Text("puffer_jax", style=_HEADING),
        title_align="left",
        subtitle=Text(load, style=_LABEL) if load else None,
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="dark_cyan",
    )


def line(snapshot: Snapshot) -> str:
    """A snapshot in one line, for logs."""
    parts = [
        f"step {snapshot.steps:,} of {snapshot.total_steps:,}",
        f"epoch {snapshot.epoch:,}",
        f"{_count(snapshot.sps)} steps/s",
        _duration(snapshot.uptime),
    ]
    stats = snapshot.stats
    if _is_number(stats.get("episode_return")):
        parts.append(f"episode_return {_number(stats['episode_return'])}")  # type: ignore[arg-type]
    return ", ".join(parts)


def _table(heading: str, rows: Iterable[tuple[str, tuple[str, ...]]]) -> Table:
    rows = list(rows)
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for _ in range(max((len(values) for _, values in rows), default=0)):
        table.add_column(justify="right", no_wrap=True, overflow="ellipsis")
    table.add_row(Text(heading, style=_HEADING))
    for name, values in rows:
        table.add_row(Text(name, style=_LABEL), *(Text(value, style=_VALUE) for value in values))
    return table


def _summary(snapshot: Snapshot) -> list[tuple[str, tuple[str, ...]]]:
    todo = max(snapshot.total_steps - snapshot.steps, 0)
    steps = f"{_count(snapshot.steps)} / {_count(snapshot.total_steps)}"
    rows = {
        "env": snapshot.env if len(snapshot.env) <= 15 else snapshot.env[:14] + "…",
        "params": _count(snapshot.params),
        "steps": steps,
        "steps/s": _count(snapshot.sps),
        "epoch": f"{snapshot.epoch:,}",
        "uptime": _duration(snapshot.uptime),
        "remaining": _duration(todo / snapshot.sps) if snapshot.sps > 0 else "?",
    }
    return [(name, (value,)) for name, value in rows.items()]


def _times(phases: Mapping[str, float]) -> list[tuple[str, tuple[str, ...]]]:
    total = sum(seconds for name, seconds in phases.items() if "/" not in name)
    rows = []
    for name, seconds in phases.items():
        *outer, last = name.split("/")
        percent = 100 * seconds / total if total > 0 else 0.0
        rows.append(("  " * len(outer) + last, (_duration(seconds), f"{percent:.0f}%")))
    return rows


def _is_number(value: Any) -> TypeGuard[SupportsFloat]:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)


def _number(value: SupportsFloat) -> str:
    value = float(value)
    size = abs(value)
    if value == 0 or 1e-3 <= size < 1e3:
        return f"{value:.3f}"
    if 1e3 <= size < 1e7:
        return f"{value:,.0f}"
    return f"{value:.1e}"


def _count(number: float | int) -> str:
    for unit in ("", "K", "M", "B", "T"):
        digits = f"{number:.1f}" if unit else f"{number:.0f}"
        # Judged by what would be printed: 999,999 is 1.0M, not 1000.0K.
        if abs(float(digits)) < 1000 or unit == "T":
            return digits + unit
        number /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


class Dashboard:
    """Keeps the latest snapshot on the terminal; elsewhere it prints a line now and then.

    Without a terminal it does so only within `with dashboard:`, every `seconds`.

    `with dashboard:` restores the terminal at the end, and so do `close` and the end of the
    program.

    Args:
        console: where to draw; rich's usual console by default.
        force: draw even where there is no terminal.
        seconds: time between two lines, where there is no terminal.
    """

    def __init__(
        self, console: Console | None = None, *, force: bool = False, seconds: float = 10.0
    ):
        console = console or Console(force_terminal=True if force else None)
        # rich also obeys FORCE_COLOR, which says nothing about where the output goes.
        self._console = console if force or console.file.isatty() else None
        self._live: Live | None = None
        self._seconds = seconds
        self._next_line = math.inf

    def update(self, snapshot: Snapshot) -> None:
        """Show `snapshot`, with the machine's load if psutil is installed."""
        if self._console is None:
            if time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + self._seconds
                print(line(snapshot), flush=True)
            return
        if not snapshot.utilization:
            snapshot = dataclasses.replace(snapshot, utilization=_utilization())
        picture = render(snapshot)
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
            # A program that ends without `close` must not leave the cursor hidden.
            atexit.register(self.close)
        self._live.update(picture, refresh=True)

    def close(self) -> None:
        """Leave the last picture on the terminal; a later `update` begins a new one."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)

    def say(self, message: str) -> None:
        """Print a message where there is no terminal, within `with dashboard:`."""
        if self._console is None and self._next_line < math.inf:
            print(message, flush=True)

    def __enter__(self) -> "Dashboard":
        self._next_line = time.monotonic() + self._seconds
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._next_line = math.inf
        self.close()


def _utilization() -> dict[str, float]:
    try:
        import psutil
    except ImportError:
        return {}
    return {"CPU": psutil.cpu_percent(), "RAM": psutil.virtual_memory().percent}
