"""What the bench found, as a table, as JSON and as a plot."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from puffer_jax.base.files import write_atomically
from puffer_jax.base.packages import require
from puffer_jax.bench.rows import Row

# The versions, settings and speed of the machine, as `puffer_jax.bench.command.Arena` finds them.
Header = dict[str, Any]

OURS = "ours"
# Contestants with a column of their own.
_COLUMNS = {"torch": ("torch", "pufferlib"), "torch.compile": ("torch.compile",)}


@dataclass
class Measured:
    """One contestant in one row.

    Attributes:
        samples: the cost of a unit of work in seconds or bytes, in the order taken.
        first: seconds of the first call, with all compilation.
        failed: why there are no samples, if there are none.
    """

    samples: list[float] = field(default_factory=list)
    first: float | None = None
    failed: str | None = None

    @property
    def median(self) -> float:
        """The median of the samples."""
        return float(np.median(self.samples))


@dataclass
class Result:
    """A row with what was measured.

    Attributes:
        row: what was measured.
        measured: what was measured, by contestant.
        mismatch: how the outputs of the contestants differ; if they do, nothing was timed.
    """

    row: Row
    measured: dict[str, Measured] = field(default_factory=dict)
    mismatch: str | None = None

    def ratio(self, other: str) -> tuple[float, float, float] | None:
        """How many times cheaper ours is: the ratio of the medians, and the ratios' quartiles.

        The samples are interleaved, so each of theirs is divided by the one of ours next to it.
        """
        pair = self.measured.get(OURS), self.measured.get(other)
        if not all(one and one.samples for one in pair):
            return None
        ours, theirs = (np.array(one.samples) for one in pair if one)
        low, high = np.quantile(theirs / ours, (0.25, 0.75))
        return float(np.median(theirs) / np.median(ours)), float(low), float(high)

    def to_dict(self, matmul: float) -> dict[str, object]:
        """As written to JSON; `matmul` is the operations per second of a large matrix product."""
        contestants: dict[str, dict[str, object]] = {}
        for name, one in self.measured.items():
            contestants[name] = {"first_call_s": one.first, "failed": one.failed}
            if one.samples:
                low, high = np.quantile(one.samples, (0.25, 0.75))
                contestants[name] |= {"median": one.median, "quartiles": [low, high]}
                contestants[name] |= {"samples": one.samples}
                if self.row.flops:
                    rate = self.row.flops / one.median
                    contestants[name] |= {"flops_per_s": rate}
                    contestants[name] |= {"share_of_matmul": rate / matmul}
        others = [name for name in self.measured if name != OURS]
        ratios = {name: ratio for name in others if (ratio := self.ratio(name))}
        kept = {k: v for k, v in asdict(self.row).items() if k in ("work", "flops", "unit")}
        return {
            **kept,
            "cost_of": "a step, in seconds" if self.row.unit == "steps/s" else self.row.unit,
            "contestants": contestants,
            "ratios": {n: {"median": r[0], "quartiles": list(r[1:])} for n, r in ratios.items()},
            "mismatch": self.mismatch,
        }


def table(results: Iterable[Result], matmul: float) -> Table:
    """The table to print; `matmul` is the operations per second of a large matrix product."""
    made = Table(show_lines=True)
    for name in ("row", "ours", "torch", "torch.compile", "others"):
        made.add_column(name, justify="left" if name == "row" else "right", no_wrap=name != "row")
    for name in (
        "torch / ours",
        "compile / ours",
        "GF/s, of\nmatmul's",
        "first call, s\nours / compile",
    ):
        made.add_column(name, justify="right", no_wrap=True)
    for result in results:
        row, measured = result.row, result.measured
        named = [
            next((name for name in names if name in measured), names[0])
            for names in _COLUMNS.values()
        ]
        others = [name for name in measured if name not in (OURS, *named)]
        ours = measured.get(OURS, Measured())
        rate = "-"
        if row.flops and ours.samples:
            rate = row.flops / ours.median
            rate = f"{rate / 1e9:.3g}\n{rate / matmul:.0%}"
        firsts = [measured.get(name, Measured()).first for name in (OURS, named[1])]
        made.add_row(
            f"{row.name}\n[dim]{row.work}[/dim]",
            _cost(row, ours),
            *(_cost(row, measured.get(name, Measured())) for name in named),
            "\n".join(
                f"{name} {_cost(row, measured[name])}{_times(result, name)}" for name in others
            ),
            *(_ratio(result, name) for name in named),
            rate,
            " / ".join("-" if first is None else f"{first:.2g}" for first in firsts),
        )
    return made


def _cost(row: Row, measured: Measured) -> str:
    if not measured.samples:
        return "-"
    cost = measured.median
    match row.unit:
        case "steps/s":
            return f"{1e-3 / cost:.3g} K/s"
        case "bytes":
            return f"{cost / 2**20:.0f} MiB"
    return f"{1e3 * cost:.3g} ms" if cost >= 1e-3 else f"{1e6 * cost:.3g} us"


def _ratio(result: Result, name: str) -> str:
    ratio = result.ratio(name)
    return "-" if ratio is None else f"[bold]{ratio[0]:.2f}[/bold]\n{ratio[1]:.2f}-{ratio[2]:.2f}"


def _times(result: Result, name: str) -> str:
    ratio = result.ratio(name)
    return "" if ratio is None else f" ({ratio[0]:.2f}x)"


def problems(results: Iterable[Result]) -> list[str]:
    """A line for everything that was not measured, with the reason."""
    lines = []
    for result in results:
        if result.mismatch:
            lines.append(f"{result.row.name}: not timed: {result.mismatch}")
        for name, one in result.measured.items():
            if one.failed:
                lines.append(f"{result.row.name}, {name}: {one.failed}")
    return lines


def write_json(path: Path, header: Header, results: Iterable[Result]) -> None:
    """Write everything, samples included; costs are seconds (per call or step) or bytes."""
    matmul = header["matmul_flops"]["jax"]
    report = {"header": header, "rows": {r.row.name: r.to_dict(matmul) for r in results}}
    text = json.dumps(report, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def plot(path: Path, header: Header, results: Iterable[Result]) -> None:
    """Draw bars of how many times faster ours is; the suffix sets the format (png, pdf, svg).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is nothing to compare.
    """
    require("matplotlib.figure", "the plot")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    # What only ours can do has nothing to be compared with.
    compared = [
        (result.row.name, [(name, result.ratio(name)) for name in result.measured])
        for result in results
    ]
    compared = [
        (row, [(name, ratio) for name, ratio in bars if ratio and not name.startswith(OURS)])
        for row, bars in compared
    ]
    compared = [(row, bars) for row, bars in compared if bars]
    if not compared:
        raise ValueError("nothing was compared, so there is nothing to plot")
    names = {name: None for _, bars in compared for name, _ in bars}
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(compared)), layout="constrained")
    axes = figure.subplots()
    for y, (_, bars) in enumerate(compared):
        height = 0.8 / len(bars)
        for i, (name, (ratio, low, high)) in enumerate(bars):
            middle = y - 0.4 + (i + 0.5) * height
            axes.barh(middle, ratio - 1, 0.9 * height, left=1, color=colors[name])
            axes.plot((low, high), (middle, middle), color="black", linewidth=0.8, alpha=0.6)
            won = ratio >= 1
            axes.annotate(
                f"{ratio:.2f}",
                (max(ratio, high) if won else min(ratio, low), middle),
                (4 if won else -4, 0),
                textcoords="offset points",
                ha="left" if won else "right",
                va="center",
                fontsize=6,
            )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5) / 1.15, max(high, 2) * 1.15)
    axes.set_xticks(
        [x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= x <= high or x == 1]
    )
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(compared)), [row for row, _ in compared])
    axes.set_ylim(len(compared) - 0.4, -0.6)
    axes.set_xlabel("times faster than (for memory: smaller than); right of 1 puffer_jax wins")
    axes.grid(axis="x", alpha=0.3)
    patches = [Patch(color=color, label=name) for name, color in colors.items()]
    axes.legend(handles=patches, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    where = f"{header['cpu']}, {header['threads']} threads"
    where = where if header["device"] == "cpu" else f"{header['jax device']}, {header['precision']}"
    axes.set_title(f"{where}, {header['date']}", fontsize=9)
    out = Path(path)
    kind = out.suffix.removeprefix(".") or "png"
    write_atomically(out, lambda file: figure.savefig(file, format=kind, dpi=130))
