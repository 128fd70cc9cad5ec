"""Training on several devices, where there is but a CPU."""

import os

from puffer_jax.bench.rows import Case
from puffer_jax.bench.worker import Worker


def devices(net: str, envs: int, count: int) -> Case:
    """Epochs of training on so many devices, made of the CPU, in a process that has them."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    flags = f"--xla_force_host_platform_device_count={count}"
    worker = Worker("jax", threads, "cpu", "float32", {"XLA_FLAGS": flags})
    arguments = {"net": net, "envs": envs, "count": count}
    worker.ask("open", "epochs", "trainer_on_devices", arguments)
    return Case(lambda: 1 / worker.ask("sample", "epochs"), rate=True)
