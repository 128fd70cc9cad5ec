"""Many agents, one network: the batch is environments times agents.

Vector environments hand out one row per agent, the agents of an environment next to each other:
row = environment * agents + agent. A policy that treats rows alike therefore serves any number of
agents. To let it tell them apart, add each agent's number to its observation, one-hot.

python examples/policies/shared_multi_agent.py
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx
from gymnasium.spaces import Box, Discrete

from puffer_jax import layer_init, sample_logits


class Policy(nnx.Module):
    """Rows (environments * agents, features) -> logits (rows, n) and values (rows, 1)."""

    is_continuous = False

    def __init__(self, env, hidden_size=64, *, rngs, param_dtype=jnp.float32):
        (features,) = env.single_observation_space.shape

        def linear(inputs, outputs, std):
            layer = nnx.Linear(inputs, outputs, rngs=rngs, param_dtype=param_dtype)
            return layer_init(layer, std, rngs=rngs)

        self.hidden_size = hidden_size
        self.encoder = linear(features, hidden_size, math.sqrt(2))
        self.actor = linear(hidden_size, int(env.single_action_space.n), 0.01)
        self.critic = linear(hidden_size, 1, 1.0)

    def encode_observations(self, observations, state=None):
        """Hidden vectors (rows, hidden_size)."""
        return jax.nn.relu(self.encoder(observations))

    def decode_actions(self, hidden):
        """Logits and values."""
        return self.actor(hidden), self.critic(hidden)


AGENTS = 3
ENV = SimpleNamespace(
    single_observation_space=Box(-2, 2, (2 + AGENTS,)), single_action_space=Discrete(2)
)


def batch(environments):
    """Observations (environments * agents, features), a position and who it is; best actions."""
    positions = np.random.default_rng(0).standard_normal((environments, AGENTS, 2), np.float32)
    who = np.broadcast_to(np.eye(AGENTS, dtype=np.float32), (environments, AGENTS, AGENTS))
    # By the sign of the position; agent 1 is to do the opposite of the others.
    best = (positions[..., 0] > 0) ^ (np.arange(AGENTS) == 1)
    return np.dstack([positions, who]).reshape(environments * AGENTS, -1), best.reshape(-1)


def main():
    policy = Policy(ENV, rngs=nnx.Rngs(0))
    observations, best = batch(environments=100)
    print(f"100 environments of {AGENTS} agents are {len(observations)} rows")
    toy.describe(policy, observations)
    print("the best action depends on the position and on who the agent is; chance is 0.50")
    policy, greedy = toy.learn(policy, observations, best, learning_rate=1e-2)
    logits, _ = toy.forward(policy, observations[: 4 * AGENTS])
    action, _, _ = sample_logits(logits, deterministic=True)
    print(f"actions of the first 4 environments:\n{action.reshape(4, AGENTS)}")
    return greedy


if __name__ == "__main__":
    main()
