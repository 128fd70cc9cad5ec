"""The trainer."""

from puffer_jax.ppo.training import make_train as make_train
from puffer_jax.run.trainer import NonFiniteError as NonFiniteError
from puffer_jax.run.trainer import PuffeRL as PuffeRL
