"""A policy in the shape that CleanRL's loops expect of an agent."""

from puffer_jax.policies.cleanrl import Policy as Policy
from puffer_jax.policies.cleanrl import RecurrentPolicy as RecurrentPolicy
