"""64 runs at four learning rates, trained at once in one program: `python examples/sweep_vmap.py`.

A whole training run is a pure function, so `vmap` makes a population of it, which is spread over
all devices there are.
"""

from dataclasses import dataclass
from time import perf_counter

import jax
import numpy as np
import tyro

import puffer_jax


@dataclass(frozen=True)
class Args:
    seeds: int = 64
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    num_envs: int = 16
    steps: int = 40_000


def main(args: Args):
    env = puffer_jax.environments.make("cartpole")
    config = puffer_jax.PuffeRLConfig.recommended(
        num_envs=args.num_envs,
        total_timesteps=args.steps,
    )
    mesh = puffer_jax.mesh()  # all devices
    rates = np.resize(args.learning_rates, args.seeds)
    keys = jax.random.split(jax.random.key(0), args.seeds)
    start = perf_counter()
    params, metrics = puffer_jax.train_population(
        config,
        env,
        lambda rngs: puffer_jax.Default(env, hidden_size=64, rngs=rngs),
        keys,
        {"learning_rate": rates},
        mesh,
    )
    seconds = perf_counter() - start

    last = np.nanmean(metrics["episode_return"][:, -5:], axis=1)
    for rate in args.learning_rates:
        group = last[rates == rate]
        print(f"learning rate {rate:7.0e}: return {group.mean():5.1f} +- {group.std():5.1f}")
    steps = args.seeds * metrics["episodes"].shape[1] * args.num_envs * 64
    print(f"{args.seeds} runs on {mesh.size} devices, with compilation: {seconds:.1f} s")
    print(f"{steps / seconds:,.0f} steps per second together")
    best = int(last.argmax())
    return jax.tree.map(lambda x: x[best], params)


if __name__ == "__main__":
    main(tyro.cli(Args))
