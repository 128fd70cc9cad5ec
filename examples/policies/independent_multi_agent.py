"""Many agents, each with a network of its own, evaluated at once.

The agents' parameters are stacked, `jax.vmap` runs every network on every row, and a gather by
agent id picks each row's own result, so the batch keeps its order. (PufferLib's guide loops over
the agents and concatenates what they return. Its rows come out grouped by agent, which is a bug:
the caller reads them environment by environment.)

Which agent a row belongs to is part of its observation (the last columns, one-hot), so rows can
be shuffled into minibatches; it travels to the heads beside the hidden vector.

python examples/policies/independent_multi_agent.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import toy
from flax import nnx
from shared_multi_agent import AGENTS, ENV, batch
from shared_multi_agent import Policy as Agent

import puffer_jax


class Policy(nnx.Module):
    """Rows (batch, features), in any order -> logits (batch, n) and values (batch, 1)."""

    is_continuous = False

    def __init__(self, env, width=32, agents=AGENTS, *, rngs, param_dtype=jnp.float32):
        self.hidden_size = width + agents
        # The torch twin is a ModuleList, so its checkpoints load; parameters are stacked when used.
        self.agents = nnx.List(
            [Agent(env, width, rngs=rngs, param_dtype=param_dtype) for _ in range(agents)]
        )

    def _each(self, method, rows, agent):
        """What `method` of each row's own agent gives for that row."""
        graphdefs, params = zip(*map(puffer_jax.split, self.agents), strict=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

        def run(params):
            return method(puffer_jax.merge(graphdefs[0], params), rows)

        own = agent.argmax(1), jnp.arange(rows.shape[0])
        return jax.tree.map(lambda by_agent: by_agent[own], jax.vmap(run)(stacked))

    def encode_observations(self, observations, state=None):
        """Hidden vectors (batch, width), and beside them who the agent is, one-hot."""
        agent = observations[:, -len(self.agents) :]
        hidden = self._each(Agent.encode_observations, observations, agent)
        return jnp.concatenate([hidden, agent], axis=1)

    def decode_actions(self, hidden):
        """Logits and values."""
        agents = len(self.agents)
        return self._each(Agent.decode_actions, hidden[:, :-agents], hidden[:, -agents:])


def main():
    policy = Policy(ENV, rngs=nnx.Rngs(0))
    observations, best = batch(environments=100)
    toy.describe(policy, observations)
    act = jax.jit(lambda x: toy.forward(policy, x)[0])
    order = np.random.default_rng(1).permutation(len(observations))
    same = np.allclose(act(observations[order]), act(observations)[order], atol=1e-6)
    print(f"shuffled rows give the same logits, shuffled: {same}")
    print("the best action depends on the position and on who the agent is; chance is 0.50")
    return toy.learn(policy, observations, best, learning_rate=1e-2)[1]


if __name__ == "__main__":
    main()
