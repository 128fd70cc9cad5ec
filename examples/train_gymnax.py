"""A JAX-native environment: rollout and update are one compiled program.

python examples/train_gymnax.py --env Breakout-MinAtar
"""

from dataclasses import dataclass

import gymnax
import tyro
from flax import nnx

import puffer_jax


@dataclass(frozen=True)
class Args:
    env: str = "CartPole-v1"
    recurrent: bool = False
    num_envs: int = 64
    steps: int = 500_000
    learning_rate: float = 1e-3
    seed: int = 0


def main(args: Args):
    env = puffer_jax.as_jax_env(gymnax.make(args.env))  # or your own reset(key), step(key, ...)
    policy = puffer_jax.Default(env, rngs=nnx.Rngs(args.seed))
    if args.recurrent:
        policy = puffer_jax.LSTMWrapper(env, policy, rngs=nnx.Rngs(args.seed))
    config = puffer_jax.PuffeRLConfig.recommended(
        env=args.env,
        seed=args.seed,
        num_envs=args.num_envs,
        total_timesteps=args.steps,
        learning_rate=args.learning_rate,
        data_dir="runs",
    )
    logger = puffer_jax.JSONLLogger(f"runs/{args.env}_seed{args.seed}/log.jsonl")
    trainer = puffer_jax.PuffeRL(config, env, policy, logger)
    logs = trainer.run()  # Ctrl-C saves, and trainer.restore() goes on bit for bit
    for name in ("agent_steps", "SPS", "environment/episode_return"):
        print(f"{name}: {logs.get(name, float('nan')):.1f}")
    print(f"curve: puffer-jax plot {trainer.run_folder} --out curve.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
