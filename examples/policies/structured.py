"""A nested observation (Dict of Tuples) taken apart and encoded leaf by leaf.

Emulation packs it into one row of bytes. `nativize_dtype` says where each leaf lies, and
`nativize_tensor` reads them: a Dict keeps its keys, a Tuple has fields f0, f1, ...
(`unflatten_observations(rows, space)` gives real tuples, outside a policy or in it.)

python examples/policies/structured.py
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx, traverse_util
from gymnasium.spaces import Box, Dict, Discrete, Tuple

from puffer_jax import layer_init, nativize_dtype, nativize_tensor, unflatten_observations
from puffer_jax.nativize import emulated_dtypes


class Policy(nnx.Module):
    """Bytes (batch, width) of the space below -> logits (batch, n) and values (batch, 1)."""

    is_continuous = False

    def __init__(self, env, hidden_size=64, *, rngs, param_dtype=jnp.float32):
        # What a policy keeps has to be hashable: NumPy's dtypes are, dicts and spaces are not.
        self.emulated = tuple((name, np.dtype(dtype)) for name, dtype in env.emulated.items())
        options = {"rngs": rngs, "param_dtype": param_dtype}

        def linear(inputs, outputs, std=2**0.5):
            return layer_init(nnx.Linear(inputs, outputs, **options), std, rngs=rngs)

        self.hidden_size = hidden_size
        self.param_dtype = param_dtype
        self.kind = nnx.Embed(4, 8, **options)
        self.unit = linear(8 + 2, 16)
        self.board = linear(4 * 4, 16)
        self.joint = linear(16 + 16, hidden_size)
        self.actor = linear(hidden_size, int(env.single_action_space.n), 0.01)
        self.critic = linear(hidden_size, 1, 1.0)

    def encode_observations(self, observations, state=None):
        """Hidden vectors (batch, hidden_size)."""
        leaves = nativize_tensor(observations, nativize_dtype(dict(self.emulated)))
        kind, position = leaves["unit"]["f0"][:, 0], leaves["unit"]["f1"]
        board = leaves["board"].astype(self.param_dtype).reshape(-1, 16) / 255
        unit = [self.kind(kind), position.astype(self.param_dtype)]
        unit = jax.nn.relu(self.unit(jnp.concatenate(unit, axis=1)))
        parts = [unit, jax.nn.relu(self.board(board))]
        return jax.nn.relu(self.joint(jnp.concatenate(parts, axis=1)))

    def decode_actions(self, hidden):
        """Logits and values."""
        return self.actor(hidden), self.critic(hidden)


SPACE = Dict(board=Box(0, 255, (4, 4), "uint8"), unit=Tuple((Discrete(4), Box(-1, 1, (2,)))))
ROW, EMULATED = emulated_dtypes(SPACE)
ENV = SimpleNamespace(  # what PufferLib's emulation of an environment with this space has
    single_observation_space=Box(0, 255, (EMULATED.itemsize,), "uint8"),
    single_action_space=Discrete(4),
    emulated={"observation_dtype": ROW, "emulated_observation_dtype": EMULATED},
)


def main():
    policy = Policy(ENV, rngs=nnx.Rngs(0))
    SPACE.seed(0)
    rows = np.zeros(256, EMULATED)
    for row in rows:
        sample = SPACE.sample()
        row["board"], row["unit"] = sample["board"], sample["unit"]
    packed = rows.view(np.uint8).reshape(256, -1)
    toy.describe(policy, packed)
    leaves = traverse_util.flatten_dict(nativize_dtype(ENV.emulated), sep=".")
    for name, (dtype, shape, offset, size) in leaves.items():
        print(f"  bytes {offset:2} to {offset + size - 1:2} are {name}, {dtype.__name__} {shape}")

    kind, position = unflatten_observations(packed, SPACE)["unit"]
    best = jnp.where(position[:, 0] > 0, kind, 3 - kind)
    print("the best action follows from two leaves, the unit's kind and position; chance is 0.25")
    return toy.learn(policy, packed, best, steps=300)[1]


if __name__ == "__main__":
    main()
