"""Self-attention over a set of entities, some of which may be absent.

python examples/policies/attention.py
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx
from gymnasium.spaces import Box, Discrete

from puffer_jax import layer_init


def attend(query, key, value, mask, **_):
    """Attention in the precision of its inputs; Flax's default computes in float32 at most."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class Policy(nnx.Module):
    """Entities (batch, entities, features) -> logits (batch, n) and values (batch, 1).

    The first feature of an entity says whether it is there (1) or padding (0). Entity 0 is the
    agent itself and always there, so that no softmax is ever over nothing.
    """

    is_continuous = False

    def __init__(self, env, hidden_size=32, heads=4, *, rngs, param_dtype=jnp.float32):
        features = env.single_observation_space.shape[-1]
        options = {"rngs": rngs, "param_dtype": param_dtype}

        def linear(inputs, outputs, std):
            return layer_init(nnx.Linear(inputs, outputs, **options), std, rngs=rngs)

        self.hidden_size = hidden_size
        self.embed = linear(features, hidden_size, 2**0.5)
        # Torch packs query, key and value into one in_proj; the weight exchange splits it.
        self.attention = nnx.MultiHeadAttention(
            heads, hidden_size, decode=False, attention_fn=attend, **options
        )
        self.actor = linear(hidden_size, int(env.single_action_space.n), 0.01)
        self.critic = linear(hidden_size, 1, 1.0)

    def encode_observations(self, observations, state=None):
        """What entity 0 has gathered from all that are there, (batch, hidden_size)."""
        there = (jnp.asarray(observations)[..., 0] > 0).at[:, 0].set(True)
        tokens = jax.nn.relu(self.embed(observations))
        # Only entity 0 asks. Let all of them ask, and such layers can be stacked.
        query, mask = tokens[:, :1], there[:, None, None, :]
        return (query + self.attention(query, tokens, tokens, mask=mask))[:, 0]

    def decode_actions(self, hidden):
        """Logits and values."""
        return self.actor(hidden), self.critic(hidden)


ENV = SimpleNamespace(single_observation_space=Box(-1, 1, (6, 5)), single_action_space=Discrete(3))


def entities(rng, batch):
    """Observations, and the colour of the one marked entity: (there, marked, one-hot of 3)."""
    marked = np.eye(6)[rng.integers(1, 6, batch)]
    there = np.maximum(marked, rng.random((batch, 6)) < 0.5)
    colour = rng.integers(0, 3, (batch, 6))
    features = np.dstack([there, marked, np.eye(3)[colour]])
    return features.astype(np.float32), colour[marked == 1]


def main():
    policy = Policy(ENV, rngs=nnx.Rngs(0))
    observations, best = entities(np.random.default_rng(0), 256)
    toy.describe(policy, observations)
    act = jax.jit(lambda x: toy.forward(policy, x)[0])
    changed = observations.copy()
    changed[:, 1:, 1:] += 5 * (observations[:, 1:, :1] == 0)
    print(f"absent entities do not matter: {np.allclose(act(changed), act(observations))}")
    print("the best action is the colour of the marked entity, so chance is 0.33")
    return toy.learn(policy, observations, best)[1]


if __name__ == "__main__":
    main()
