"""Many environments stepped at once: in this process, in several, or on a cluster.

The protocol is that of the reference's `vector.py`: `async_reset`, then `recv` and `send` in turn,
or `reset` and `step`, which do both. `recv` returns the environments' own buffers, which are
overwritten after `send`.

An emulated environment's episode ends with its last observation, and the step after resets it and
ignores the action; a native PufferLib environment resets itself within the step. This module
imports neither JAX nor torch, and no environment.
"""

from puffer_jax.vector.envs import Info as Info
from puffer_jax.vector.jax_native import JaxVecEnv as JaxVecEnv
from puffer_jax.vector.making import BACKENDS as BACKENDS
from puffer_jax.vector.making import make as make
from puffer_jax.vector.multiprocessing import Multiprocessing as Multiprocessing
from puffer_jax.vector.protocol import AgentBatch as AgentBatch
from puffer_jax.vector.protocol import VecEnv as VecEnv
from puffer_jax.vector.protocol import WorkerError as WorkerError
from puffer_jax.vector.ray import Ray as Ray
from puffer_jax.vector.serial import Serial as Serial
from puffer_jax.vector.tuning import Trial as Trial
from puffer_jax.vector.tuning import autotune as autotune
from puffer_jax.vector.tuning import measure as measure
