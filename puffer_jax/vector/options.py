"""The backends' options, beyond the arguments that all take: see `puffer_jax.vector.make`."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Options of every backend."""

    restart_failed: bool = False
    """Rebuild an environment that raises, with another seed, and all those of a worker that dies or
    hangs. The step counts as truncated, and an info has {"restarts": how many}. Failing again
    before a step has been made is an error."""


@dataclass(frozen=True, kw_only=True)
class SerialOptions(BackendOptions):
    """Options of `Serial`."""

    num_buffers: int = 1
    """Groups of environments that take turns in puffer_jax's Serial: while one steps, the policy
    acts for another. 2 is often faster."""


@dataclass(frozen=True, kw_only=True)
class PoolOptions(BackendOptions):
    """Options of the backends with workers, `Multiprocessing` and `Ray`."""

    num_workers: int | Auto | None = None
    """Processes of Multiprocessing, a divisor of the number of environments. auto, the default: as
    many as the cores allow; for PufferLib's, auto is one for each environment."""
    batch_size: int | Auto | None = None
    """Environments that Multiprocessing hands out at once, while the others step; by default, all.
    auto: half of them."""
    zero_copy: bool = True
    """Multiprocessing hands out only batches that are contiguous, so that nothing is copied."""
    sync_traj: bool = True
    """Batches come in the order in which they were sent, each environment as often as any other;
    otherwise, in the order in which they finish."""
    overwork: bool = False
    """Allow more workers than there are cores."""
    timeout: float | None = None
    """Seconds that a worker may take for one order, and a minute more to start; by default, no
    limit, but ten minutes to start."""


@dataclass(frozen=True, kw_only=True)
class MultiprocessingOptions(PoolOptions):
    """Options of `Multiprocessing`."""

    local_worker: bool = False
    """The trainer's process is one of the workers of puffer_jax's Multiprocessing."""


def names(options: type[BackendOptions]) -> list[str]:
    """The names of a backend's options."""
    return [field.name for field in dataclasses.fields(options)]
