"""Continuous actions: a Normal with a learned log-std, or with `squash` a TanhNormal in (-1, 1).

python examples/policies/continuous.py
"""

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx
from gymnasium.spaces import Box

from puffer_jax import Normal, TanhNormal, layer_init


class Policy(nnx.Module):
    """Observations (batch, features) -> Normal or TanhNormal (batch, k), values (batch, 1)."""

    is_continuous = True

    def __init__(self, env, hidden_size=64, squash=False, *, rngs, param_dtype=jnp.float32):
        (features,) = env.single_observation_space.shape
        (actions,) = env.single_action_space.shape

        def linear(inputs, outputs, std):
            layer = nnx.Linear(inputs, outputs, rngs=rngs, param_dtype=param_dtype)
            return layer_init(layer, std, rngs=rngs)

        self.hidden_size = hidden_size
        self.squash = squash
        # Learned, but the same for every observation; exp(0) = 1 explores at first.
        self.log_std = nnx.Param(jnp.zeros((1, actions), param_dtype))
        self.encoder = linear(features, hidden_size, math.sqrt(2))
        self.mean = linear(hidden_size, actions, 0.01)
        self.critic = linear(hidden_size, 1, 1.0)

    def encode_observations(self, observations, state=None):
        """Hidden vectors (batch, hidden_size)."""
        return jnp.tanh(self.encoder(observations))

    def decode_actions(self, hidden):
        """The distribution of actions, and values."""
        mean = self.mean(hidden)
        std = jnp.broadcast_to(jnp.exp(self.log_std[...]), mean.shape)
        # Squashing a sample of a Normal with a bare tanh, while keeping the Normal's log-prob,
        # scores an action the density no longer belongs to: tanh stretches and shrinks it.
        return (TanhNormal if self.squash else Normal)(mean, std), self.critic(hidden)


ENV = SimpleNamespace(
    single_observation_space=Box(-1, 1, (3,)), single_action_space=Box(-1, 1, (2,))
)


def integrals(loc=0.3, scale=0.8):
    """Total probability over (-1, 1): of the TanhNormal, and as a bare tanh would score it."""
    middles = (jnp.arange(4000, dtype=jnp.float32) + 0.5) / 2000 - 1
    right = TanhNormal(loc, scale).log_prob(middles)
    bare = Normal(loc, scale).log_prob(jnp.arctanh(middles))
    return [float(jnp.exp(x).sum() / 2000) for x in (right, bare)]


def main():
    observations = np.random.default_rng(0).uniform(-1, 1, (256, 3)).astype(np.float32)
    toy.describe(Policy(ENV, rngs=nnx.Rngs(0)), observations)
    found = []
    for squash in (False, True):
        policy = Policy(ENV, squash=squash, rngs=nnx.Rngs(0))
        print(f"squash={squash}; the reward is minus the squared distance from the best action")
        best = 0.8 * observations[:, :2]
        policy, greedy = toy.learn(policy, observations, best, learning_rate=1e-2)
        print(f"std 1.00 -> {np.exp(policy.log_std[...]).mean():.2f}")
        found.append(greedy)
    right, bare = integrals()
    print(f"total probability: TanhNormal {right:.3f}, tanh of a Normal's sample {bare:.3f}")
    return found


if __name__ == "__main__":
    main()
