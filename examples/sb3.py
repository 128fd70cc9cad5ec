"""One environment, three trainers: ours, sb3-contrib's RecurrentPPO and SBX's PPO.

`pip install -e ".[train,sbx]"`, then `python examples/sb3.py`. The vecenv, NatureCNN and the sizes
of a batch are the same. Ours and sb3-contrib's have an LSTM, as in PufferLib's demo; SBX has none.
"""

import time
from dataclasses import dataclass
from typing import Literal

import gymnasium
import numpy as np
import tyro
from flax import nnx

import puffer_jax

WIDTH, PLACES, STEPS = 128, 3, 8  # of encoding and LSTM; where a square can be; in an episode


class Where(gymnasium.Env):
    """Say where the bright column is: 1 for each right answer, of eight."""

    observation_space = gymnasium.spaces.Box(0, 255, (1, 36, 36), np.uint8)
    action_space = gymnasium.spaces.Discrete(PLACES)

    def _image(self):
        self.place = self.np_random.integers(PLACES)
        return np.broadcast_to(np.uint8(255) * (np.arange(36) // 12 == self.place), (1, 36, 36))

    def reset(self, *, seed=None, options=None):
        """Begin an episode."""
        super().reset(seed=seed)
        self.steps = 0
        return self._image(), {}

    def step(self, action):
        """Answer."""
        self.steps += 1
        reward = float(action == self.place)
        return self._image(), reward, self.steps == STEPS, False, {}


@dataclass(frozen=True)
class Args:
    trainers: tuple[Literal["ours", "recurrent_ppo", "sbx"], ...] = ("ours", "recurrent_ppo", "sbx")
    steps: int = 10_000
    num_envs: int = 16
    horizon: int = 32
    seed: int = 0


def ours(args, vecenv):
    env, rngs = vecenv.driver_env, nnx.Rngs(args.seed)
    policy = puffer_jax.Convolutional(env, hidden_size=WIDTH, output_size=WIDTH, rngs=rngs)
    policy = puffer_jax.LSTMWrapper(env, policy, WIDTH, WIDTH, rngs=rngs)
    config = puffer_jax.PuffeRLConfig.recommended(
        env="where",
        seed=args.seed,
        total_timesteps=args.steps,
        bptt_horizon=args.horizon,
        minibatch_size=args.num_envs * args.horizon // 2,
        update_epochs=4,
        learning_rate=1e-3,
        data_dir="runs",
    )
    trainer = puffer_jax.PuffeRL(config, vecenv, policy)
    returns = []
    while not trainer.done:
        returns = (returns + trainer.evaluate()["episode_return"])[-100:]
        trainer.train()
    trainer.close()
    return returns, trainer.global_step


def sb3(args, vecenv, algorithm, policy, **more):
    env = puffer_jax.sb3.VecEnv(vecenv)
    model = algorithm(
        policy,
        env,
        n_steps=args.horizon,
        batch_size=args.num_envs * args.horizon // 2,
        n_epochs=4,
        learning_rate=1e-3,
        ent_coef=0.01,
        seed=args.seed,
        device="cpu",
        **more,
    )
    model.learn(args.steps)
    env.close()
    return [episode["r"] for episode in model.ep_info_buffer], model.num_timesteps


def recurrent_ppo(args, vecenv):
    import torch
    from sb3_contrib import RecurrentPPO

    torch.set_num_threads(1)  # in so small a network more only wait for each other
    sizes = {"features_extractor_kwargs": {"features_dim": WIDTH}, "net_arch": []}
    lstm = {"lstm_hidden_size": WIDTH, "shared_lstm": True, "enable_critic_lstm": False}
    return sb3(args, vecenv, RecurrentPPO, "CnnLstmPolicy", policy_kwargs=sizes | lstm)


def sbx(args, vecenv):
    from sbx import PPO

    return sb3(args, vecenv, PPO, "CnnPolicy")


if __name__ == "__main__":
    args = tyro.cli(Args)
    print(f"{'trainer':15} {'final return':>12} {'steps/s':>8} {'seconds':>8}")
    for name in args.trainers:
        vecenv = puffer_jax.vector.make(Where, num_envs=args.num_envs)
        began = time.perf_counter()
        returns, steps = globals()[name](args, vecenv)
        seconds = time.perf_counter() - began
        print(f"{name:15} {np.mean(returns):12.2f} {steps / seconds:8.0f} {seconds:8.1f}")
