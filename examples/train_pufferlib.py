"""A PufferLib user changes one import: their vecenv and config, our trainer, their checkpoint.

python examples/train_pufferlib.py
"""

from dataclasses import dataclass

import gymnasium
import pufferlib.emulation
import pufferlib.models
import pufferlib.vector
import torch
import tyro
from flax import nnx

import puffer_jax
from puffer_jax import PuffeRL


@dataclass(frozen=True)
class Args:
    num_envs: int = 32
    steps: int = 100_000


def make_env(buf=None, seed=None):
    env = gymnasium.wrappers.TransformReward(gymnasium.make("CartPole-v1"), lambda r: 0.05 * r)
    return pufferlib.emulation.GymnasiumPufferEnv(env, buf=buf, seed=seed)


def main(args: Args):
    vecenv = pufferlib.vector.make(
        make_env, backend=pufferlib.vector.Serial, num_envs=args.num_envs
    )
    config = {  # PufferLib's args["train"], its quirks and all
        "seed": 0,
        "device": "cpu",
        "total_timesteps": args.steps,
        "bptt_horizon": 64,
        "batch_size": "auto",
        "minibatch_size": args.num_envs * 16,
        "update_epochs": 4,
        "optimizer": "adam",
        "learning_rate": 5e-3,
        "adam_beta1": 0.9,
        "adam_eps": 1e-5,
        "max_grad_norm": 0.5,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "data_dir": "runs",
    }
    policy = puffer_jax.Default(vecenv.driver_env, rngs=nnx.Rngs(0))
    trainer = PuffeRL(config, vecenv, policy)
    while trainer.global_step < config["total_timesteps"]:
        trainer.evaluate()
        logs = trainer.train()
        if logs and "environment/episode_length" in logs:
            length = logs["environment/episode_length"]
            print(f"step {trainer.global_step:7d}  length {length:6.1f}  {logs['SPS']:.0f}/s")
    path = trainer.close()

    theirs = pufferlib.models.Default(vecenv.driver_env)
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    print(f"{path} loads into pufferlib.models.Default")


if __name__ == "__main__":
    main(tyro.cli(Args))
