"""A policy of ours in RLlib's PPO, learned in JAX: `python examples/train_rllib.py`.

RLlib steps the environments, ours acts in its env runners and learns in its algorithm. Then the
trained policy, from its file, acts in an env runner by itself.
"""

from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import ray
import tyro
from flax import nnx
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

import puffer_jax
import puffer_jax.rllib


@dataclass(frozen=True)
class Args:
    env: str = "CartPole-v1"
    recurrent: bool = False
    goal: float = 450.0
    steps: int = 200_000
    runners: int = 0
    """Processes that step environments; 0: this one."""
    num_envs: int = 8
    """In each of them."""
    batch: int = 1024
    hidden_size: int = 64
    learning_rate: float = 2.5e-3
    episodes: int = 20
    seed: int = 0
    address: str = "local"
    """Of a Ray cluster; "auto": the one that runs on this machine."""
    model: Path = Path("runs/rllib.safetensors")


def config_of(args: Args) -> PPOConfig:
    """All that is RLlib's."""
    return (
        PPOConfig()
        .environment(args.env)
        .env_runners(num_env_runners=args.runners, num_envs_per_env_runner=args.num_envs)
        .training(
            lr=args.learning_rate,
            gamma=0.99,
            lambda_=0.95,
            clip_param=0.2,
            vf_clip_param=10.0,
            vf_loss_coeff=0.5,
            entropy_coeff=0.01,
            grad_clip=0.5,
            train_batch_size_per_learner=args.batch,
            minibatch_size=args.batch // 4,
            num_epochs=4,
        )
        .debugging(seed=args.seed, log_level="ERROR")
    )


def train(args: Args) -> None:
    env = gymnasium.make(args.env)
    rngs = nnx.Rngs(args.seed)
    policy = puffer_jax.Default(env, args.hidden_size, rngs=rngs)
    if args.recurrent:
        sizes = args.hidden_size, args.hidden_size
        policy = puffer_jax.LSTMWrapper(env, policy, *sizes, rngs=rngs)
    algorithm = puffer_jax.rllib.configure(config_of(args), policy).build_algo()
    steps, mean, said = 0, -np.inf, 0
    while steps < args.steps and not mean >= args.goal:
        found = algorithm.train()["env_runners"]
        steps = int(found["num_env_steps_sampled_lifetime"])
        mean = found.get("episode_return_mean", -np.inf)
        if steps >= said:
            print(f"step {steps:7d}  return {mean:6.1f}", flush=True)
            said = steps + 10_000
    print(f"after {steps} steps: return {mean:.1f}")
    args.model.parent.mkdir(parents=True, exist_ok=True)
    puffer_jax.save_weights(algorithm.get_module().policy, args.model)
    algorithm.stop()


def evaluate(args: Args) -> float:
    """The mean return of the most likely actions, from the file, in one of RLlib's env runners."""
    config = config_of(args).env_runners(num_env_runners=0)
    runner = SingleAgentEnvRunner(
        config=puffer_jax.rllib.configure(config, args.model), worker_index=0
    )
    episodes = runner.sample(num_episodes=args.episodes, explore=False)
    runner.stop()
    return float(np.mean([episode.get_return() for episode in episodes]))


def main(args: Args) -> None:
    if not ray.is_initialized():
        ray.init(args.address, log_to_driver=False, logging_level="ERROR")
    train(args)
    print(f"most likely actions, {args.episodes} episodes: return {evaluate(args):.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
