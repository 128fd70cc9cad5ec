"""Final returns of five seeds on six tasks, with one recipe: `python examples/learning.py`.

JAX-native tasks train all their seeds in one program. Writes learning.png.
"""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import gymnasium
import gymnax
import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from flax import nnx

import puffer_jax

RECIPE = {
    "num_envs": 32,
    "minibatch_size": 512,
    "update_epochs": 4,
    "optimizer": "adam",
    "learning_rate": 5e-3,
    "adam_beta1": 0.9,
    "adam_eps": 1e-5,
    "max_grad_norm": 0.5,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "ent_coef": 0.005,
}
PENDULUM = {"reward_scale": 0.01, "gamma": 0.95, "learning_rate": 2e-3, "ent_coef": 0.0}
# name -> (environment, recurrent, steps, what differs from the recipe)
TASKS = {
    "CartPole-v1, gymnasium": ("gymnasium:CartPole-v1", False, 150_000, {"reward_scale": 0.05}),
    "CartPole-v1, gymnax": ("CartPole-v1", False, 150_000, {"reward_scale": 0.05}),
    "Acrobot-v1, gymnax": ("Acrobot-v1", False, 300_000, {"reward_scale": 0.05}),
    "Pendulum-v1, gymnax": ("Pendulum-v1", False, 800_000, PENDULUM),
    "Breakout-MinAtar, gymnax": ("Breakout-MinAtar", False, 1_000_000, {"learning_rate": 2e-3}),
    "memory, LSTM": ("puffer:memory", True, 150_000, {}),
    "memory, no LSTM": ("puffer:memory", False, 150_000, {}),
}


@dataclass(frozen=True)
class Args:
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: int = 5
    scale: float = 1.0
    """Of the numbers of steps."""
    out: Path = Path("learning.png")


def make_policy(env, recurrent, rngs):
    policy = puffer_jax.Default(env, rngs=rngs)
    return puffer_jax.LSTMWrapper(env, policy, rngs=rngs) if recurrent else policy


def on_the_host(name, recurrent, config, seeds):
    curves = []
    for seed in range(seeds):
        envs = gymnasium.make_vec(name, config["num_envs"], "sync")
        run = config | {"seed": seed, "num_envs": None}
        run = puffer_jax.PuffeRLConfig.recommended(**run)
        trainer = puffer_jax.PuffeRL(run, envs, make_policy(envs, recurrent, nnx.Rngs(seed)))
        curve = []
        while not trainer.done:
            returns = trainer.evaluate()["episode_return"]
            trainer.stats.clear()
            curve.append(np.mean(returns) if returns else np.nan)
            trainer.train()
        envs.close()
        curves.append(curve)
    length = min(map(len, curves))
    return np.array([curve[:length] for curve in curves])


def compiled(env, recurrent, config, seeds):
    config = puffer_jax.PuffeRLConfig.recommended(**config)
    train = puffer_jax.make_train(config, env, lambda rngs: make_policy(env, recurrent, rngs))
    keys = jax.random.split(jax.random.key(0), seeds)
    return np.asarray(jax.jit(jax.vmap(train))(keys)[1]["episode_return"])


def main(args: Args):
    shape = -(-len(args.tasks) // 4), min(4, len(args.tasks))
    figure, axes = plt.subplots(*shape, squeeze=False, layout="constrained")
    figure.set_size_inches(3.5 * shape[1], 3 * shape[0])
    print(
        "| task | steps | final return, mean of the last 10% | lowest seed | seconds, all seeds |"
    )
    print("|---|---|---|---|---|")
    for axis, name in zip(axes.flat, args.tasks, strict=False):
        env, recurrent, steps, changes = TASKS[name]
        config = RECIPE | changes | {"total_timesteps": int(steps * args.scale)}
        start = perf_counter()
        family, _, id = env.rpartition(":")
        if family == "gymnasium":
            curves = on_the_host(id, recurrent, config, args.seeds)
        elif family == "puffer":
            curves = compiled(puffer_jax.environments.make(id), recurrent, config, args.seeds)
        else:
            curves = compiled(puffer_jax.as_jax_env(gymnax.make(id)), recurrent, config, args.seeds)
        seconds = perf_counter() - start
        last = np.nanmean(curves[:, -max(1, curves.shape[1] // 10) :], axis=1)
        text = f"{last.mean():.1f} ± {last.std():.1f} | {last.min():.1f} | {seconds:.0f}"
        print(f"| {name} | {config['total_timesteps']:,} | {text} |", flush=True)
        x = np.linspace(0, config["total_timesteps"], curves.shape[1])
        for curve in curves:  # in some epochs no episode ends
            ended = np.isfinite(curve)
            axis.plot(x[ended], curve[ended], color="tab:blue", alpha=0.4, linewidth=1)
        axis.set(title=name, xlabel="steps", ylabel="episode return")
    [axis.set_axis_off() for axis in axes.flat[len(args.tasks) :]]
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
