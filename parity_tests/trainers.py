"""Our trainer beside the reference's on CartPole: do they learn alike, and how fast?

python parity_tests/trainers.py [--seeds 5] [--steps 150000] [--speed-only]
"""

import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

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
from trainer import CONFIG, Reference, original_advantage, patched, torch_advantage

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
    speed_only: bool = False


def make_env(buf=None, seed=None):
    env = gymnasium.wrappers.TransformReward(gymnasium.make("CartPole-v1"), lambda r: 0.05 * r)
    env = gymnasium.wrappers.RecordEpisodeStatistics(env)
    return pufferlib.emulation.GymnasiumPufferEnv(env, buf=buf, seed=seed)


def make_vecenv(count):
    return pufferlib.vector.make(make_env, backend=pufferlib.vector.Serial, num_envs=count)


def config_of(envs, steps, seed):
    sizes = {"batch_size": envs * 64, "minibatch_size": envs * 16, "total_timesteps": steps}
    return CONFIG | RECIPE | sizes | {"seed": seed, "data_dir": tempfile.gettempdir()}


def theirs(envs, recurrent, steps, seed):
    torch.manual_seed(seed)
    vecenv = make_vecenv(envs)
    env = vecenv.driver_env
    policy = pufferlib.models.Default(env)
    if recurrent:
        policy = pufferlib.models.LSTMWrapper(env, policy)
    reference = Reference(policy, None, "float32", vecenv=vecenv, **config_of(envs, steps, seed))
    return reference.trainer, reference.running


def ours(envs, recurrent, steps, seed, native=False):
    space = puffer_jax.environments.make("cartpole") if native else make_vecenv(envs)
    env = space if native else space.driver_env
    policy = puffer_jax.Default(env, rngs=nnx.Rngs(seed))
    if recurrent:
        policy = puffer_jax.LSTMWrapper(env, policy, rngs=nnx.Rngs(seed))
    config = config_of(envs, steps, seed) | {"num_envs": envs}
    if native:
        config["reward_scale"] = 0.05
    config["checkpoint_interval"] = 10**9
    return puffer_jax.PuffeRL(config, space, policy)


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


def speed(trainer, epochs, fused=False):
    """Steps per second of each epoch after the first two of all."""
    rates, warm = [], max(0, 2 - trainer.epoch)
    for epoch in range(epochs + warm):
        before, start = trainer.global_step, time.perf_counter()
        if fused:
            trainer._fused_epoch(trainer._source)
        else:
            trainer.evaluate()
            trainer.train()
        if epoch >= warm:
            rates.append((trainer.global_step - before) / (time.perf_counter() - start))
    return rates


def learn(args):
    print(f"CartPole-v1, {args.steps:,} steps, mean episode length in the last tenth of them")
    results = {"PufferLib": [], "puffer_jax": []}
    for seed in range(args.seeds):
        trainer, running = theirs(32, False, args.steps, seed)
        with running():
            results["PufferLib"].append(lengths(trainer, args.steps))
        results["puffer_jax"].append(lengths(ours(32, False, args.steps, seed), args.steps))
    for name, values in results.items():
        print(f"  {name:10s} {np.round(values, 1).tolist()}  mean {np.mean(values):.1f}")
    test = mannwhitneyu(*results.values())
    print(f"  Mann-Whitney U = {test.statistic:.1f}, p = {test.pvalue:.2f}")


def race(advantage):
    print("\nsteps per second, median of epochs, interleaved; CartPole, 64 steps, 16 minibatches")
    print("| envs | policy | PufferLib | ours, same vecenv | ratio | ours, compiled | ratio |")
    print("|---|---|---|---|---|---|---|")
    for envs in (64, 1024):
        for recurrent in (False, True):
            torch_trainer, running = theirs(envs, recurrent, 10**9, 0)
            host = ours(envs, recurrent, 10**9, 0)
            native = ours(envs, recurrent, 10**9, 0, native=True)
            rates = {"torch": [], "host": [], "native": []}
            epochs = 5 if envs == 64 else 1
            for _ in range(3):
                with running(), patched(compute_puff_advantage=torch_advantage(advantage)):
                    rates["torch"] += speed(torch_trainer, epochs)
                rates["host"] += speed(host, epochs)
                rates["native"] += speed(native, epochs, fused=True)
            a, b, c = (np.median(rates[name]) for name in ("torch", "host", "native"))
            name = "LSTM" if recurrent else "Default"
            print(
                f"| {envs} | {name} | {a:,.0f} | {b:,.0f} | {b / a:.2f} | {c:,.0f} | {c / a:.1f} |",
                flush=True,
            )


def main(args: Args):
    warnings.simplefilter("ignore")
    if not args.speed_only:
        learn(args)
    with tempfile.TemporaryDirectory() as folder:
        race(original_advantage(Path(folder)))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
