"""64 runs at four learning rates, trained at once in one program: `python examples/sweep_vmap.py`.

A whole training run is a pure function, so `vmap` makes a population of it.
"""

from dataclasses import dataclass
from time import perf_counter

import jax
import jax.numpy as jnp
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
    train = puffer_jax.make_train(
        config, env, lambda rngs: puffer_jax.Default(env, hidden_size=64, rngs=rngs)
    )
    rates = jnp.resize(jnp.asarray(args.learning_rates), args.seeds)
    keys = jax.random.split(jax.random.key(0), args.seeds)
    start = perf_counter()
    program = jax.jit(jax.vmap(train)).lower(keys, {"learning_rate": rates}).compile()
    compiled = perf_counter()
    params, metrics = jax.block_until_ready(program(keys, {"learning_rate": rates}))
    seconds = perf_counter() - compiled

    last = jnp.nanmean(metrics["episode_return"][:, -5:], axis=1)
    for rate in args.learning_rates:
        group = last[rates == rate]
        print(f"learning rate {rate:7.0e}: return {group.mean():5.1f} +- {group.std():5.1f}")
    steps = args.seeds * metrics["episodes"].shape[1] * args.num_envs * 64
    print(f"{args.seeds} runs: compiled in {compiled - start:.0f} s, ran in {seconds:.1f} s")
    print(f"{steps / seconds:,.0f} steps per second together")
    best = int(jnp.argmax(last))
    return jax.tree.map(lambda x: x[best], params)


if __name__ == "__main__":
    main(tyro.cli(Args))
