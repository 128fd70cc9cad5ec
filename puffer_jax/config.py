"""The trainer's configuration."""

from puffer_jax.ppo.config import PuffeRLConfig as PuffeRLConfig
from puffer_jax.ppo.config import Sizes as Sizes
from puffer_jax.ppo.config import read_ini as read_ini
