"""A CNN for stacks of frames (channels, height, width): the network of Mnih et al. 2015.

python examples/policies/cnn.py
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx
from gymnasium.spaces import Box, Discrete
from jax.nn.initializers import zeros

from puffer_jax import layer_init
from puffer_jax.nn.images import flatten_channels_first


class Policy(nnx.Module):
    """Images (batch, C, H, W), uint8 -> logits (batch, n) and values (batch, 1)."""

    is_continuous = False

    def __init__(self, env, hidden_size=512, *, rngs, param_dtype=jnp.float32):
        channels, height, width = env.single_observation_space.shape
        # layer_init draws the weights, so Flax need not: building is twice as fast.
        options = {"rngs": rngs, "param_dtype": param_dtype, "kernel_init": zeros}

        def conv(inputs, outputs, window, stride):
            size = (window, window)
            layer = nnx.Conv(inputs, outputs, size, stride, padding="VALID", **options)
            return layer_init(layer, rngs=rngs)

        def linear(inputs, outputs, std):
            return layer_init(nnx.Linear(inputs, outputs, **options), std, rngs=rngs)

        for window, stride in ((8, 4), (4, 2), (3, 1)):
            height, width = (height - window) // stride + 1, (width - window) // stride + 1
        self.hidden_size = hidden_size
        self.param_dtype = param_dtype
        self.network = nnx.Sequential(
            conv(channels, 32, 8, 4),
            jax.nn.relu,
            conv(32, 64, 4, 2),
            jax.nn.relu,
            conv(64, 64, 3, 1),
            jax.nn.relu,
            # JAX's images are channels-last. Flattened that way they would meet the rows of a
            # torch Linear in the wrong order.
            flatten_channels_first,
            linear(64 * height * width, hidden_size, 2**0.5),
            jax.nn.relu,
        )
        self.actor = linear(hidden_size, int(env.single_action_space.n), 0.01)
        self.critic = linear(hidden_size, 1, 1.0)

    def encode_observations(self, observations, state=None):
        """Hidden vectors (batch, hidden_size)."""
        images = observations.astype(self.param_dtype) / 255
        return self.network(images.transpose(0, 2, 3, 1))

    def decode_actions(self, hidden):
        """Logits and values."""
        return self.actor(hidden), self.critic(hidden)


ENV = SimpleNamespace(
    single_observation_space=Box(0, 255, (4, 36, 44), "uint8"), single_action_space=Discrete(4)
)


def main():
    policy = Policy(ENV, hidden_size=128, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    best = rng.integers(0, 4, 32)
    observations = rng.integers(0, 100, (32, 4, 36, 44), np.uint8)
    observations[np.arange(32), best] += 100
    toy.describe(policy, observations)
    print("the best action is the index of the brighter frame, so chance is 0.25")
    return toy.learn(policy, observations, best, steps=60, learning_rate=1e-3)[1]


if __name__ == "__main__":
    main()
