"""One operation per file, and who computes it: a kernel for the platform, or XLA."""

from puffer_jax.kernels.choice import OPERATIONS as OPERATIONS
from puffer_jax.kernels.choice import Kernel as Kernel
from puffer_jax.kernels.choice import Operation as Operation
from puffer_jax.kernels.choice import replace as replace
from puffer_jax.kernels.choice import use as use
