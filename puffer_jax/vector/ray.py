"""Workers that are actors of a Ray cluster."""

import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from puffer_jax.base.packages import require
from puffer_jax.vector.envs import AgentLayout, Order, Told
from puffer_jax.vector.pool import CLOSING, Pool
from puffer_jax.vector.worker import Failure, RayWorker, read_told


class Ray(Pool):
    """Environments in actors of a Ray cluster, spread over its nodes.

    What they observe comes as shared objects: a node's agents read and write its object store.
    Starts Ray if it is not running, and then shuts it down when closed. The arguments are `Pool`'s;
    cores are the cluster's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        ray = require("ray", "the backend Ray", "'puffer_jax[ray]'")
        self._ray, self._started_ray = ray, not ray.is_initialized()
        if self._started_ray:
            ray.init(include_dashboard=False, logging_level=logging.ERROR)
        self._actors: dict[int, Any] = {}
        self._replying: dict[Any, int] = {}  # object -> worker
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            self._leave()
            raise

    def _cores(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def _open(self, layout: AgentLayout) -> dict[str, np.ndarray]:
        return layout.buffers(self.num_agents)

    def _start(self, worker: int) -> None:
        (share,) = self._shares_of[worker]
        agents = self._rows[share].stop - self._rows[share].start
        payload = self._payload(share, agents, slice(None))
        per_core = -(-self._num_workers // self._cores())  # with overwork, more than one
        actor = self._ray.remote(num_cpus=1 / per_core, scheduling_strategy="SPREAD")(RayWorker)
        self._actors[worker] = actor.remote(sys.path, payload)

    def _give(self, share: int, order: bytes, argument: int | bytes | None) -> Told | None:
        actions = self._buffers["actions"][self._rows[share]] if order == Order.STEP else argument
        reply = self._actors[self._shares[share].worker].obey.remote(order, actions)
        if order != Order.NOTIFY:
            self._replying[reply] = share
        return None

    def _replies(self, timeout: float | None) -> Iterator[tuple[int, Told | Failure]]:
        for ref in self._ray.wait([*self._replying], num_returns=1, timeout=timeout)[0]:
            share = self._replying.pop(ref)
            try:
                told, arrays = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                told, arrays = Failure(f"was lost: {error}", lost=True), {}
            for name, array in arrays.items():
                self._buffers[name][self._rows[share]] = array
            yield share, read_told(told) if isinstance(told, bytes) else told

    def _kill(self, worker: int) -> None:
        lost = self._shares_of[worker]
        self._replying = {ref: s for ref, s in self._replying.items() if s not in lost}
        self._ray.kill(self._actors[worker])

    def _close(self) -> None:
        if self._ray.is_initialized():
            closing = [actor.obey.remote(Order.CLOSE, None) for actor in self._actors.values()]
            self._ray.wait(closing, num_returns=len(closing), timeout=CLOSING)
        self._leave()
        super()._close()

    def _leave(self) -> None:
        if self._ray.is_initialized():
            for actor in self._actors.values():
                self._ray.kill(actor)
            if self._started_ray:
                self._ray.shutdown()
