"""A recurrent policy: your own encoder and heads, and puffer_jax.LSTMWrapper between them.

The wrapper calls `encode_observations`, one LSTM step, `decode_actions`. `forward` takes whole
segments (batch, time, ...) for training, `forward_eval` one step for acting; both return the
state, which the caller carries.

python examples/policies/recurrent.py
"""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx
from gymnasium.spaces import Box, Discrete

import puffer_jax


class Policy(nnx.Module):
    """Observations (batch, features) -> logits (batch, n) and values (batch, 1); no time axis."""

    is_continuous = False

    def __init__(self, env, hidden_size=32, *, rngs, param_dtype=jnp.float32):
        features = env.single_observation_space.shape[0]
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.hidden_size = hidden_size
        # No layer_init: LSTMWrapper initialises what it wraps, as PufferLib's does.
        self.encoder = nnx.Linear(features, hidden_size, **options)
        self.actor = nnx.Linear(hidden_size, int(env.single_action_space.n), **options)
        self.critic = nnx.Linear(hidden_size, 1, **options)

    def encode_observations(self, observations, state=None):
        """What enters the LSTM, (batch, hidden_size)."""
        return jnp.tanh(self.encoder(observations))

    def decode_actions(self, hidden):
        """Logits and values from the LSTM's output (batch, hidden_size)."""
        return self.actor(hidden), self.critic(hidden)


def recurrent(env, hidden_size=32, *, rngs, param_dtype=jnp.float32):
    options = {"rngs": rngs, "param_dtype": param_dtype}
    policy = Policy(env, hidden_size, **options)
    return puffer_jax.LSTMWrapper(env, policy, hidden_size, hidden_size, **options)


ENV = SimpleNamespace(single_observation_space=Box(-1, 1, (3,)), single_action_space=Discrete(3))


def main():
    policy = recurrent(ENV, rngs=nnx.Rngs(0))
    # One of three cues is seen in the first step only, and asked for in all of five.
    cue = np.random.default_rng(0).integers(0, 3, 128)
    observations = np.zeros((128, 5, 3), np.float32)
    observations[:, 0] = np.eye(3)[cue]

    def segments(policy, x):
        return policy(x)[:2]

    toy.describe(policy, observations, segments)
    print("the best action is what was shown in the first of five steps, so chance is 0.33")
    best = np.repeat(cue, 5)
    policy, greedy = toy.learn(policy, observations, best, steps=120, forward=segments)

    state = policy.initial_state(4)
    print(f"acting, step by step: cues {cue[:4]}")
    for t in range(5):
        logits, _, state = policy.forward_eval(observations[:4, t], state)
        action, _, _ = puffer_jax.sample_logits(logits, deterministic=True)
        print(f"  step {t}: actions {action}")
    return greedy


if __name__ == "__main__":
    main()
