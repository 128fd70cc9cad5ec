"""`puffer-jax convert`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from puffer_jax.cli.checkpoint import CheckpointOptions
from puffer_jax.weights.files import save_weights


@dataclass(frozen=True, kw_only=True)
class Convert(CheckpointOptions):
    """Write a checkpoint in another format, chosen by the suffix: .pt, .safetensors or .bin.

    Exit code 0, or 2 when something is wrong; nothing is written then.
    """

    source: tyro.conf.Positional[Path]
    """The checkpoint to read."""
    target: tyro.conf.Positional[Path]
    """The file to write."""

    def run(self) -> int:
        """Convert, and return the exit code."""
        save_weights(self.load(self.source, self.make_env()), self.target)
        return 0
