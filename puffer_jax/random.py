"""The numbers of `jax.random`, faster on CPUs."""

from puffer_jax.nn.random import categorical as categorical
from puffer_jax.nn.random import fast as fast
from puffer_jax.nn.random import split as split
