"""One training on several processes, here in two terminals of one machine.

    python examples/train_multihost.py --process-id 0
    python examples/train_multihost.py --process-id 1

On more machines give each `--coordinator-address HOST:PORT` of process 0, and a `--data-dir` that
all of them see. Where a launcher starts the processes (SLURM, Open MPI, a TPU pod, Kubernetes), it
knows the rest: `srun python examples/train_multihost.py --launcher`.

It trains an LSTM in CartPole up to a return of 475. Kill one process: the other one ends, and says
which is gone. Start both again, and the run goes on from its last checkpoint.
"""

from dataclasses import dataclass

import jax
import tyro
from flax import nnx

import puffer_jax
from puffer_jax import checkpoint, distributed


@dataclass(frozen=True)
class Args:
    process_id: int = 0
    num_processes: int = 2
    coordinator_address: str = "127.0.0.1:7654"
    launcher: bool = False
    goal: float = 475.0
    num_envs: int = 16
    steps: int = 500_000
    horizon: int = 64
    seed: int = 0
    data_dir: str = "runs"


def train(args: Args) -> float:
    """What every process does, after `distributed.initialize`; returns the last mean return."""
    env = puffer_jax.environments.make("cartpole")
    rngs = nnx.Rngs(args.seed)
    policy = puffer_jax.LSTMWrapper(env, puffer_jax.Default(env, rngs=rngs), rngs=rngs)
    config = puffer_jax.PuffeRLConfig.recommended(
        num_envs=args.num_envs,
        bptt_horizon=args.horizon,
        total_timesteps=args.steps,
        checkpoint_interval=10,
        seed=args.seed,
        data_dir=args.data_dir,
    )
    logger = puffer_jax.NoLogger(f"multihost_seed{args.seed}")
    trainer = puffer_jax.PuffeRL(config, env, policy, logger, mesh=puffer_jax.mesh())
    trainer.log_seconds = 0.0  # every epoch, so that all processes see the goal reached
    first = jax.process_index() == 0
    if checkpoint.latest(trainer.run_folder) is not None:
        trainer.restore()
        if first:
            print(trainer.message, flush=True)
    mean = 0.0
    with trainer:  # at the end it saves, and writes the model
        while not trainer.done and mean < args.goal:
            logs = trainer.run_epoch() or {}
            mean = logs.get("environment/episode_return", mean)
            if first:
                print(f"step {trainer.global_step:7d}  return {mean:6.1f}", flush=True)
    if first:
        devices = f"{jax.device_count()} devices of {jax.process_count()} processes"
        print(f"{devices}: return {mean:.1f}, model {trainer.close()}", flush=True)
    return mean


def main(args: Args) -> None:
    if args.launcher:
        distributed.initialize()
    else:
        distributed.initialize(args.coordinator_address, args.num_processes, args.process_id)
    train(args)


if __name__ == "__main__":
    main(tyro.cli(Args))
