"""Residual blocks with LayerNorm: a deep MLP that still trains.

python examples/policies/residual.py
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


class Block(nnx.Module):
    """x + f(x), with f a LayerNorm and two layers; widths stay the same."""

    def __init__(self, width, *, rngs, param_dtype):
        options = {"rngs": rngs, "param_dtype": param_dtype}
        # Torch's epsilon; and the slow variance, since the fast one (E[x^2] - E[x]^2) cancels.
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, **options)
        self.inner = layer_init(nnx.Linear(width, width, **options), rngs=rngs)
        # Small, so that a fresh stack of blocks is close to the identity, however deep.
        self.outer = layer_init(nnx.Linear(width, width, **options), 0.1, rngs=rngs)

    def __call__(self, x):
        """(batch, width) -> (batch, width)."""
        return x + self.outer(jax.nn.relu(self.inner(self.norm(x))))


class Policy(nnx.Module):
    """Observations (batch, features) -> logits (batch, n) and values (batch, 1)."""

    is_continuous = False

    def __init__(self, env, hidden_size=64, depth=3, *, rngs, param_dtype=jnp.float32):
        (features,) = env.single_observation_space.shape
        options = {"rngs": rngs, "param_dtype": param_dtype}

        def linear(inputs, outputs, std):
            return layer_init(nnx.Linear(inputs, outputs, **options), std, rngs=rngs)

        self.hidden_size = hidden_size
        self.stem = linear(features, hidden_size, math.sqrt(2))
        self.blocks = nnx.Sequential(*[Block(hidden_size, **options) for _ in range(depth)])
        self.actor = linear(hidden_size, int(env.single_action_space.n), 0.01)
        self.critic = linear(hidden_size, 1, 1.0)

    def encode_observations(self, observations, state=None):
        """Hidden vectors (batch, hidden_size)."""
        return self.blocks(self.stem(observations))

    def decode_actions(self, hidden):
        """Logits and values."""
        return self.actor(hidden), self.critic(hidden)


ENV = SimpleNamespace(single_observation_space=Box(-1, 1, (4,)), single_action_space=Discrete(2))


def main():
    policy = Policy(ENV, rngs=nnx.Rngs(0))
    observations = np.random.default_rng(0).uniform(-1, 1, (256, 4)).astype(np.float32)
    toy.describe(policy, observations)
    print("the best action is the parity of three signs, so chance is 0.50")
    return toy.learn(policy, observations, best=(observations[:, :3] > 0).sum(1) % 2, steps=300)[1]


if __name__ == "__main__":
    main()
