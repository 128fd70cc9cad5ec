"""Vecenvs as Stable-Baselines3 takes them; this needs the extra `sb3`."""

from puffer_jax.vector.sb3 import VecEnv as VecEnv
