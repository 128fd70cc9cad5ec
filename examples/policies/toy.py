"""What the examples share: describe a policy, and train it on a task of one step.

A policy that cannot learn the best action for each row of a fixed batch cannot learn a game.
For a loop with real environments see examples/ppo.py.
"""

import jax
import jax.numpy as jnp
import optax

import puffer_jax


def forward(policy, observations):
    return policy.decode_actions(policy.encode_observations(observations))


def describe(policy, observations, forward=forward):
    """Print size and shapes, and the parameters as torch names and lays them out."""
    logits, values = jax.eval_shape(lambda x: forward(policy, x), observations)
    outputs = vars(logits) if isinstance(logits, puffer_jax.Normal) else {"logits": logits}
    shapes = [f"{name} {y.shape}" for name, y in (outputs | {"values": values}).items()]
    tensors = puffer_jax.state_dict(policy)
    size = sum(x.size for x in jax.tree.leaves(puffer_jax.split(policy)[1]))
    print(f"{type(policy).__name__}: {size:,} parameters; {', '.join(shapes)}")
    for name, tensor in tensors.items():
        print(f"  {name:30} {tensor.shape}")


def learn(policy, observations, best, *, steps=200, learning_rate=3e-3, forward=forward):
    """Train an actor-critic on one batch, whose best actions are `best`, one per row.

    The reward is 1 for the best action, or minus the squared distance from it if continuous.
    Returns the trained policy and the mean reward of its greedy actions.
    """
    graphdef, params = puffer_jax.split(policy)
    optimizer = optax.adam(learning_rate)

    def reward(action):
        if policy.is_continuous:
            return -((action - best) ** 2).sum(-1)
        return (action == best).astype(jnp.float32)

    def loss(params, key):
        logits, values = forward(puffer_jax.merge(graphdef, params), observations)
        action, logprob, entropy = puffer_jax.sample_logits(logits, key=key)
        rewards = reward(action)
        error = rewards - values.reshape(-1)
        advantage = jax.lax.stop_gradient(error)
        return jnp.mean(error**2 / 2 - advantage * logprob - 0.01 * entropy), rewards.mean()

    def step(carry, key):
        params, opt_state = carry
        grads, mean_reward = jax.grad(loss, has_aux=True)(params, key)
        change, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, change), opt_state), mean_reward

    @jax.jit
    def train(params, key):
        start = params, optimizer.init(params)
        (params, _), rewards = jax.lax.scan(step, start, jax.random.split(key, steps))
        logits, _ = forward(puffer_jax.merge(graphdef, params), observations)
        action, _, _ = puffer_jax.sample_logits(logits, deterministic=True)
        return params, rewards[0], rewards[-1], reward(action).mean()

    params, first, last, greedy = train(params, jax.random.key(0))
    print(f"mean reward {first:.2f} -> {last:.2f}, greedy {greedy:.2f}")
    return puffer_jax.merge(graphdef, params), float(greedy)
