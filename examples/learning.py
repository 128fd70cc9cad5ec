"""What `puffer-jax train --env X` learns, with no other flag: `python examples/learning.py`.

Trains every task with several seeds, prints a table of final returns and writes learning.png.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
import tyro

# name as in `puffer-jax train --env` -> (steps, the return to reach)
TASKS = {
    "CartPole-v1": (100_000, 475),
    "gymnax:CartPole-v1": (100_000, 475),
    "Acrobot-v1": (300_000, -90),
    "Pendulum-v1": (300_000, -200),
    "LunarLander-v3": (1_000_000, 200),
    "BipedalWalker-v3": (2_000_000, 200),
    "Hopper-v5": (1_000_000, 2_000),
    "HalfCheetah-v5": (1_000_000, 2_000),
    "MiniGrid-DoorKey-5x5-v0": (200_000, 0.9),
    "gymnax:Catch-bsuite": (100_000, 0.9),
    "gymnax:Breakout-MinAtar": (5_000_000, 20),
    "gymnax:Asterix-MinAtar": (5_000_000, 10),
    "memory": (150_000, 2.5),
}


@dataclass(frozen=True)
class Args:
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: int = 5
    scale: float = 1.0
    """Of the numbers of steps."""
    out: Path = Path("learning.png")


def curve(env, steps, seed, folder):
    """Steps and mean returns of the epochs in which an episode ended."""
    flags = ["--train.total-timesteps", str(steps), "--train.seed", str(seed)]
    flags += ["--train.data-dir", folder, "--name", env.replace("/", "-").replace(":", "-")]
    command = [sys.executable, "-m", "puffer_jax", "train", "--env", env, *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (log,) = Path(folder).glob(f"*_seed{seed}/log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    key = "environment/episode_return"
    return np.array([(line["agent_steps"], line[key]) for line in lines if key in line])


def main(args: Args):
    shape = -(-len(args.tasks) // 4), min(4, len(args.tasks))
    figure, axes = plt.subplots(*shape, squeeze=False, layout="constrained")
    figure.set_size_inches(3.5 * shape[1], 3 * shape[0])
    print("| task | steps | final return (last 10%) | lowest seed | goal | seconds a seed |")
    print("|---|---|---|---|---|---|")
    for axis, env in zip(axes.flat, args.tasks, strict=False):
        steps, goal = TASKS[env]
        steps, start = int(steps * args.scale), perf_counter()
        last = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                x, y = curve(env, steps, seed, folder).T
            last.append(y[x >= 0.9 * x[-1]].mean())
            axis.plot(x, y, color="tab:blue", alpha=0.4, linewidth=1)
        seconds = (perf_counter() - start) / args.seeds
        text = f"{np.mean(last):.1f} ± {np.std(last):.1f} | {min(last):.1f}"
        print(f"| {env} | {steps:,} | {text} | {goal:,} | {seconds:.0f} |", flush=True)
        axis.axhline(goal, color="tab:orange", linewidth=1, linestyle="--")
        axis.set(title=env, xlabel="steps", ylabel="episode return")
    [axis.set_axis_off() for axis in axes.flat[len(args.tasks) :]]
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
