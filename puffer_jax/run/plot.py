"""Learning curves from the log files of runs: a metric against steps and against seconds."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from puffer_jax.base.files import write_atomically
from puffer_jax.base.packages import require
from puffer_jax.base.text import from_json

# The end of a run's name where runs differ only in their seed.
_SEED = re.compile(r"(_seed|-s)\d+$")

_AXES = {"agent_steps": "agent steps", "uptime": "wall time (s)"}


def plot_runs(runs: Sequence[Path], out: Path, metric: str = "environment/episode_return") -> Path:
    """Draw a metric of some runs against agent steps and against seconds.

    Runs whose names differ only in a trailing `_seed<k>` or `-s<k>` make one line, their mean, in a
    band from the lowest to the highest. A run is interpolated between its own logs, and does not
    count beyond them.

    Args:
        runs: the runs' folders, each with a `log.jsonl` (see `puffer_jax.JSONLLogger`).
        out: the file to write; its suffix gives the format (png, pdf, svg).
        metric: a name in the logs; lines without it are skipped.

    Returns:
        `out`.

    Raises:
        ValueError: no runs, a run without the metric, a broken log file, or an unknown suffix.
        FileNotFoundError: a run without a log file.
        ImportError: matplotlib is missing.
    """
    require("matplotlib", "the plot")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    if not runs:
        raise ValueError("no runs to plot")
    groups: dict[str, list[dict[str, np.ndarray]]] = {}
    for run in runs:
        name = Path(run).resolve().name
        groups.setdefault(_SEED.sub("", name) or name, []).append(curve(Path(run), metric))

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (axis, label) in zip(panels, _AXES.items(), strict=True):
        for name, curves in groups.items():
            x, low, mean, high = _band([(c[axis], c[metric]) for c in curves])
            several = len(curves) > 1
            title = f"{name} (mean and range of {len(curves)} runs)" if several else name
            (line,) = axes.plot(x, mean, linewidth=1.5, label=title)
            if several:
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(metric.removeprefix("environment/").replace("_", " "))
    panels[0].legend(fontsize="small")
    out = Path(out)
    kind = out.suffix.removeprefix(".") or "png"
    write_atomically(out, lambda file: figure.savefig(file, format=kind, dpi=130))
    return out


def curve(run: Path, metric: str) -> dict[str, np.ndarray]:
    """A metric of a run over time, in one piece even if it was killed and resumed.

    What a killed process logged after the checkpoint its successor resumed from is left out, and
    the successor's seconds are counted on from there.

    Returns:
        `agent_steps`, `uptime` and the metric, each an array (logs,) of float64, steps ascending.

    Raises:
        ValueError: the metric is missing (the message names those there are), or the file broken.
        FileNotFoundError: there is no log file.
    """
    path = run / "log.jsonl"
    rows: list[tuple[float, float, float | None]] = []
    names: set[str] = set()
    before, last = 0.0, 0.0
    for record in _records(path):
        step, seconds = record.get("agent_steps", record.get("step")), record.get("uptime")
        if step is None or seconds is None:
            raise ValueError(f"{path}: a line has no agent_steps or no uptime: {sorted(record)}")
        while rows and rows[-1][0] > step:
            rows.pop()
        if seconds < last:  # the clock of a new process
            before = rows[-1][1] if rows else 0.0
        last = seconds
        names |= {name for name, value in record.items() if _is_number(value)}
        rows.append((step, before + seconds, record.get(metric)))
    kept = np.array([row for row in rows if _is_number(row[2])], np.float64)
    if not kept.size:
        metrics = ", ".join(sorted(names)) or "none"
        raise ValueError(f"{path} has no metric {metric!r}; there are: {metrics}")
    return {"agent_steps": kept[:, 0], "uptime": kept[:, 1], metric: kept[:, 2]}


def _records(path: Path) -> list[dict[str, Any]]:
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate([*lines, rest], 1):
        try:
            if line.strip():
                records.append(from_json(line))
        except ValueError as error:
            if number <= len(lines):
                raise ValueError(f"{path}, line {number}: {error}") from error
            # The last line is incomplete: its writer was killed.
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: every line must be a JSON object")
    return records


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _band(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    """x, and the lowest, mean and highest value of the curves at each."""
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    # Every point of the grid belongs to some curve, so none has only NaN.
    values = [np.interp(grid, x, y, left=np.nan, right=np.nan) for x, y in curves]
    return grid, np.nanmin(values, 0), np.nanmean(values, 0), np.nanmax(values, 0)
