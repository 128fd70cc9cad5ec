"""NatureCNN and an LSTM on an Atari game, one frame at a time, in several worker processes.

python examples/train_atari.py --env ALE/Pong-v5
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx
from PIL import Image

import puffer_jax
from puffer_jax import environments, vector
from puffer_jax.run.plot import plot_runs


@dataclass(frozen=True)
class Args:
    env: str = "ALE/Breakout-v5"
    steps: int = 1_000_000
    num_envs: int = 16
    horizon: int = 64
    update_epochs: int = 2
    hidden_size: int = 256
    learning_rate: float = 6e-4
    frames: int = 1000  # of the GIF, at most
    seed: int = 0
    folder: Path = Path("atari")


def play(args: Args, policy):
    """Frames and return of the trained agent's episode."""
    env = environments.make(args.env, framestack=1, render_mode="rgb_array", seed=args.seed)
    graphdef, params = puffer_jax.split(policy)

    @jax.jit
    def act(obs, state, key):
        logits, _, state = puffer_jax.merge(graphdef, params).forward_eval(obs, state)
        return puffer_jax.sample_logits(logits, key=key)[0], state

    (obs, _), state, key = env.reset(), policy.initial_state(1), jax.random.key(args.seed)
    frames, total = [], 0.0
    while not env.done and len(frames) < args.frames:
        key, now = jax.random.split(key)
        action, state = act(obs, state, now)
        obs, reward, *_ = env.step(np.asarray(action))
        total += reward
        frames.append(Image.fromarray(env.render()))
    env.close()
    return frames, total


def main(args: Args):
    # Learning sees the sign of a reward; the returns that are logged are the game's own.
    envs = vector.make(
        args.env,
        env_kwargs={"framestack": 1, "clip_rewards": True},
        backend=vector.Multiprocessing,
        num_envs=args.num_envs,
        seed=args.seed,
    )
    env, rngs = envs.driver_env, nnx.Rngs(args.seed)
    policy = environments.Policy(env, hidden_size=args.hidden_size, rngs=rngs)
    sizes = policy.hidden_size, policy.hidden_size
    policy = puffer_jax.LSTMWrapper(env, policy, *sizes, rngs=rngs)
    config = puffer_jax.PuffeRLConfig.recommended(
        env=args.env,
        seed=args.seed,
        total_timesteps=args.steps,
        bptt_horizon=args.horizon,
        minibatch_size=args.num_envs * args.horizon // 4,
        update_epochs=args.update_epochs,
        optimizer="adam",
        learning_rate=args.learning_rate,
        adam_beta1=0.9,
        adam_eps=1e-5,
        max_grad_norm=0.5,
        gamma=0.99,
        gae_lambda=0.95,
        clip_coef=0.1,
        ent_coef=0.01,
        data_dir=str(args.folder),
    )
    logger = puffer_jax.JSONLLogger(args.folder / f"run_seed{args.seed}" / "log.jsonl")
    trainer = puffer_jax.PuffeRL(config, envs, policy, logger)
    trainer.run()  # Ctrl-C saves
    print("model:", trainer.close())
    print("curve:", plot_runs([trainer.run_folder], args.folder / "curve.png"))
    frames, total = play(args, trainer.policy)
    gif = args.folder / "agent.gif"
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=1000 // 15, loop=0)
    print(f"agent: {gif}, return {total:.0f}")


if __name__ == "__main__":  # workers import this file, and must not train themselves
    main(tyro.cli(Args))
