"""`train_multihost.py` on an existing Ray cluster: `python examples/train_ray.py --workers 4`.

With accelerators Ray Train starts the workers (`--accelerator gpu` or `tpu`). On CPUs, which its
JaxTrainer does not connect, they are plain actors that call `distributed.initialize` themselves. If
a worker is lost, the others end with an error that names it; run this again, and the training goes
on from its last checkpoint. `data_dir` must be a folder that all nodes see.
"""

import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import ray
import train_multihost
import tyro

from puffer_jax import distributed

# This folder is not on the workers' path: what they run of it goes along.
ray.cloudpickle.register_pickle_by_value(train_multihost)


@dataclass(frozen=True)
class Args:
    workers: int = 2
    accelerator: Literal["cpu", "gpu", "tpu"] = "cpu"
    topology: str | None = None
    address: str | None = None
    train: train_multihost.Args = field(default_factory=train_multihost.Args)


@ray.remote(num_cpus=1)
class Worker:
    def address(self) -> str:
        """Where the others find this one."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def train(self, address: str, count: int, index: int, args: train_multihost.Args) -> float:
        """Its part of the training."""
        distributed.initialize(address, count, index)
        return train_multihost.train(args)


def on_cpus(count: int, args: train_multihost.Args) -> list[float]:
    cores = int(ray.cluster_resources().get("CPU", 0))
    if count > cores:  # Ray would wait for more
        raise SystemExit(f"{count} workers need a core each; the cluster has {cores}")
    workers = [Worker.remote() for _ in range(count)]
    address = ray.get(workers[0].address.remote())
    runs = [worker.train.remote(address, count, i, args) for i, worker in enumerate(workers)]
    waiting = runs
    while waiting:  # the first error, whoever has it
        done, waiting = ray.wait(waiting)
        ray.get(done)
    return ray.get(runs)


def on_accelerators(args: Args, train: train_multihost.Args) -> None:
    from ray.train import ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    def loop(_: dict) -> None:
        distributed.initialize()  # Ray Train has connected the workers; this takes over
        train_multihost.train(train)

    scaling = ScalingConfig(
        num_workers=args.workers,
        use_gpu=args.accelerator == "gpu",
        use_tpu=args.accelerator == "tpu",
        topology=args.topology,
    )
    JaxTrainer(loop, train_loop_config={}, scaling_config=scaling).fit()


def main(args: Args) -> None:
    if not ray.is_initialized():
        ray.init(address=args.address)
    # Each worker has a working directory of its own.
    folder = str(Path(args.train.data_dir).absolute())
    train = replace(args.train, data_dir=folder)
    if args.accelerator != "cpu":
        on_accelerators(args, train)
        return
    returns = on_cpus(args.workers, train)
    print(f"{args.workers} workers: return {returns[0]:.1f}, runs in {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args))
