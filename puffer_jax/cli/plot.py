"""`puffer-jax plot`."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw the learning curves of runs, against steps and against seconds.

    Runs whose names differ only in _seed<k> share one line, with a band from lowest to highest.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The runs' folders."""
    out: Path
    """The picture to write (png, pdf, svg)."""
    metric: str = "environment/episode_return"
    """A name in the runs' log.jsonl."""

    def run(self) -> int:
        """Draw, and return the exit code."""
        from puffer_jax.run.plot import plot_runs

        print(plot_runs(self.runs, self.out, self.metric))
        return 0
