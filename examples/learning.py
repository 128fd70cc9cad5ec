"""What `puffer-jax train --env X` learns: a table of final returns, and learning.png."""

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, run
from textwrap import fill
from time import perf_counter
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter

# what follows `puffer-jax train --env`: a name, perhaps flags -> (steps, the return to reach)
TASKS = {
    **dict.fromkeys(("CartPole-v1", "gymnax:CartPole-v1"), (100_000, 475)),
    "Acrobot-v1": (300_000, -90),
    "Pendulum-v1": (300_000, -200),
    "LunarLander-v3": (1_000_000, 200),
    "BipedalWalker-v3": (2_000_000, 200),
    **dict.fromkeys(("Hopper-v5", "HalfCheetah-v5"), (1_000_000, 2_000)),
    "MiniGrid-DoorKey-5x5-v0": (200_000, 0.9),
    "flappy_bird_gymnasium:FlappyBird-v0": (300_000, 10),
    "gymnax:Catch-bsuite": (100_000, 0.9),
    "gymnax:Breakout-MinAtar": (5_000_000, 20),
    "gymnax:Asterix-MinAtar": (5_000_000, 10),
    "brax:ant": (5_000_000, 2_000),
    "craftax:Craftax-Classic-Symbolic-v1": (5_000_000, 8),
    "memory": (150_000, 2.5),
    "memory --policy.core mingru --policy.num-layers 3": (150_000, 2.5),
}
for name in ("CartPole-v1", "gymnax:Breakout-MinAtar"):  # PufferLib 4's core beside the LSTM
    TASKS |= {f"{name} {core}": TASKS[name] for core in ("--rnn", "--policy.core mingru")}


@dataclass(frozen=True)
class Args:
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: int = 5
    scale: float = 1.0
    """Of the numbers of steps."""
    jobs: int = 1
    """Trainings at once, each on its share of the cores."""
    runs: Path | None = None
    """Where the runs are kept; those that are there already are not made again."""
    out: Path = Path("learning.png")


class Curve(NamedTuple):
    steps: np.ndarray
    returns: np.ndarray  # the means of the epochs in which an episode ended
    seconds: float


def train(task: str, steps: int, seed: int, runs: Path, cores: list[int]) -> Curve:
    name = task.replace("/", "-").replace(":", "-").replace(" --", "-").replace(" ", "-")
    folder, timed = runs / f"{name}_seed{seed}", runs / f"{name}_seed{seed}.seconds"
    if not timed.exists():
        words = f"-m puffer_jax train --env {task} --name {name} --train.seed {seed}".split()
        words += ["--train.total-timesteps", str(steps), "--train.data-dir", str(runs)]
        share = lambda: os.sched_setaffinity(0, cores)  # noqa: E731
        start = perf_counter()
        run([sys.executable, *words], check=True, stdout=DEVNULL, preexec_fn=share)
        timed.write_text(str(perf_counter() - start))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    key = "environment/episode_return"
    x, y = np.array([(line["agent_steps"], line[key]) for line in lines if key in line]).T
    return Curve(x, y, float(timed.read_text()))


def train_all(args: Args, runs: Path) -> dict[str, list[Curve]]:
    """The curves of each task; the first seed of all, then the second, ..."""
    cores = sorted(os.sched_getaffinity(0))
    free = [cores[i :: args.jobs] or cores for i in range(args.jobs)]

    def one(env: str, seed: int) -> Curve:
        share = free.pop()
        try:
            return train(env, int(TASKS[env][0] * args.scale), seed, runs, share)
        finally:
            free.append(share)

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [(env, pool.submit(one, env, i)) for i in range(args.seeds) for env in args.tasks]
    return {env: [job.result() for name, job in jobs if name == env] for env in args.tasks}


def main(args: Args):
    with tempfile.TemporaryDirectory() as folder:
        curves = train_all(args, args.runs or Path(folder))
    shape = -(-len(args.tasks) // 4), min(4, len(args.tasks))
    figure, axes = plt.subplots(*shape, squeeze=False, layout="constrained")
    figure.set_size_inches(3.5 * shape[1], 3 * shape[0])
    print("| task | steps | final return (last 10%) | lowest seed | goal | seconds a seed |")
    print("|---|---|---|---|---|---|")
    for axis, (env, seeds) in zip(axes.flat, curves.items(), strict=False):
        steps, goal = TASKS[env]
        last = [curve.returns[curve.steps >= 0.9 * curve.steps[-1]].mean() for curve in seeds]
        seconds = [curve.seconds for curve in seeds]
        text = f"{np.mean(last):,.4g} ± {np.std(last):,.2g} | {min(last):,.4g}"
        print(f"| {env} | {steps * args.scale:,.0f} | {text} | {goal:,} | {np.mean(seconds):.0f} |")
        for curve in seeds:
            axis.plot(curve.steps, curve.returns, color="tab:blue", alpha=0.4, linewidth=1)
        axis.axhline(goal, color="tab:orange", linewidth=1, linestyle="--")
        axis.set(xlabel="steps", ylabel="episode return")
        axis.set_title(fill(env, 32), fontsize="medium")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    [axis.set_axis_off() for axis in axes.flat[len(args.tasks) :]]
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
