"""The trainer's configuration."""

from puffer_jax.ppo.config import PuffeRLConfig as PuffeRLConfig
from puffer_jax.ppo.presets import read_ini as read_ini
from puffer_jax.ppo.sizes import Sizes as Sizes
