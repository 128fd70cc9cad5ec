"""Recurrent cores: the memory between a policy's encoder and its heads.

A new core is a file in this folder and a line in `CORES`.
"""

from puffer_jax.nn.cores.core import Core as Core
from puffer_jax.nn.cores.core import KnownCore as KnownCore
from puffer_jax.nn.cores.core import State as State
from puffer_jax.nn.cores.gru import GRU
from puffer_jax.nn.cores.lstm import LSTM
from puffer_jax.nn.cores.mingru import MinGRU

CORES: dict[str, type[KnownCore]] = {core.name: core for core in (LSTM, GRU, MinGRU)}
