"""Environments spread over workers."""

import math
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from puffer_jax.vector.envs import WRITTEN, AgentLayout, Creator, Env, Maker, Order, Told
from puffer_jax.vector.options import Auto, PoolOptions
from puffer_jax.vector.protocol import AgentBatch, VecEnv, WorkerError
from puffer_jax.vector.worker import Failure, pack

STARTING = 60.0  # seconds a worker may take to start, beyond its timeout

PATIENCE = 600.0  # the same if it has none: a full cluster may never have a core to spare

CLOSING = 2.0  # seconds the workers have to close their environments


class Share(NamedTuple):
    """Environments that step one after another, as one part of a batch.

    Attributes:
        worker: number of the worker that has them.
        envs: their numbers, which are consecutive.
    """

    worker: int
    envs: range


class Pool(VecEnv):
    """Environments spread over workers, in equal and contiguous parts.

    Batches are made of units: all the workers of a batch side by side (`zero_copy`), or single
    workers.

    Args:
        env_creators: see `make`; one for each environment, like the next two.
        env_args: see `make`.
        env_kwargs: see `make`.
        num_envs: see `make`.
        seed: see `make`.
        options: see `Options`.

    Raises:
        ValueError: the numbers do not fit together.
        WorkerError: an environment could not be made.
    """

    Options: ClassVar[type[PoolOptions]] = PoolOptions

    def __init__(
        self,
        env_creators: Sequence[Creator],
        env_args: Sequence[Sequence[object]],
        env_kwargs: Sequence[dict[str, object]],
        num_envs: int,
        seed: int = 0,
        **options: Any,
    ):
        settings = self.Options(**options)
        num_workers = None if settings.num_workers == "auto" else settings.num_workers
        batch_size = settle_batch(settings.batch_size, num_envs)
        zero_copy, timeout = settings.zero_copy, settings.timeout
        if not 1 <= batch_size <= num_envs:
            raise ValueError(f"batch_size must be 1 .. num_envs ({num_envs}); got {batch_size}")
        if zero_copy and num_envs % batch_size:
            raise ValueError(
                f"with zero_copy, num_envs must be a multiple of batch_size; got {num_envs} and "
                f"{batch_size}"
            )
        shares = self._shares = self._divide(num_envs, num_workers, batch_size, settings.overwork)
        makers = [*map(Maker, env_creators, env_args, env_kwargs)]
        driver = makers[0]()
        layout = AgentLayout.of(driver)
        super().__init__(driver, layout, num_envs, batch_size)

        per_batch = len(shares) * batch_size // num_envs
        if per_batch == len(shares):
            zero_copy = True  # there is only one batch
        self._per_unit = per_batch if zero_copy else 1
        self._units_per_batch = per_batch // self._per_unit
        self._sync_traj = settings.sync_traj
        self._owing = [0] * (len(shares) // self._per_unit)  # shares that each unit waits for
        self._sent: list[int] = []  # units, in the order of sending
        self._done: list[int] = []  # the finished ones of them, in the order of finishing
        self._batch: list[int] = []

        self._timeout = math.inf if timeout is None else timeout
        self._start_limit = PATIENCE if timeout is None else timeout + STARTING
        self._restart_failed = settings.restart_failed
        self._num_workers = 1 + max(share.worker for share in shares)
        # The numbers of the shares that each worker has.
        self._shares_of: list[list[int]] = [[] for _ in range(self._num_workers)]
        for number, share in enumerate(shares):
            self._shares_of[share.worker].append(number)
        self._busy: dict[int, tuple[bytes, int | bytes | None]] = {}
        self._due = [math.inf] * len(shares)
        self._restarts = [0] * self._num_workers
        # Restarted share -> orders until it has really made a step.
        self._unproven: dict[int, int] = {}
        # Shares restarted while idle, which do not make the next step.
        self._missing: set[int] = set()
        self._told: list[Told] = [Told([], []) for _ in shares]

        each = layout.num_agents
        self._rows = [slice(s.envs.start * each, s.envs.stop * each) for s in shares]
        self._parts: list[tuple[list[Maker], AgentLayout, dict[str, Any]]] = []
        for share in shares:
            first = share.envs.start
            settled = {
                "seed": seed + first,
                "first": first,
                "restart_failed": settings.restart_failed,
            }
            self._parts.append(([makers[i] for i in share.envs], layout, settled))
        self._buffers = self._or_close(self._open, layout)
        self._written = [self._buffers[name] for name in WRITTEN]
        self._or_close(self._start_all)

    def _start_all(self) -> None:
        for worker in range(self._num_workers):
            self._start(worker)
        for share in range(len(self._shares)):
            self._order(share, Order.READY, limit=self._start_limit)
        while self._busy:
            self._wait()

    def _divide(
        self, num_envs: int, num_workers: int | None, batch_size: int, overwork: bool
    ) -> list[Share]:
        """The shares, batch by batch: here, one for each worker, all of the same size."""
        if num_workers is None:
            fitting = [
                n
                for n in range(1, num_envs + 1)
                if not num_envs % n and not batch_size % (num_envs // n)
            ]
            num_workers = max((n for n in fitting if n <= self._cores()), default=min(fitting))
        self._check_workers(num_workers, overwork)
        if num_envs % num_workers:
            raise ValueError(f"num_workers must divide num_envs; got {num_workers} and {num_envs}")
        each = num_envs // num_workers
        if batch_size % each:
            raise ValueError(
                "batch_size must be a multiple of the environments of one worker "
                f"({num_envs} / {num_workers}); got {batch_size}"
            )
        return [Share(w, range(w * each, (w + 1) * each)) for w in range(num_workers)]

    def _check_workers(self, num_workers: int, overwork: bool) -> None:
        cores = self._cores()
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1; got {num_workers}")
        if num_workers > cores and not overwork:
            raise ValueError(
                f"num_workers is {num_workers}, but there are {cores} cores, and more workers than "
                "those rarely pay; overwork=True allows it"
            )

    def _payload(self, share: int, agents: int, rows: slice) -> bytes:
        makers, layout, options = self._parts[share]
        restarts = self._restarts[self._shares[share].worker]
        return pack((makers, layout, agents, rows, options | {"restarts": restarts}))

    # --- what a kind of worker must do ---

    def _cores(self) -> int:
        """How many workers can run at once."""
        return available_cores()

    @abstractmethod
    def _open(self, layout: AgentLayout) -> dict[str, np.ndarray]:
        """The buffers of all agents, before any worker starts."""

    @abstractmethod
    def _start(self, worker: int) -> None:
        """Start a worker with its shares, instead of a lost one if there was one."""

    @abstractmethod
    def _give(self, share: int, order: bytes, argument: int | bytes | None) -> Told | None:
        """Give the share's worker an order; returns what came of it if that is known already."""

    @abstractmethod
    def _replies(self, timeout: float | None) -> Iterator[tuple[int, Told | Failure]]:
        """Wait; then the share and the reply of each order that has been obeyed."""

    @abstractmethod
    def _kill(self, worker: int) -> None:
        """End a worker at once."""

    # --- waiting for workers ---

    def _order(
        self,
        share: int,
        order: bytes,
        argument: int | bytes | None = None,
        limit: float | None = None,
    ) -> None:
        told = self._give(share, order, argument)
        if told is not None:
            self._obeyed(share, told)
            return
        self._busy[share] = order, argument
        # The worker may have to step other shares of its own first.
        busy = sum(own in self._busy for own in self._shares_of[self._shares[share].worker])
        self._due[share] = time.monotonic() + busy * (self._timeout if limit is None else limit)

    def _obeyed(self, share: int, told: Told) -> None:
        for kept, new in zip(self._told[share], told, strict=True):
            kept += new
        unit = share // self._per_unit
        self._owing[unit] -= 1
        if not self._owing[unit]:
            self._done.append(unit)

    def _wait(self) -> None:
        """Wait until a worker has carried out its order, or has failed or hung."""
        due = min(self._due[share] for share in self._busy)
        timeout = max(0.0, due - time.monotonic()) if due < math.inf else None
        for share, reply in self._replies(timeout):
            due = math.inf
            if isinstance(reply, Failure):
                self._lose(share, reply)
                continue
            order, _ = self._busy.pop(share)
            if order == Order.STEP and share in self._unproven:
                self._unproven[share] -= 1
                if not self._unproven[share]:
                    del self._unproven[share]
            self._obeyed(share, reply)
        if due < math.inf:  # nobody replied
            late = [s for s in self._busy if self._due[s] <= time.monotonic()]
            for worker, share in {self._shares[s].worker: s for s in reversed(late)}.items():
                self._kill(worker)
                order, _ = self._busy[share]
                what = {Order.STEP: "step", Order.RESET: "reset"}.get(order, "start")
                limit = f"timeout={self._timeout}" if what != "start" else f"{self._start_limit:g}"
                reason = f"did not {what} within {limit} s and was killed"
                self._lose(share, Failure(reason, lost=True))

    def _lose(self, lost: int, failure: Failure) -> None:
        """Restart the worker of a lost share, if that is wanted and can help."""
        worker, envs = self._shares[lost]
        tasks = {share: self._busy.pop(share, None) for share in self._shares_of[worker]}
        again = "after a restart, " * (lost in self._unproven)
        task = tasks[lost]
        unwanted = not (self._restart_failed and failure.lost)
        unwanted |= task is not None and task[0] == Order.APPLY
        if unwanted or again or task == (Order.READY, None):
            raise WorkerError(
                f"worker {worker} (environments {envs.start} to {envs.stop - 1}) "
                f"{again}{failure.reason}"
            )
        self._restarts[worker] += 1
        self._start(worker)
        for share, task in tasks.items():
            self._unproven[share] = 2  # the first order may only reset
            numbers = self._shares[share].envs
            self._told[share].infos.append({"restarts": len(numbers)})
            self._told[share].sources.append(numbers.start)
            if task is None:
                self._missing.add(share)
            elif task[0] == Order.RESET:
                self._order(share, Order.RESET, task[1], limit=self._start_limit)
            else:
                self._order(share, Order.RESTART, limit=self._start_limit)

    # --- the protocol ---

    def _reset(self, seed: int | None) -> None:
        while self._busy:  # with earlier steps
            self._wait()
        self._sent, self._done = [*range(len(self._owing))], []
        self._owing = [self._per_unit] * len(self._owing)
        self._missing.clear()
        for number, share in enumerate(self._shares):
            self._told[number] = Told([], [])
            self._order(number, Order.RESET, None if seed is None else seed + share.envs.start)

    def _recv(self) -> AgentBatch:
        while not (batch := self._next_batch()):
            self._wait()
        self._batch = batch
        for unit in batch:
            self._sent.remove(unit)
            self._done.remove(unit)
        return self._received()

    def _received(self) -> AgentBatch:
        infos, self.info_sources = [], []
        for share in self._batch_shares():
            told = self._told[share]
            if told.infos:
                infos += told.infos
                self.info_sources += told.sources
                self._told[share] = Told([], [])
        rows = self._batch_rows()
        obs, rewards, terminals, truncations, masks = [array[rows] for array in self._written]
        return obs, rewards, terminals, truncations, infos, self.agent_ids[rows], masks

    def _next_batch(self) -> list[int]:
        """The units of the next batch; empty if it must wait for some of them."""
        batch = (self._sent if self._sync_traj else self._done)[: self._units_per_batch]
        ready = len(batch) == self._units_per_batch and not any(self._owing[u] for u in batch)
        return batch if ready else []

    def _batch_shares(self) -> list[int]:
        return [u * self._per_unit + i for u in self._batch for i in range(self._per_unit)]

    def _batch_rows(self) -> slice | np.ndarray:
        if len(self._batch) == 1:
            first = self._batch[0] * self._per_unit
            return slice(self._rows[first].start, self._rows[first + self._per_unit - 1].stop)
        rows = [self._rows[share] for share in self._batch_shares()]
        return np.concatenate([np.arange(r.start, r.stop) for r in rows])

    def _send(self, actions: np.ndarray) -> None:
        self._buffers["actions"][self._batch_rows()] = actions
        for unit in self._batch:
            self._sent.append(unit)
            self._owing[unit] = self._per_unit
        for share in self._batch_shares():
            self._act(share, Order.STEP)

    def _act(self, share: int, order: bytes) -> None:
        if share in self._missing:
            self._missing.remove(share)
            order = Order.RESTART
        self._order(share, order)

    def _renew(self) -> AgentBatch:
        over = self._buffers["terminals"] | self._buffers["truncations"]
        shares = [share for share in self._batch_shares() if over[self._rows[share]].any()]
        for share in shares:
            self._owing[share // self._per_unit] += 1
            self._act(share, Order.RENEW)
        while not self._busy.keys().isdisjoint(shares):
            self._wait()
        self._done = [unit for unit in self._done if unit not in self._batch]
        return self._received()

    def _apply(
        self, function: Callable[[Env], Any], numbers: Sequence[int]
    ) -> list[tuple[bool, Any]]:
        while self._busy:
            self._wait()
        kept, done = self._told, list(self._done)
        self._told = [Told([], []) for _ in self._shares]
        for share, (_, envs) in enumerate(self._shares):
            if own := [number for number in numbers if number in envs]:
                self._owing[share // self._per_unit] += 1
                self._order(share, Order.APPLY, pack((function, own)))
        while self._busy:
            self._wait()
        results = {
            number: result for told in self._told for result, number in zip(*told, strict=True)
        }
        self._told, self._done = kept, done
        return [results[number] for number in numbers]

    def _notify(self) -> None:
        for share in range(len(self._shares)):
            self._give(share, Order.NOTIFY, None)

    def _close(self) -> None:
        self.driver_env.close()


def available_cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def settle_batch(batch_size: int | Auto | None, num_envs: int) -> int:
    """How many environments are in a batch; auto: half of them, None: all."""
    if batch_size == "auto":
        return max(1, num_envs // 2)
    return num_envs if batch_size is None else batch_size
