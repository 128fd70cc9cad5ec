"""A live picture of the run in the terminal."""

import atexit
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, SupportsFloat, TypeGuard

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_LABEL, _VALUE, _HEADING = "grey62", "bold", "bold dark_cyan"

_MOST_LINES = 15


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
    """Draw a snapshot, however wide the console; names are whole, or go on in the next line."""
    parts: list[RenderableType] = [
        _Blocks(
            _Block("Run", _summary(snapshot)),
            _Block("Time", _times(snapshot.phases)),
            _Block("Losses", [(name, _number(x)) for name, x in snapshot.losses.items()]),
        )
    ]
    stats = [(name, _number(x)) for name, x in snapshot.stats.items() if _is_number(x)]
    if stats:
        parts += [Text(), _Halves("Episodes", stats)]
    if snapshot.message:
        parts += [Text(), Text(snapshot.message, style=_LABEL, overflow="fold")]

    load = "  ".join(f"{name} {percent:.0f}%" for name, percent in snapshot.utilization.items())
    return Panel(
        Group(*parts),
        title=Text.assemble(("puffer_jax", _HEADING), " ", (snapshot.env, _VALUE)),
        title_align="left",
        subtitle=Text(load, style=_LABEL) if load else None,
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="dark_cyan",
    )


# Rows of a table: names and values.
_Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Block:
    """A table of two columns that is no wider than its longest row."""

    heading: str
    rows: _Rows

    @property
    def width(self) -> int:
        # Room for any number, so that the picture does not jump when one grows.
        rows = [cell_len(name) + 1 + max(cell_len(value), 8) for name, value in self.rows]
        return max([cell_len(self.heading), *rows])

    def text(self, width: int) -> Text:
        lines = [Text(self.heading, style=_HEADING)]
        for name, value in self.rows:
            space = " " * max(1, width - cell_len(name) - cell_len(value))
            lines.append(Text.assemble((name, _LABEL), space, (value, _VALUE)))
        return Text("\n").join(lines)


class _Blocks:
    """Blocks side by side, and those below them that find no room."""

    def __init__(self, *blocks: _Block):
        self._blocks = blocks

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines: list[list[_Block]] = [[]]
        for block in self._blocks:
            if lines[-1] and _width([*lines[-1], block]) > options.max_width:
                lines.append([])
            lines[-1].append(block)
        for blocks in lines:
            spare = max(0, options.max_width - _width(blocks))
            grid, cells = Table.grid(padding=(0, _GAP), pad_edge=False), []
            for i, block in enumerate(blocks):
                width = block.width + spare // len(blocks) + (i < spare % len(blocks))
                width = min(width, options.max_width)
                grid.add_column(width=width, overflow="fold")
                cells.append(block.text(width))
            grid.add_row(*cells)
            yield grid


_GAP = 2


def _width(blocks: Sequence[_Block]) -> int:
    return sum(block.width for block in blocks) + _GAP * (len(blocks) - 1)


class _Halves:
    """Rows in two columns, if there is room for their names."""

    def __init__(self, heading: str, rows: _Rows):
        self._heading, self._rows = heading, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = list(self._rows)
        widest = _Block(self._heading, rows).width
        columns = 2 if 2 * widest + _GAP <= options.max_width else 1
        left_out = len(rows) - _MOST_LINES * columns
        if left_out > 0:
            rows[-left_out:] = [(f"and {left_out} more", "")]
        half = -(-len(rows) // columns)
        parts = [rows[i : i + half] for i in range(0, len(rows), half)]
        headings = [self._heading, ""]
        yield _Blocks(*(_Block(h, part) for h, part in zip(headings, parts, strict=False)))


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


def _summary(snapshot: Snapshot) -> _Rows:
    todo = max(snapshot.total_steps - snapshot.steps, 0)
    return [
        ("params", _count(snapshot.params)),
        ("steps", f"{_count(snapshot.steps)} / {_count(snapshot.total_steps)}"),
        ("steps/s", _count(snapshot.sps)),
        ("epoch", f"{snapshot.epoch:,}"),
        ("uptime", _duration(snapshot.uptime)),
        ("remaining", _duration(todo / snapshot.sps) if snapshot.sps > 0 else "?"),
    ]


def _times(phases: Mapping[str, float]) -> _Rows:
    total = sum(seconds for name, seconds in phases.items() if "/" not in name)
    rows = []
    for name, seconds in phases.items():
        *outer, last = name.split("/")
        percent = 100 * seconds / total if total > 0 else 0.0
        value = f"{_duration(seconds)} {f'{percent:.0f}%':>4}"
        rows.append(("  " * len(outer) + last, f"{value:>11}"))
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
            self._size = self._console.size
            self._live.start()
            # A program that ends without `close` must not leave the cursor hidden.
            atexit.register(self.close)
        self._forget_another_size()
        self._live.update(picture, refresh=True)

    def close(self) -> None:
        """Leave the last picture on the terminal; a later `update` begins a new one."""
        if self._live is not None:
            self._forget_another_size()
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)

    def _forget_another_size(self) -> None:
        """Clear a screen on which the last picture no longer has the lines that rich counts."""
        assert self._console is not None  # only with a picture
        if self._console.size != self._size:
            self._size = self._console.size
            self._console.clear()

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
