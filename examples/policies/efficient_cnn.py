"""A small CNN that finds the size of its flat layer itself, for images (height, width, channels).

`jax.eval_shape` traces the convolutions without computing anything, so window sizes, strides and
resolutions can be changed without any arithmetic by hand.

python examples/policies/efficient_cnn.py
"""

import math
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
    """Images (batch, H, W, C), uint8 -> logits (batch, n) and values (batch, 1)."""

    is_continuous = False

    def __init__(self, env, cnn_width=16, hidden_size=128, *, rngs, param_dtype=jnp.float32):
        shape = env.single_observation_space.shape
        options = {"rngs": rngs, "param_dtype": param_dtype, "kernel_init": zeros}

        def conv(inputs, outputs, window, stride):
            # padding=1 pads all four sides as torch does; "SAME" with a stride would not.
            layer = nnx.Conv(inputs, outputs, (window, window), stride, padding=1, **options)
            return layer_init(layer, rngs=rngs)

        def linear(inputs, outputs, std):
            return layer_init(nnx.Linear(inputs, outputs, **options), std, rngs=rngs)

        self.hidden_size = hidden_size
        self.param_dtype = param_dtype
        self.convolutions = nnx.Sequential(
            conv(shape[-1], cnn_width, 5, 3),
            jax.nn.relu,
            conv(cnn_width, 2 * cnn_width, 3, 2),
            jax.nn.relu,
            flatten_channels_first,
        )
        image = jax.ShapeDtypeStruct((1, *shape), param_dtype)
        flat_size = jax.eval_shape(lambda x: self.convolutions(x), image).shape[1]
        self.project = linear(flat_size, hidden_size, math.sqrt(2))
        self.actor = linear(hidden_size, int(env.single_action_space.n), 0.01)
        self.critic = linear(hidden_size, 1, 1.0)

    def encode_observations(self, observations, state=None):
        """Hidden vectors (batch, hidden_size)."""
        images = observations.astype(self.param_dtype) / 255
        return jax.nn.relu(self.project(self.convolutions(images)))

    def decode_actions(self, hidden):
        """Logits and values."""
        return self.actor(hidden), self.critic(hidden)


def image_env(*shape):
    return SimpleNamespace(
        single_observation_space=Box(0, 255, shape, "uint8"), single_action_space=Discrete(2)
    )


def main():
    for shape in ((21, 21, 1), (15, 11, 1)):
        policy = Policy(image_env(*shape), rngs=nnx.Rngs(0))
        print(f"images {shape} need a flat layer of {policy.project.in_features}")
    rng = np.random.default_rng(0)
    best = rng.integers(0, 2, 128)
    observations = rng.integers(0, 200, (128, 15, 11, 1), np.uint8)
    observations[best == 0, :7] += 50
    observations[best == 1, 7:] += 50
    toy.describe(policy, observations)
    print("the best action says which half of the image is brighter, so chance is 0.50")
    return toy.learn(policy, observations, best, steps=80)[1]


if __name__ == "__main__":
    main()
