"""`puffer-jax bench`: measure the rows, each side in its own process, taking turns."""

import datetime
import fnmatch
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puffer_jax.base import packages
from puffer_jax.bench import report
from puffer_jax.bench.rows import TORCH, Arrays, Row, rows
from puffer_jax.bench.worker import Failed, Side, Worker, difference

_INSTALL = f"pip install {packages.TORCH} gymnasium {packages.PUFFERLIB}"
_MIN_REPEATS, _MAX_REPEATS = 3, 200
# The median of a few repeats is worth little, so slow rows run for up to this many times as long.
_ENOUGH_REPEATS, _PATIENCE = 9, 5
_MATMUL = 2048


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure puffer_jax against PufferLib on torch, on this machine.

    Each side runs in its own process, and the two take turns, measurement by measurement. Their
    outputs are compared before anything is timed. Exit code 0, or 1 when outputs differ.
    """

    rows: tuple[str, ...] = ("*",)
    """Patterns of row names, such as eval-* lstm-fwd-*; see --list."""
    json: Path | None = None
    """Write everything here, every sample included."""
    plot: Path | None = None
    """Draw the ratios here (png, pdf, svg)."""
    seconds: float = 6.0
    """Seconds to spend on each row, at least. Slow work takes up to five times as long to reach
    nine rounds; three rounds are always made."""
    threads: int | None = None
    """Threads for each side. None: as many as there are cores."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device for both sides. On a GPU each row runs in float32 and in TF32."""
    list: bool = False
    """Print the names of the rows and measure nothing."""

    def run(self) -> int:
        """Measure, print, and return the exit code."""
        chosen = [
            row
            for row in rows()
            if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in self.rows)
        ]
        if not chosen:
            raise ValueError(f"no row matches {' or '.join(self.rows)}; see --list")
        if self.list:
            for row in chosen:
                print(f"{row.name:28} {row.work}")
            return 0
        return self._measure(chosen)

    def _measure(self, chosen: Sequence[Row]) -> int:
        from rich.console import Console
        from rich.progress import track

        if self.seconds <= 0 or (self.threads is not None and self.threads < 1):
            raise ValueError(
                f"seconds is {self.seconds} and threads {self.threads}; both must be positive"
            )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = self.threads or cores or 1
        console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
        if missing := missing_reference():
            console.print(
                f"{missing} is not installed, so only ours is measured. To compare: {_INSTALL}",
                soft_wrap=True,
            )
        differs = 0
        precisions = ("float32",) if self.device == "cpu" else ("float32", "tf32")
        for precision in precisions:
            extra = "" if len(precisions) == 1 else f"-{precision}"
            paths = {"json": self.json, "plot": self.plot}
            files = {
                kind: path.with_stem(path.stem + extra) for kind, path in paths.items() if path
            }
            with Arena(threads, self.device, precision, not missing) as arena:
                header = arena.header()
                for name, value in header.items():
                    console.print(f"{name}: {value}", soft_wrap=True)
                results = []
                for row in track(chosen, "rows", console=Console(stderr=True), transient=True):
                    results.append(arena.compete(row, self.seconds))
                    if files.get("json"):  # so that an interruption loses nothing
                        report.write_json(files["json"], header, results)
            console.print(report.table(results, header["matmul_flops"]["jax"]))
            for line in report.problems(results):
                console.print(line, markup=False, soft_wrap=True)
            differs += sum(result.mismatch is not None for result in results)
            if files.get("plot"):
                report.plot(files["plot"], header, results)
        return 1 if differs else 0


def missing_reference() -> str | None:
    """The first package of the reference that is not installed, if any."""
    for name in ("torch", "pufferlib", "gymnasium"):
        if importlib.util.find_spec(name) is None:
            return name
    return None


class Arena:
    """The two processes, and the contests between them.

    Args:
        threads: threads of each.
        device: "cpu" or "gpu".
        precision: "float32" or "tf32".
        reference: whether there is a torch side.
    """

    def __init__(self, threads: int, device: str, precision: str, reference: bool):
        self._settings = threads, device, precision
        self._sides: tuple[Side, ...] = ("jax", "torch") if reference else ("jax",)
        self._workers: dict[Side, Worker] = {}

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def _worker(self, side: Side) -> Worker:
        """The side's process; a new one if the last one ended."""
        if side in self._workers and not self._workers[side].alive:
            self._workers.pop(side).close()
        if side not in self._workers:
            self._workers[side] = Worker(side, *self._settings)
        return self._workers[side]

    def header(self) -> report.Header:
        """The versions and settings, and how fast this machine multiplies matrices."""
        threads, device, precision = self._settings
        about, rates = {}, {}
        for side in self._sides:
            worker = self._worker(side)
            for key, value in worker.about.items():
                about[f"{side} {key}" if key in ("device", "advantage") else key] = value
            worker.ask("open", "matmul", "matmul", {"size": _MATMUL})
        samples: dict[Side, list[float]] = {side: [] for side in self._sides}
        for _ in range(5):
            for side in self._sides:
                samples[side].append(self._worker(side).ask("sample", "matmul"))
        for side in self._sides:
            rates[side] = 2 * _MATMUL**3 / min(samples[side])
            self._worker(side).ask("close")
        return {
            "date": datetime.datetime.now().isoformat(" ", "minutes"),
            "device": device,
            "cpu": _cpu(),
            "threads": threads,
            "precision": precision,
            "python": platform.python_version(),
            **about,
            "matmul_flops": rates,
        }

    def compete(self, row: Row, seconds: float) -> report.Result:
        """Build a row's contestants, compare their outputs, and measure them in turn."""
        result = report.Result(row)
        outputs: dict[str, Arrays] = {}
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for name, arguments in row.contestants.items():
                side: Side = "torch" if name in TORCH else "jax"
                if side not in self._sides:
                    continue
                measured = result.measured[name] = report.Measured()
                try:
                    worker = self._worker(side)
                    if row.unit == "bytes":
                        # Memory is measured in a process that has done nothing else.
                        worker = Worker(side, *self._settings)
                        stack.callback(worker.close)
                    answer = worker.ask("open", name, row.family, row.sizes | arguments)
                    measured.first, found = answer
                    workers[name] = worker
                    if found is not None:
                        outputs[name] = found
                except Failed as error:
                    measured.failed = str(error)
            coarse = 1e-2 if self._settings[2] == "tf32" else 0.0
            result.mismatch = _mismatch(outputs, max(row.tolerance, coarse))
            if result.mismatch is None:
                self._rounds(result, workers, seconds)
            for side in self._sides:
                if side in self._workers and self._workers[side].alive:
                    self._workers[side].ask("close")
        return result

    def _rounds(self, result: report.Result, workers: dict[str, Worker], seconds: float) -> None:
        spent, rounds = 0.0, 0
        method = "memory" if result.row.unit == "bytes" else "sample"
        while workers and rounds < _MAX_REPEATS:
            limit = seconds if rounds >= _ENOUGH_REPEATS else seconds * _PATIENCE
            if rounds >= _MIN_REPEATS and spent > limit:
                return
            for name, worker in list(workers.items()):
                measured = result.measured[name]
                began = time.perf_counter()
                try:
                    measured.samples.append(worker.ask(method, name))
                except Failed as error:
                    # It would have fewer samples than the others.
                    measured.failed, measured.samples = str(error), []
                    del workers[name]
                spent += time.perf_counter() - began
            rounds += 1
            if method == "memory":
                return


def _mismatch(outputs: dict[str, Arrays], tolerance: float) -> str | None:
    """How the outputs differ from the reference's, or failing that from the first; None: not."""
    judge = next((name for name in TORCH if name in outputs), None)
    judge = judge or next(iter(outputs), None)
    for name, arrays in outputs.items():
        if judge is None or name == judge:
            continue
        error, array = difference(arrays, outputs[judge])
        if not error <= tolerance:
            return (
                f"{name} and {judge} differ in {array!r} by {error:.1e} of its largest magnitude; "
                f"{tolerance:.0e} is allowed"
            )
    return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()
