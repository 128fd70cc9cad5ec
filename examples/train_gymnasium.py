"""PuffeRL on a gymnasium vector environment: `python examples/train_gymnasium.py --recurrent`."""

from dataclasses import dataclass

import gymnasium
import numpy as np
import tyro
from flax import nnx

import puffer_jax


@dataclass(frozen=True)
class Args:
    env: str = "CartPole-v1"
    recurrent: bool = False
    num_envs: int = 32
    steps: int = 100_000
    seed: int = 0


def main(args: Args):
    # Any autoreset_mode will do: NEXT_STEP, gymnasium's default, SAME_STEP or DISABLED.
    envs = gymnasium.make_vec(args.env, args.num_envs, "sync")
    policy = puffer_jax.Default(envs, rngs=nnx.Rngs(args.seed))
    if args.recurrent:
        policy = puffer_jax.LSTMWrapper(envs, policy, rngs=nnx.Rngs(args.seed))
    config = puffer_jax.PuffeRLConfig.recommended(
        env=args.env,
        seed=args.seed,
        total_timesteps=args.steps,
        data_dir="runs",
    )
    trainer = puffer_jax.PuffeRL(config, envs, policy)
    returns = []
    while not trainer.done:  # or, with a dashboard and Ctrl-C handled: trainer.run()
        returns = (returns + trainer.evaluate()["episode_return"])[-100:]
        logs = trainer.train()
        if logs:
            steps, mean = trainer.global_step, np.mean(returns)
            print(f"step {steps:7d}  return {mean:6.1f}  {logs['SPS']:.0f}/s")
    print("model:", trainer.close())


if __name__ == "__main__":
    main(tyro.cli(Args))
