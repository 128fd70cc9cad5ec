"""An image and a vector in one Dict observation, each with its own encoder.

PufferLib packs a Dict into one flat row of bytes (emulation). `nativize_tensor` takes it apart
again, inside `jax.jit`; a plain dict of arrays needs nothing.

python examples/policies/multi_input.py
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx
from gymnasium.spaces import Box, Dict, Discrete
from jax.nn.initializers import zeros

from puffer_jax import layer_init, nativize_dtype, nativize_tensor
from puffer_jax.nativize import emulated_dtypes
from puffer_jax.nn.images import flatten_channels_first


class Policy(nnx.Module):
    """{"image": (batch, H, W, C), "vector": (batch, k)}, or its bytes -> logits and values."""

    is_continuous = False

    def __init__(self, env, hidden_size=64, *, rngs, param_dtype=jnp.float32):
        emulated = getattr(env, "emulated", {}).get("emulated_observation_dtype")
        self.emulated_dtype = np.dtype(emulated or emulated_dtypes(env.single_observation_space)[1])
        height, width, channels = self.emulated_dtype["image"].shape
        # layer_init draws the weights, so Flax need not.
        options = {"rngs": rngs, "param_dtype": param_dtype, "kernel_init": zeros}

        def linear(inputs, outputs, std=2**0.5):
            return layer_init(nnx.Linear(inputs, outputs, **options), std, rngs=rngs)

        self.hidden_size = hidden_size
        self.param_dtype = param_dtype
        self.conv = layer_init(nnx.Conv(channels, 8, (3, 3), 2, padding=1, **options), rngs=rngs)
        self.image = linear(8 * -(-height // 2) * -(-width // 2), hidden_size)
        self.vector = linear(*self.emulated_dtype["vector"].shape, hidden_size)
        self.joint = linear(2 * hidden_size, hidden_size)
        self.actor = linear(hidden_size, int(env.single_action_space.n), 0.01)
        self.critic = linear(hidden_size, 1, 1.0)

    def encode_observations(self, observations, state=None):
        """Hidden vectors (batch, hidden_size)."""
        if not isinstance(observations, dict):
            emulated = {
                "observation_dtype": observations.dtype,
                "emulated_observation_dtype": self.emulated_dtype,
            }
            observations = nativize_tensor(observations, nativize_dtype(emulated))
        image = jnp.asarray(observations["image"], self.param_dtype) / 255
        image = flatten_channels_first(jax.nn.relu(self.conv(image)))
        vector = jnp.asarray(observations["vector"], self.param_dtype)
        parts = [jax.nn.relu(self.image(image)), jax.nn.relu(self.vector(vector))]
        return jax.nn.relu(self.joint(jnp.concatenate(parts, axis=1)))

    def decode_actions(self, hidden):
        """Logits and values."""
        return self.actor(hidden), self.critic(hidden)


SPACE = Dict(image=Box(0, 255, (9, 7, 3), "uint8"), vector=Box(-1, 1, (5,)))
ENV = SimpleNamespace(single_observation_space=SPACE, single_action_space=Discrete(4))


def main():
    policy = Policy(ENV, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    rows = np.zeros(256, emulated_dtypes(SPACE)[1])  # as an emulated environment fills them
    bright, positive = rng.random((2, 256)) < 0.5
    rows["image"] = rng.integers(0, 100, (256, 9, 7, 3)) + 100 * bright[:, None, None, None]
    rows["vector"] = rng.random((256, 5)) * np.where(positive, 1, -1)[:, None]
    packed = rows.view(np.uint8).reshape(256, -1)
    toy.describe(policy, packed)
    act = jax.jit(lambda x: toy.forward(policy, x)[0])
    same = (act(packed) == act({name: rows[name] for name in rows.dtype.names})).all()
    print(f"{packed.shape[1]} bytes a row; the same logits from bytes and from a dict: {same}")
    print("the best action needs the image and the vector: chance is 0.25, one of them gives 0.50")
    return toy.learn(policy, packed, best=2 * bright + positive, steps=150)[1]


if __name__ == "__main__":
    main()
