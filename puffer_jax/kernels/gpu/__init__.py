"""Kernels for NVIDIA's GPUs: Pallas, compiled by Triton.

They are compiled for an H100 and checked in Pallas's interpreter; nobody has timed them yet. Every
function takes `interpret=True`, with which it runs anywhere, slowly: for tests.
"""

from puffer_jax.kernels.gpu.lstm import INTERPRETED as INTERPRETED
from puffer_jax.kernels.gpu.lstm import LOOPS as LOOPS
from puffer_jax.kernels.gpu.lstm import takes as takes
