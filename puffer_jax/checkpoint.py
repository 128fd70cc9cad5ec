"""Checkpoints of a run."""

from puffer_jax.run.checkpoint import latest as latest
from puffer_jax.run.checkpoint import restore as restore
from puffer_jax.run.checkpoint import save as save
