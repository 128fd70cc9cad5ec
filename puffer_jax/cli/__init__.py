"""The `puffer-jax` command: train and play policies, check and convert checkpoints, benchmark."""

from puffer_jax.cli.command import main as main
