"""Train PufferLib 4's MinGRU from one of its `.ini` files, without CUDA.

    python examples/train_v4.py
    python examples/train_v4.py --ini breakout.ini --env gymnax:Breakout-MinAtar

The file's sections say what to train: the policy's parts and sizes, the number of agents, the
numbers of the update. What only PufferLib's own trainer has a use for is named once. Ctrl-C stops
with a checkpoint, whose keys are those of PufferLib 4's Python policies.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from flax import nnx

import puffer_jax
from puffer_jax import v4


@dataclass
class Args:
    ini: Path = Path(__file__).parent / "cartpole_v4.ini"
    env: str | None = None
    """A JAX-native environment, instead of the file's."""
    steps: int | None = None
    """Instead of the file's total_timesteps."""
    num_envs: int | None = None
    """Instead of the file's total_agents."""


def main(args: Args):
    read = v4.load_ini(args.ini)
    if read.unused:
        print(read.unused)
    name = args.env or read.env_name
    if name is None:
        raise SystemExit(f"{args.ini} names no environment; give --env")
    env = puffer_jax.as_jax_env(puffer_jax.environments.make(name, **read.env))
    flags = {"env": name, "total_timesteps": args.steps, "num_envs": args.num_envs}
    changes = {option: value for option, value in flags.items() if value is not None}
    config = puffer_jax.PuffeRLConfig.v4(**read.train | {"data_dir": "runs"} | changes)
    policy = v4.Policy.for_env(env, **read.policy, rngs=nnx.Rngs(config.seed))
    network = policy.network
    print(f"{type(network).__name__}, {network.num_layers} layers of {network.hidden_size}")
    trainer = puffer_jax.PuffeRL(config, env, policy)
    print(trainer.sizes.plan)
    logs = trainer.run()
    for key in ("agent_steps", "environment/episode_return"):
        print(f"{key}: {logs.get(key, float('nan')):.1f}")
    model = trainer.close()
    same = puffer_jax.policy_from_checkpoint(model, env)  # by PufferLib 4's keys
    print(f"model: {model}, {sum(x.size for x in puffer_jax.state_dict(same).values())} numbers")


if __name__ == "__main__":
    main(tyro.cli(Args))
