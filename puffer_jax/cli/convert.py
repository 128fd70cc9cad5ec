"""`puffer-jax convert`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from puffer_jax.cli.check import _make, _PolicyOptions
from puffer_jax.weights.files import save_weights


@dataclass(frozen=True, kw_only=True)
class Convert(_PolicyOptions):
    """Write a checkpoint in another format; the suffixes .pt, .safetensors, .bin say which.

    Exit code 0, or 2 when something is wrong; then nothing is written.
    """

    source: tyro.conf.Positional[Path]
    """The checkpoint to read."""
    target: tyro.conf.Positional[Path]
    """The file to write."""

    def run(self) -> int:
        """Convert, and return the exit code."""
        env = None if self.env is None else _make(self.env)
        save_weights(self.load(self.source, env), self.target)
        return 0
