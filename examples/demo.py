"""Train LSTMWrapper(Default) on CartPole, take it to PufferLib, and show that nothing changed.

python examples/demo.py
"""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import gymnasium
import jax
import matplotlib.pyplot as plt
import numpy as np
import ppo
import torch
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import puffer_jax
from puffer_jax.parity import compare, reference_policy


@dataclass(frozen=True)
class Demo:
    """What to train and where to put the results."""

    steps: int = 130_000
    seed: int = 0
    episodes: int = 100
    folder: Path = Path("demo")


def train(args: Demo):
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("compiling", total=args.steps)

        def report(step, mean_return):
            text = f"step {step:,}  mean return {mean_return:.0f}"
            progress.update(task, completed=step, description=text)

        return ppo.train(ppo.Config(recurrent=True, steps=args.steps, seed=args.seed), report)


def draw(curve, path):
    steps, returns = zip(*curve, strict=True)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(steps, returns)
    axes.axhline(475, color="gray", linestyle=":", label="solved: 475")
    axes.set(xlabel="environment steps", ylabel="mean return of 100 episodes")
    axes.set_title("LSTMWrapper(Default) on CartPole-v1")
    axes.legend()
    figure.savefig(path, dpi=150)


def play(act, state, episodes, seed):
    """Returns of the first greedy episode of each environment; act(obs, state) -> action, state."""
    kwargs = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    envs = gymnasium.make_vec("CartPole-v1", episodes, "sync", vector_kwargs=kwargs)
    obs, _ = envs.reset(seed=seed)
    returns, alive = np.zeros(episodes), np.ones(episodes, bool)
    while alive.any():
        action, state = act(obs, state)
        obs, reward, terminated, truncated, _ = envs.step(np.asarray(action))
        returns += reward * alive
        alive &= ~(terminated | truncated)
    envs.close()
    return returns


def main(args: Demo):
    start = perf_counter()
    policy, curve = train(args)
    print(f"trained for {perf_counter() - start:.0f} s")
    args.folder.mkdir(parents=True, exist_ok=True)
    draw(curve, args.folder / "learning_curve.png")
    for suffix in ("pt", "safetensors", "bin"):
        puffer_jax.save_weights(policy, args.folder / f"policy.{suffix}")
    print(f"wrote learning_curve.png and policy.pt/.safetensors/.bin to {args.folder}/")

    reference = reference_policy(policy)
    weights = torch.load(args.folder / "policy.pt", weights_only=True)
    reference.load_state_dict(weights, strict=True)
    rng = np.random.default_rng(args.seed)
    observations = rng.standard_normal((16, 32, 4)).astype(np.float32)
    report = compare(reference, policy, observations)
    print(f"\n{report}")
    report.assert_close()

    graphdef, params = puffer_jax.split(policy)

    @jax.jit
    def jax_act(obs, state):
        logits, _, state = puffer_jax.merge(graphdef, params).forward_eval(obs, state)
        return puffer_jax.sample_logits(logits, deterministic=True)[0], state

    def torch_act(obs, state):
        with torch.no_grad():
            logits, _ = reference.forward_eval(torch.from_numpy(obs), state)
        return logits.argmax(-1).numpy(), state

    returns = play(jax_act, policy.initial_state(args.episodes), args.episodes, args.seed)
    print(f"mean return over {args.episodes} episodes: {returns.mean():.1f}")
    ours = play(jax_act, policy.initial_state(20), 20, args.seed + 1000)
    theirs = play(torch_act, {"lstm_h": None, "lstm_c": None}, 20, args.seed + 1000)
    for name, played in (("puffer_jax", ours), ("PufferLib", theirs)):
        print(
            f"20 episodes with {name}: mean return {played.mean():.1f}, lowest {played.min():.0f}"
        )
    return returns.mean()


if __name__ == "__main__":
    main(tyro.cli(Demo))
