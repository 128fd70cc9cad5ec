"""Kernels for TPUs: Pallas, compiled by Mosaic.

They are compiled for a v5e and checked in Pallas's interpreter; nobody has timed them yet.
"""

from puffer_jax.kernels.tpu.lstm import INTERPRETED as INTERPRETED
from puffer_jax.kernels.tpu.lstm import LOOPS as LOOPS
from puffer_jax.kernels.tpu.lstm import takes as takes
