"""Our trainer beside the reference's on CartPole: do they learn alike?

python parity_tests/trainers.py [--seeds 5] [--steps 100000]

For their speed, see `puffer-jax bench --rows trainer-*`.
"""

import os
import sys
import tempfile
import warnings
from dataclasses import dataclass

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gymnasium
import numpy as np
import pufferlib.emulation
import pufferlib.models
import pufferlib.vector
import torch
import tyro
from flax import nnx
from scipy.stats import mannwhitneyu
from support.trainer import CONFIG, Reference

import puffer_jax

RECIPE = {
    "learning_rate": 5e-3,
    "adam_beta1": 0.9,
    "adam_eps": 1e-5,
    "max_grad_norm": 0.5,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "update_epochs": 4,
    "bptt_horizon": 64,
}


@dataclass(frozen=True)
class Args:
    seeds: int = 5
    steps: int = 100_000


def make_env(buf=None, seed=None):
    env = gymnasium.wrappers.TransformReward(gymnasium.make("CartPole-v1"), lambda r: 0.05 * r)
    env = gymnasium.wrappers.RecordEpisodeStatistics(env)
    return pufferlib.emulation.GymnasiumPufferEnv(env, buf=buf, seed=seed)


def make_vecenv(count):
    return pufferlib.vector.make(make_env, backend=pufferlib.vector.Serial, num_envs=count)


def config_of(envs, steps, seed):
    sizes = {"batch_size": envs * 64, "minibatch_size": envs * 16, "total_timesteps": steps}
    return CONFIG | RECIPE | sizes | {"seed": seed, "data_dir": tempfile.gettempdir()}


def theirs(envs, steps, seed):
    torch.manual_seed(seed)
    vecenv = make_vecenv(envs)
    env = vecenv.driver_env
    policy = pufferlib.models.Default(env)
    reference = Reference(policy, None, "float32", vecenv=vecenv, **config_of(envs, steps, seed))
    return reference.trainer, reference.running


def ours(envs, steps, seed):
    vecenv = make_vecenv(envs)
    env = vecenv.driver_env
    policy = puffer_jax.Default(env, rngs=nnx.Rngs(seed))
    config = config_of(envs, steps, seed) | {"checkpoint_interval": 10**9}
    return puffer_jax.PuffeRL(config, vecenv, policy)


def lengths(trainer, goal):
    """Mean episode length in the last tenth of the steps."""
    seen = []
    while trainer.global_step < goal:
        trainer.stats.clear()
        stats = trainer.evaluate()
        key = "episode/l" if "episode/l" in stats else "episode_length"
        found = [float(np.mean(x)) for x in stats.get(key, [])]
        if trainer.global_step > 0.9 * goal:
            seen += found
        trainer.train()
    return float(np.mean(seen))


def learn(args):
    print(f"CartPole-v1, {args.steps:,} steps, mean episode length in the last tenth of them")
    results = {"PufferLib": [], "puffer_jax": []}
    for seed in range(args.seeds):
        trainer, running = theirs(32, args.steps, seed)
        with running():
            results["PufferLib"].append(lengths(trainer, args.steps))
        results["puffer_jax"].append(lengths(ours(32, args.steps, seed), args.steps))
    for name, values in results.items():
        print(f"  {name:10s} {np.round(values, 1).tolist()}  mean {np.mean(values):.1f}")
    test = mannwhitneyu(*results.values())
    print(f"  Mann-Whitney U = {test.statistic:.1f}, p = {test.pvalue:.2f}")


def main(args: Args):
    warnings.simplefilter("ignore")
    learn(args)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
