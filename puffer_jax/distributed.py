"""Several processes, on one machine or many, that train one policy."""

from puffer_jax.run.processes import ProcessLostError as ProcessLostError
from puffer_jax.run.processes import initialize as initialize
