"""The options of the backends, beyond what all take: see `puffer_jax.vector.make`."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """What every backend knows."""

    restart_failed: bool = False
    """Make an environment that raises anew, with another seed, and all those of a worker that dies
    or hangs. The step counts as truncated, and an info has {"restarts": how many}. What then fails
    before it has made a step is an error."""


@dataclass(frozen=True, kw_only=True)
class SerialOptions(BackendOptions):
    """What `Serial` knows."""

    num_buffers: int = 1
    """Groups in which the environments of puffer_jax's Serial take turns: while one steps, the
    policy acts for another. 2 is often faster."""


@dataclass(frozen=True, kw_only=True)
class PoolOptions(BackendOptions):
    """What the backends with workers know, `Multiprocessing` and `Ray`."""

    num_workers: int | Auto | None = None
    """Processes of Multiprocessing, a divisor of the number of environments. auto, and by default:
    as many as the cores allow; for PufferLib's, auto is one for each environment."""
    batch_size: int | Auto | None = None
    """Environments that Multiprocessing hands out at once, while the others step; by default, all.
    auto: half of them."""
    zero_copy: bool = True
    """Multiprocessing hands out only batches that lie in a row, whose arrays need no copying."""
    sync_traj: bool = True
    """Batches come in the order in which they were sent, each environment as often as any other;
    otherwise, in the order in which they are done."""
    overwork: bool = False
    """Allow more workers than there are cores."""
    timeout: float | None = None
    """Seconds that a worker may take for one order, and a minute more to start; by default, as long
    as it wants, and ten minutes to start."""


@dataclass(frozen=True, kw_only=True)
class MultiprocessingOptions(PoolOptions):
    """What `Multiprocessing` knows."""

    local_worker: bool = False
    """One of the workers of puffer_jax's Multiprocessing is the trainer's process."""


def names(options: type[BackendOptions]) -> list[str]:
    """The names of a backend's options."""
    return [field.name for field in dataclasses.fields(options)]
