"""What `puffer_jax.parity.compare` found: the numbers, the bars, and how they are shown."""

import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from puffer_jax.base.files import write_atomically
from puffer_jax.base.packages import require

Kind = Literal["output", "gradient", "layer"]

# Largest error allowed, relative to the largest magnitude of torch's float64 array.
BARS: dict[Kind, dict[str, float]] = {
    "output": {"float64": 1e-14, "float32": 5e-6},
    "gradient": {"float64": 1e-13, "float32": 2e-5},
    "layer": {"float64": 1e-14, "float32": 5e-6},
}

# Our float32 error against the float64 result, in units of torch's own.
MAX_RATIO = 2.0

# For fewer numbers the ratio is reported but not held to its bar: with a dozen, one in a hundred
# pairs of equally good results is above it.
MIN_NUMBERS = 100

_IN_FLOAT32 = (
    "its float64 result is as good as float32's: something in it computes in float32, as "
    "nnx.MultiHeadAttention does unless it has a mask, dropout or an attention_fn of its own"
)

KINDS: tuple[Kind, ...] = ("output", "gradient", "layer")

PRECISIONS = ("float64", "float32")


@dataclass(frozen=True)
class Errors:
    """How far our array, of either precision, is from torch's float64 one.

    Attributes:
        absolute: the largest difference.
        relative: `absolute`, relative to the largest magnitude of torch's array.
        ulp: the largest difference in units of the last place of torch's number in our array's
            precision; a number below the last place of the largest counts as that last place.
    """

    absolute: float
    relative: float
    ulp: float


@dataclass(frozen=True)
class Row:
    """One output, gradient or layer, compared.

    Attributes:
        name: torch's name for it.
        kind: what was compared.
        shape: the shape of torch's array.
        float64: errors of our float64 array against torch's float64 one.
        float32: errors of our float32 array, also against torch's float64 one.
        torch_rms: root-mean-square error of torch's float32 array against its float64 one,
            relative to the largest magnitude of the latter.
        jax_rms: the same for our float32 array, also against torch's float64 one.
        problem: why the arrays cannot be compared; empty if they can.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    float64: Errors
    float32: Errors
    torch_rms: float
    jax_rms: float
    problem: str = ""

    @property
    def ratio(self) -> float:
        """Our float32 error in units of torch's own."""
        return _ratio([self])

    @property
    def failures(self) -> list[str]:
        """One line for each bar that the row exceeds."""
        if self.problem:
            return [f"{self.kind} {self.name}: {self.problem}"]
        return [
            f"{self.kind} {self.name}: {precision} error {error:.1e} > {bar:.0e}"
            for precision, bar in BARS[self.kind].items()
            if (error := getattr(self, precision).relative) > bar
        ]


def _ratio(rows: Sequence[Row]) -> float:
    # Every number counts alike: a bias of one number may be exact by luck on one side.
    sizes = [math.sqrt(math.prod(row.shape)) for row in rows]
    ours = math.hypot(*(size * row.jax_rms for size, row in zip(sizes, rows, strict=True)))
    theirs = math.hypot(*(size * row.torch_rms for size, row in zip(sizes, rows, strict=True)))
    # An array that is exact to a few per cent of its last place has no error to speak of.
    floor = math.hypot(*sizes) * 2.0**-28
    return max(ours, floor) / max(theirs, floor) if floor else 1.0


@dataclass(frozen=True)
class Report:
    """What `compare` found; print it, or see `assert_close`.

    Attributes:
        rows: outputs, gradients and layers, each in torch's order.
        weights_differ: parameters that differ or are missing on one side, by torch's names.
        not_compared: layers that ran on one side only.
        hint: where to look, if the first layer that differs was given another input than torch's;
            else empty.
    """

    rows: tuple[Row, ...]
    weights_differ: tuple[str, ...]
    not_compared: tuple[str, ...]
    hint: str = ""

    def of(self, kind: Kind) -> list[Row]:
        """The rows of one kind."""
        return [row for row in self.rows if row.kind == kind]

    @property
    def first_difference(self) -> str | None:
        """The first layer, in torch's order of execution, that differs in float64."""
        bar = BARS["layer"]["float64"]
        return next((r.name for r in self.of("layer") if r.float64.relative > bar), None)

    @property
    def computed_in_float32(self) -> bool:
        """Whether the first layer that differs is, in float64, no better than in float32.

        Then something in it computes in float32 whatever it is given.
        """
        first = next((r for r in self.of("layer") if r.name == self.first_difference), None)
        if first is None or not first.float64.relative < 1e-5:
            return False
        return first.float64.relative > first.float32.relative / 100

    @property
    def ratios(self) -> dict[str, float]:
        """Our float32 error in units of torch's, over all outputs and over all gradients.

        The errors of all rows are taken together as a root mean square: a few numbers may be
        lucky on one side, but hardly all of them. It takes a few dozen observations.
        """
        return {"output": _ratio(self.of("output")), "gradient": _ratio(self.of("gradient"))}

    def _numbers(self, kind: str) -> int:
        return sum(math.prod(row.shape) for row in self.rows if row.kind == kind)

    @property
    def failures(self) -> list[str]:
        """One line for everything that `assert_close` objects to."""
        lines = [f"weights differ: {name}" for name in self.weights_differ]
        lines += [line for row in self.rows for line in row.failures]
        lines += [
            f"float32 errors of all {kind}s: {ratio:.2f} times torch's own > {MAX_RATIO:g}"
            for kind, ratio in self.ratios.items()
            if ratio > MAX_RATIO and self._numbers(kind) >= MIN_NUMBERS
        ]
        return lines

    def assert_close(self) -> None:
        """Hold every row against `BARS`, both `ratios` against `MAX_RATIO`, and the weights.

        A ratio over fewer than `MIN_NUMBERS` numbers is not held to its bar.

        A layer that ran on only one side is not a failure in itself, since an activation may be a
        module here and a plain function there; a layer whose weights are missing on one side is.

        Raises:
            AssertionError: lists everything that fails.
        """
        if failures := self.failures:
            raise AssertionError(
                f"the policies differ, first in layer {self.first_difference}:\n"
                + "\n".join(filter(None, (*failures, self._advice())))
            )

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a JSON file; infinite errors become null."""
        content = {
            "close": not self.failures,
            "failures": self.failures,
            "first_difference": self.first_difference,
            "bars": {**BARS, "ratio": MAX_RATIO},
            "ratios": self.ratios,
            **asdict(self),
        }
        data = json.dumps(_finite(content), indent=1, allow_nan=False).encode()
        write_atomically(Path(path), lambda file: file.write(data))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw each layer's error in both precisions; the suffix of `path` sets the format.

        Raises:
            ImportError: matplotlib is missing.
        """
        require("matplotlib.figure", "the plot")
        from matplotlib.figure import Figure

        layers = self.of("layer")
        figure = Figure(figsize=(max(6.0, 0.3 * len(layers) + 2), 5), layout="constrained")
        axes = figure.subplots()
        for precision, color in zip(PRECISIONS, ("C0", "C1"), strict=True):
            errors = [getattr(row, precision).relative for row in layers]
            # A logarithmic axis has room for neither exact agreement nor infinity.
            axes.plot(np.clip(errors, 1e-18, 1e3), "o-", color=color, label=precision)
            axes.axhline(BARS["layer"][precision], color=color, linestyle="--", linewidth=1)
        axes.set_yscale("log")
        axes.set_xticks(range(len(layers)), [row.name for row in layers], rotation=90, fontsize=8)
        axes.set_ylabel("largest error / largest output (none: 1e-18)")
        axes.set_title("JAX against torch, layer by layer (dashed: the bar)")
        axes.legend()
        path = Path(path)
        kind = path.suffix.removeprefix(".") or "png"
        write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=120))

    def __str__(self) -> str:
        lines = []
        if self.weights_differ:
            lines += [
                f"THE WEIGHTS DIFFER: {_some(self.weights_differ)}",
                "Copy them first: "
                "puffer_jax.load_state_dict(jax_policy, torch_policy.state_dict())",
                "",
            ]
        failures = self.failures
        lines += [f"DIFFERENT, {len(failures)} failures." if failures else "CLOSE."]
        lines += [self._where(), "", _tables(self)]
        lines += ["abs, rel, ulp: our largest error, in either precision, against torch's float64"]
        lines += ["rms: root-mean-square error of float32, torch's and ours, against the same"]
        lines += [
            f"float32 errors of all {kind}s: {ratio:.2f} times torch's own (bar {MAX_RATIO:g})"
            for kind, ratio in self.ratios.items()
        ]
        if self.not_compared:
            lines += [f"layers not compared: {_some(self.not_compared)}"]
        return "\n".join(lines)

    def _advice(self) -> str:
        return self.hint or (_IN_FLOAT32 if self.computed_in_float32 else "")

    def _where(self) -> str:
        if self.first_difference is not None:
            advice = self._advice()
            where = f"First layer that differs: {self.first_difference}"
            return f"{where}; {advice}" if advice else where
        agree = f"All {len(self.of('layer'))} layers agree."
        if any(row.failures for row in self.of("output")):
            return agree + " Look at what is done between and after them."
        if any(row.failures for row in self.of("gradient")):
            return (
                f"{agree} So do the outputs. Look at gradients that are written out; with "
                'puffer_jax.kernels.use("xla") none is a kernel\'s.'
            )
        return agree


def _tables(report: Report) -> str:
    text = io.StringIO()
    console = Console(file=text, width=100, markup=False, highlight=False, emoji=False)
    for kind in KINDS:
        table = Table(box=None, padding=(0, 1, 0, 0), width=100)
        table.add_column(f"\n{kind}s", ratio=1, overflow="fold")
        columns = "float64\nabs", "\nrel", "\nulp", "float32\nabs", "\nrel", "\nulp"
        for column in (*columns, "torch\nrms", "JAX\nrms", "\nratio"):
            table.add_column(column, justify="right", no_wrap=True)
        bars = BARS[kind]
        table.add_row("  bar", "", f"{bars['float64']:.0e}", "", "", f"{bars['float32']:.0e}")
        for row in report.of(kind):
            name = ("✗ " if row.failures else "  ") + row.name
            if row.problem:
                continue
            numbers = []
            for one in (row.float64, row.float32):
                numbers += [f"{one.absolute:.1e}", f"{one.relative:.1e}", f"{one.ulp:.0e}"]
            numbers += [f"{row.torch_rms:.1e}", f"{row.jax_rms:.1e}", f"{row.ratio:.2g}"]
            zeros = ("0.0e+00", "0e+00")
            table.add_row(name, *("0" if number in zeros else number for number in numbers))
        console.print(table)
        for row in report.of(kind):
            if row.problem:
                console.print(f"✗ {row.name}: {row.problem}")
        console.print()
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _some(names: tuple[str, ...], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _finite(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
