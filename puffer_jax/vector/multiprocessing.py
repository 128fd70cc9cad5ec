"""Workers that are processes."""

import contextlib
import itertools
import os
import pickle
import select
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from puffer_jax.vector.envs import AgentLayout, Envs, Order, Told
from puffer_jax.vector.options import MultiprocessingOptions
from puffer_jax.vector.pool import CLOSING, Pool, Share
from puffer_jax.vector.worker import Failure, Memory, Process, wait


class Multiprocessing(Pool):
    """Environments in several processes that write into one block of shared memory.

    Workers are fresh interpreters that sleep while they have nothing to do, and end with this
    process, however it ends; see `puffer_jax.vector.worker`.

    Args:
        args: the arguments of `Pool`.
        seed: see `make`.
        options: see `Options`. With `local_worker`, the last worker is this process, which steps
            its share within `send` while the others step theirs. What its environments raise comes
            through as it is, and no `timeout` ends them. Each worker then has a share of each
            batch. If there are several batches, the others step one while this process acts on the
            next, so this process's shares are a quarter as large.

    Raises:
        ValueError: see `Pool`; or there is a local worker, and there are more workers than
            environments in a batch.
        WorkerError: an environment could not be made.
    """

    Options = MultiprocessingOptions

    def __init__(self, *args: Any, seed: int = 0, **options: Any):
        self._has_local = MultiprocessingOptions(**options).local_worker
        if self._has_local:  # shares differ in size, so only certain ones make up a batch
            options["zero_copy"] = True
        super().__init__(*args, seed=seed, **options)

    def _divide(
        self, num_envs: int, num_workers: int | None, batch_size: int, overwork: bool
    ) -> list[Share]:
        if not self._has_local:
            return super()._divide(num_envs, num_workers, batch_size, overwork)
        num_workers = min(self._cores(), batch_size) if num_workers is None else num_workers
        self._check_workers(num_workers, overwork)
        if num_envs % batch_size or num_workers > batch_size:
            raise ValueError(
                "with local_worker, num_envs must be a multiple of batch_size, which must be at "
                f"least num_workers; got {num_envs}, {batch_size} and {num_workers}"
            )
        others = num_workers - 1
        own = batch_size // num_workers
        if others and batch_size < num_envs:
            own = max(1, own // 4)
        ends = [(batch_size - own) * (i + 1) // others for i in range(others)] + [batch_size]
        return [
            Share(worker, range(batch + begin, batch + end))
            for batch in range(0, num_envs, batch_size)
            for worker, (begin, end) in enumerate(itertools.pairwise([0, *ends]))
        ]

    def _open(self, layout: AgentLayout) -> dict[str, np.ndarray]:
        self._local: dict[int, Envs] = {}
        self._memory = Memory(layout.size(self.num_agents))
        self._processes: dict[int, Process] = {}
        self._ordered: list[deque[int]] = [deque() for _ in range(self._num_workers)]
        self._worker_of: dict[int, int] = {}  # by its file descriptor
        self._poll = select.poll()
        self._end = weakref.finalize(self, _end, self._processes, self._memory, os.getpid())
        return layout.buffers(self.num_agents, self._memory.map)

    def _start(self, worker: int) -> None:
        shares = self._shares_of[worker]
        if self._has_local and worker == self._num_workers - 1:
            for share in shares:
                makers, layout, options = self._parts[share]
                buf = {name: array[self._rows[share]] for name, array in self._buffers.items()}
                self._local[share] = Envs(makers, layout, buf, **options)
            return
        process = self._processes[worker] = Process(self._memory.fd)
        self._ordered[worker].clear()
        for share in shares:
            payload = self._payload(share, self.num_agents, self._rows[share])
            process.order(Order.START, shares.index(share), payload)
        self._watch(worker)

    def _watch(self, worker: int) -> None:
        for fd, events in self._processes[worker].fds().items():
            self._poll.register(fd, events)
            self._worker_of[fd] = worker

    def _forget(self, worker: int) -> None:
        for fd in [fd for fd, own in self._worker_of.items() if own == worker]:
            del self._worker_of[fd]
            self._poll.unregister(fd)

    def _give(self, share: int, order: bytes, argument: int | bytes | None) -> Told | None:
        if share in self._local:
            return self._local[share].obey(order, argument)
        worker = self._shares[share].worker
        if order != Order.NOTIFY:
            self._ordered[worker].append(share)
        message = argument if isinstance(argument, bytes) else b""
        if order == Order.RESET:
            message = pickle.dumps(argument)
        process = self._processes[worker]
        process.order(order, self._shares_of[worker].index(share), message)
        if process.behind:
            self._watch(worker)
        return None

    def _replies(self, timeout: float | None) -> Iterator[tuple[int, Told | Failure]]:
        ready: dict[int, list[int]] = {}
        for fd, _ in wait(self._poll, timeout):
            ready.setdefault(self._worker_of[fd], []).append(fd)
        for worker, fds in ready.items():
            process = self._processes[worker]
            if process.behind:
                process.push()
                self._watch(worker)
            for reply in process.replies(fds):
                if isinstance(reply, Failure):
                    self._forget(worker)
                ordered = self._ordered[worker]  # empty if it died while idle
                yield ordered.popleft() if ordered else self._shares_of[worker][0], reply

    def _kill(self, worker: int) -> None:
        self._forget(worker)
        self._processes[worker].kill()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, except this process's own."""
        return [self._processes[worker].pid for worker in sorted(self._processes)]

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(super()._close)
            stack.callback(self._end)
            for envs in self._local.values():
                stack.callback(envs.close)


def _end(processes: dict[int, Process], memory: Memory, owner: int) -> None:
    if os.getpid() != owner:  # in a fork of the owner
        return
    for process in processes.values():
        process.dismiss()
    deadline = time.monotonic() + CLOSING
    for process in processes.values():
        process.join(deadline)
    memory.close()
