"""Train LSTMWrapper(Default) on CartPole, take it to PufferLib, and show that it is unchanged.

python examples/demo.py
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import gymnasium
import jax
import numpy as np
import torch
import tyro
from flax import nnx

import puffer_jax
from puffer_jax.parity.comparison import compare
from puffer_jax.parity.reference import reference_policy
from puffer_jax.run.plot import plot_runs


@dataclass(frozen=True)
class Demo:
    """What to train and where to put the results."""

    steps: int = 130_000
    seed: int = 0
    episodes: int = 100
    folder: Path = Path("demo")


def train(args: Demo):
    envs = gymnasium.make_vec("CartPole-v1", 32, "sync")
    policy = puffer_jax.Default(envs, rngs=nnx.Rngs(args.seed))
    policy = puffer_jax.LSTMWrapper(envs, policy, rngs=nnx.Rngs(args.seed))
    config = puffer_jax.PuffeRLConfig.recommended(
        env="CartPole-v1",
        total_timesteps=args.steps,
        seed=args.seed,
        data_dir=str(args.folder),
    )
    shutil.rmtree(args.folder / "run", ignore_errors=True)
    logger = puffer_jax.JSONLLogger(args.folder / "run" / "log.jsonl")
    print(f"training for {args.steps:,} steps, about a minute; the log is {logger.path}")
    trainer = puffer_jax.PuffeRL(config, envs, policy, logger)
    trainer.run()  # draws a dashboard on a terminal
    plot_runs([args.folder / "run"], args.folder / "learning_curve.png")
    return trainer.policy


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
    policy = train(args)
    print(f"trained for {perf_counter() - start:.0f} s")
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
