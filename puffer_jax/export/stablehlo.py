"""StableHLO, as `jax.export` writes and reads it."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.export

from puffer_jax.export.step import Step
from puffer_jax.kernels import use

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def check(platforms: Sequence[str]) -> None:
    """Raise a ValueError unless they are platforms, at least one."""
    if not platforms or not set(platforms) <= set(_PLATFORMS):
        given = ", ".join(platforms) or "none"
        raise ValueError(f"platforms are {given}; expected some of {', '.join(_PLATFORMS)}")


def serialized(step: Step, platforms: Sequence[str]) -> bytes:
    """What `jax.export.deserialize` reads: the step, compiled by XLA on any of the platforms."""
    with use("xla"):  # our kernels, and Pallas's, are calls that no other process can resolve
        traced = jax.export.export(jax.jit(step.function), platforms=tuple(platforms))
        exported = traced(step.observations, step.state)
    return bytes(exported.serialize())


def read(path: Path) -> jax.export.Exported:
    """The program in a file.

    Raises:
        ValueError: the file is none of `jax.export`'s, or a part of one.
    """
    try:
        return jax.export.deserialize(bytearray(path.read_bytes()))
    except FileNotFoundError:
        raise
    except Exception as error:  # flatbuffers' and MLIR's own, whatever is damaged
        raise ValueError(f"{path} is not a whole file of jax.export: {error!r}") from error
