"""PPO on a gymnasium vector environment: `python examples/ppo.py --recurrent --steps 100000`."""

from dataclasses import dataclass

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import puffer_jax


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"
    recurrent: bool = False
    steps: int = 300_000
    num_envs: int = 32
    horizon: int = 64
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 3e-3
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    ent_coef: float = 0.005
    reward_scale: float = 0.05
    seed: int = 0


def train(config: Config, report=lambda step, value: print(f"step {step:7d}  return {value:5.1f}")):
    kwargs = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    env = gymnasium.make_vec(config.env, config.num_envs, "sync", vector_kwargs=kwargs)
    policy = puffer_jax.Default(env, rngs=nnx.Rngs(config.seed))
    if config.recurrent:
        policy = puffer_jax.LSTMWrapper(env, policy, rngs=nnx.Rngs(config.seed))
    graphdef, params = puffer_jax.split(policy)
    updates = config.steps // (config.num_envs * config.horizon)
    minibatches = config.epochs * config.minibatches
    schedule = optax.linear_schedule(config.learning_rate, 0, updates * minibatches)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(schedule, eps=1e-5))

    @jax.jit
    def act(params, obs, state, done, key):
        policy = puffer_jax.merge(graphdef, params)
        state = puffer_jax.reset_where(done, state)  # whatever the core: any axes behind the batch
        logits, values, state = (*policy.forward_eval(obs, state), state)[:3]  # Default: None
        action, logprob, _ = puffer_jax.sample_logits(logits, key=key)
        return action, logprob, values[:, 0], state

    def loss_fn(params, batch):
        policy, obs = puffer_jax.merge(graphdef, params), batch["obs"]  # (batch, time, *obs)
        if config.recurrent:
            logits, values, _ = policy.forward(obs, batch["state"], batch["done"])
        else:
            logits, values = policy.forward(obs.reshape(-1, *obs.shape[2:]))
        values = values.reshape(batch["value"].shape)
        _, logprob, entropy = puffer_jax.sample_logits(logits, action=batch["action"])
        ratio = jnp.exp(logprob.reshape(values.shape) - batch["logprob"])
        clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
        adv = jax.nn.standardize(batch["advantage"], axis=None)
        value_loss = jnp.square(values - batch["advantage"] - batch["value"]).mean()
        policy_loss = -jnp.minimum(adv * ratio, adv * clipped).mean()
        return policy_loss + 0.25 * value_loss - config.ent_coef * entropy.mean()

    @jax.jit
    def update(params, opt_state, batch, last_value, last_done, key):
        value = jnp.concatenate([batch["value"], last_value[:, None]], 1)
        alive = 1.0 - jnp.concatenate([batch["done"][:, 1:], last_done[:, None]], 1)
        delta = batch["reward"] + config.gamma * alive * value[:, 1:] - value[:, :-1]

        def backward(adv, x):
            adv = x[0] + config.gamma * config.gae_lambda * x[1] * adv
            return adv, adv

        _, adv = jax.lax.scan(backward, 0 * last_value, (delta.T, alive.T), reverse=True)
        batch = batch | {"advantage": adv.T}

        def step(carry, rows):
            grads = jax.grad(loss_fn)(carry[0], jax.tree.map(lambda x: x[rows], batch))
            change, opt_state = optimizer.update(grads, carry[1])
            return (optax.apply_updates(carry[0], change), opt_state), None

        # minibatches of whole environments, shuffled anew each epoch
        rows = jnp.argsort(jax.random.uniform(key, (config.epochs, config.num_envs)))
        return jax.lax.scan(step, (params, opt_state), rows.reshape(minibatches, -1))[0]

    state = policy.initial_state(config.num_envs) if config.recurrent else None
    obs, done = env.reset(seed=config.seed)[0], np.zeros(config.num_envs, bool)
    key, opt_state = jax.random.key(config.seed), optimizer.init(params)
    curve, returns, running = [], [0.0], np.zeros(config.num_envs)
    for i in range(1, updates + 1):
        key, update_key, *keys = jax.random.split(key, config.horizon + 2)
        first_state, rows = state, []
        for step_key in keys:
            action, logprob, value, state = act(params, obs, state, done, step_key)
            row = {"obs": obs, "done": done, "action": action, "logprob": logprob, "value": value}
            obs, reward, terminated, truncated, info = env.step(puffer_jax.playable(action, env))
            done, running = terminated | truncated, running + reward
            returns, running = (returns + running[done].tolist())[-100:], running * ~done
            reward = config.reward_scale * reward
            if truncated.any():  # cut short, not ended: what would have come is worth its value
                final = np.stack([o if d else s for o, d, s in zip(info["final_obs"], done, obs)])
                value = act(params, final, state, np.zeros_like(done), step_key)[2]
                reward += config.gamma * truncated * np.asarray(value)
            rows.append(row | {"reward": reward.astype(np.float32)})
        batch = jax.tree.map(lambda *x: np.stack(x, 1), *rows) | {"state": first_state}
        last_value = act(params, obs, state, done, update_key)[2]
        params, opt_state = update(params, opt_state, batch, last_value, done, update_key)
        curve.append((i * config.num_envs * config.horizon, float(np.mean(returns))))
        report(*curve[-1])
    return puffer_jax.merge(graphdef, params), curve


if __name__ == "__main__":
    puffer_jax.save_weights(train(tyro.cli(Config))[0], "runs/ppo.safetensors")
