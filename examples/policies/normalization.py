"""Observations normalised by their running mean and variance, which are saved with the weights.

The statistics are leaves like any weight, but no gradient reaches them (weight decay would: mask
them). `update` adds a batch by Chan's parallel formula (1979), exact however the data is cut.

python examples/policies/normalization.py
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx
from gymnasium.spaces import Box, Discrete

from puffer_jax import layer_init, merge, split


class Normalizer(nnx.Module):
    """(x - mean) / std, clipped to +-10; before the first update only clipped."""

    def __init__(self, features, *, param_dtype):
        self.mean = nnx.Param(jnp.zeros(features, param_dtype))
        self.var = nnx.Param(jnp.ones(features, param_dtype))
        self.count = nnx.Param(jnp.zeros(1, param_dtype))

    def __call__(self, x):
        """(batch, features) -> (batch, features)."""
        mean, var = jax.lax.stop_gradient((self.mean[...], self.var[...]))
        return jnp.clip((x - mean) / jnp.sqrt(var + 1e-8), -10, 10)


def update(params, observations):
    """A policy's parameters, with the rows of `observations` counted into its statistics."""
    old = params["normalizer"]
    x = observations.astype(old["mean"].dtype)
    count = old["count"] + len(x)
    share = len(x) / count
    delta = x.mean(0) - old["mean"]
    # In sums of squares M2 = count * var: M2 = M2_old + M2_new + delta^2 * n_old * n_new / count.
    var = old["var"] * (1 - share) + x.var(0) * share + delta**2 * share * (1 - share)
    mean = old["mean"] + delta * share
    return params | {"normalizer": {"mean": mean, "var": var, "count": count}}


class Policy(nnx.Module):
    """Observations (batch, features) of any scale -> logits (batch, n) and values (batch, 1)."""

    is_continuous = False

    def __init__(self, env, hidden_size=64, *, rngs, param_dtype=jnp.float32):
        (features,), actions = env.single_observation_space.shape, int(env.single_action_space.n)
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.hidden_size = hidden_size
        self.normalizer = Normalizer(features, param_dtype=param_dtype)
        self.encoder = layer_init(nnx.Linear(features, hidden_size, **options), rngs=rngs)
        self.actor = layer_init(nnx.Linear(hidden_size, actions, **options), 0.01, rngs=rngs)
        self.critic = layer_init(nnx.Linear(hidden_size, 1, **options), 1.0, rngs=rngs)

    def encode_observations(self, observations, state=None):
        """Hidden vectors (batch, hidden_size)."""
        return jnp.tanh(self.encoder(self.normalizer(observations)))

    def decode_actions(self, hidden):
        """Logits and values."""
        return self.actor(hidden), self.critic(hidden)


ENV = SimpleNamespace(single_observation_space=Box(-9, 999, (2,)), single_action_space=Discrete(2))


def main():
    policy = Policy(ENV, rngs=nnx.Rngs(0))
    normal = np.random.default_rng(0).standard_normal((256, 2), np.float32)
    observations = np.float32([500, 0]) + normal * np.float32([50, 0.01])
    toy.describe(policy, observations)
    graphdef, params = split(policy)
    for rollout in np.split(observations, 4):
        params = jax.jit(update)(params, rollout)
    for name in ("count", "mean", "var"):
        print(f"after four rollouts, {name}: {params['normalizer'][name]}")
    print("features of mean 500 and 0, std 50 and 0.01 decide; first raw, then normalised:")
    toy.learn(policy, observations, best=normal.sum(1) > 0)
    return toy.learn(merge(graphdef, params), observations, best=normal.sum(1) > 0)[1]


if __name__ == "__main__":
    main()
