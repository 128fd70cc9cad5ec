"""The basic policy: two layers, an actor and a critic. Start here.

python examples/policies/basic.py
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx
from gymnasium.spaces import Box, Discrete

from puffer_jax import layer_init


class Policy(nnx.Module):
    """Observations (batch, *shape) -> logits (batch, n) and values (batch, 1)."""

    is_continuous = False

    def __init__(self, env, hidden_size=64, *, rngs, param_dtype=jnp.float32):
        features = math.prod(env.single_observation_space.shape)
        actions = int(env.single_action_space.n)

        def linear(inputs, outputs, std):
            layer = nnx.Linear(inputs, outputs, rngs=rngs, param_dtype=param_dtype)
            return layer_init(layer, std, rngs=rngs)

        self.hidden_size = hidden_size
        # Attributes carry the names of the torch twin, so its weights load with no further code:
        # `encoder` here and a torch nn.Sequential there both have encoder.0 and encoder.2.
        self.encoder = nnx.Sequential(
            linear(features, hidden_size, math.sqrt(2)),
            jax.nn.relu,
            linear(hidden_size, hidden_size, math.sqrt(2)),
            jax.nn.relu,
        )
        self.actor = linear(
            hidden_size, actions, 0.01
        )  # small: all actions equally likely at first
        self.critic = linear(hidden_size, 1, 1.0)

    def encode_observations(self, observations, state=None):
        """Hidden vectors (batch, hidden_size)."""
        return self.encoder(observations.reshape(observations.shape[0], -1))

    def decode_actions(self, hidden):
        """Logits and values."""
        return self.actor(hidden), self.critic(hidden)


ENV = SimpleNamespace(single_observation_space=Box(-5, 5, (2, 3)), single_action_space=Discrete(3))


def main():
    policy = Policy(ENV, rngs=nnx.Rngs(0))
    observations = np.random.default_rng(0).standard_normal((512, 2, 3), np.float32)
    toy.describe(policy, observations)
    print("the best action is the largest of three numbers, so chance is 0.33")
    return toy.learn(policy, observations, best=observations[:, 0].argmax(-1))[1]


if __name__ == "__main__":
    main()
