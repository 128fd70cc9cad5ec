"""Policies in Ray's RLlib: they act in its env runners, and learn by PPO in JAX.

    config = puffer_jax.rllib.configure(PPOConfig().environment("CartPole-v1"), policy)
    algorithm = config.build_algo()
    algorithm.train()
    policy = algorithm.get_module().policy

Importing this needs RLlib: `pip install 'puffer_jax[rllib]'`. `puffer_jax/export/README.md` says
what is RLlib's and what is ours.
"""

from puffer_jax.base.packages import require

require("ray.rllib", "puffer_jax.rllib", "'puffer_jax[rllib]'")

from puffer_jax.rllib.configuration import configure as configure  # noqa: E402
from puffer_jax.rllib.configuration import env_to_module as env_to_module  # noqa: E402
from puffer_jax.rllib.learner import PPOLearner as PPOLearner  # noqa: E402
from puffer_jax.rllib.module import PolicyModule as PolicyModule  # noqa: E402
from puffer_jax.rllib.module import spec as spec  # noqa: E402
