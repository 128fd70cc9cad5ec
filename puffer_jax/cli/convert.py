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
    padding: int | None = None
    """Of a `.bin` target: each tensor starts at a multiple of so many floats. By default 8 for
    PufferLib 4's native network, 1 for others."""
    source_padding: int | None = None
    """The same of a `.bin` source that has no sidecar, which takes --env."""

    def run(self) -> int:
        """Convert, and return the exit code."""
        policy = self.load(self.source, self.make_env(), padding=self.source_padding)
        save_weights(policy, self.target, padding=self.padding)
        return 0
