"""Many environments stepped at once: in this process, in several, or on a cluster.

The protocol is that of the reference's `vector.py`: `async_reset`, then `recv` and `send` by turns,
or `reset` and `step`, which do both. What `recv` hands out are the environments' own buffers: they
are overwritten by what follows `send`.

An emulated environment's episode ends with its last observation, and the step after resets it and
ignores the action; a native PufferLib environment resets itself within the step. This module
imports neither JAX nor torch, and no environment.
"""

import contextlib
import difflib
import functools
import itertools
import logging
import math
import os
import pickle
import select
import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from puffer_jax.base.spaces import kind_of, structured_dtype
from puffer_jax.environments.emulation.spaces import emulate_observation_space, joint_space
from puffer_jax.workers import (
    GIVEN,
    Actor,
    Envs,
    Failure,
    Info,
    Layout,
    Maker,
    Memory,
    Order,
    Process,
    pack,
    wait,
)

Received = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[Info], np.ndarray, np.ndarray]

_STARTING = 60.0  # seconds a worker may take to start, beyond its timeout

_PATIENCE = 600.0  # the same without a timeout: a full cluster may never have a place for it

_CLOSING = 2.0  # seconds the workers have to close their environments


class WorkerError(RuntimeError):
    """A worker failed: an environment raised in it, it died, or it hung."""


class VecEnv(ABC):
    """The protocol, and the order of its calls.

    Args:
        driver_env: one of the environments, for its spaces.
        layout: that of each environment.
        num_envs: how many there are.
        batch_envs: how many of them act at once.

    Attributes:
        driver_env: see above; a policy is made for it.
        emulated: how a structured observation is packed, see `puffer_jax.nativize_dtype`; False
            for native environments.
        single_observation_space: of one agent.
        single_action_space: of one agent.
        num_environments: in all.
        num_agents: of all environments.
        agents_per_batch: that act at once.
        agent_ids: of all agents.
        num_buffers: groups that act by turns in this process, see `Serial`.
    """

    num_buffers = 1

    def __init__(self, driver_env: Any, layout: Layout, num_envs: int, batch_envs: int):
        self.driver_env = driver_env
        self.emulated = driver_env.emulated
        self.single_observation_space = layout.observation_space
        self.single_action_space = layout.action_space
        self.num_environments = num_envs
        self.num_agents = layout.num_agents * num_envs
        self.agents_per_batch = layout.num_agents * batch_envs
        self.agent_ids = np.arange(self.num_agents)
        self._state = "reset"  # what must be called next; or "closed"
        self._action = structured_dtype(layout.action_space)
        self._actions_shape = (self.agents_per_batch, *self._action.shape)
        self._actions_checked = False

    @property
    def num_envs(self) -> int:
        """Rows of a batch. Quirk kept: agents, not environments."""
        return self.agents_per_batch

    @functools.cached_property
    def observation_space(self) -> Any:
        """Of a batch, a Box."""
        return joint_space(self.single_observation_space, self.agents_per_batch)

    @functools.cached_property
    def action_space(self) -> Any:
        """Of a batch: MultiDiscrete for Discrete, else a Box."""
        return joint_space(self.single_action_space, self.agents_per_batch)

    def async_reset(self, seed: int | None = None) -> None:
        """Start all episodes; environment i with `seed + i`, whichever worker has it.

        With None, environments go on with the seeds they were made with.

        Raises:
            RuntimeError: it is closed.
            WorkerError: a worker failed. Then everything is closed.
        """
        self._expect("reset", "recv", "send")
        self._or_close(self._reset, seed)
        self._state = "recv"

    def recv(self) -> Received:
        """Wait for a batch.

        Returns:
            (observations, rewards, terminals, truncations, infos, agent_ids, masks): arrays
            (agents_per_batch, ...) but for infos, a list of what the environments tell. A mask is
            False where an agent is not there.

        Raises:
            RuntimeError: neither `async_reset` nor `send` came before.
            WorkerError: a worker failed. Then everything is closed.
        """
        self._expect("recv")
        received = self._or_close(self._recv)
        self._state = "send"
        return received

    def send(self, actions: Any) -> None:
        """Act on the batch received last.

        Args:
            actions: (agents_per_batch, ...), of the joint `action_space`; whether their values are
                in it is only looked at the first time. With several buffers, JAX may still be
                computing them.

        Raises:
            RuntimeError: `recv` did not come before.
            ValueError: `actions` have another shape or kind, or are outside the space.
            WorkerError: a worker failed. Then everything is closed.
        """
        self._expect("send")
        if self.num_buffers == 1:
            actions = np.asarray(actions)
        elif not hasattr(actions, "block_until_ready"):
            actions = np.array(actions)  # the caller may write to its own before they are played
        self._check_actions(actions)
        self._or_close(self._send, actions)
        self._state = "recv"

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, list[Info]]:
        """`async_reset` and `recv`; gives observations and infos."""
        self.async_reset(seed)
        received = self.recv()
        return received[0], received[4]

    def step(
        self, actions: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[Info]]:
        """`send` and `recv`; gives observations, rewards, terminals, truncations and infos."""
        self.send(actions)
        return self.recv()[:5]

    def notify(self) -> None:
        """Call `notify` of the environments that have it."""
        self._expect("reset", "recv", "send")
        self._notify()

    def close(self) -> None:
        """Close the environments and end the workers; once more does nothing."""
        if self._state != "closed":
            self._state = "closed"
            self._close()

    def __enter__(self) -> "VecEnv":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _expect(self, *states: str) -> None:
        if self._state in states:
            return
        if self._state == "closed":
            raise RuntimeError(f"this {type(self).__name__} is closed")
        first = {"reset": "(async_)reset", "recv": "recv", "send": "send"}[self._state]
        raise RuntimeError(f"call {first} before {states[0]}")

    def _or_close(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception:
            self.close()
            raise

    def _check_actions(self, actions: Any) -> None:
        problem = "" if actions.shape == self._actions_shape else f"shape {self._actions_shape}"
        if not problem and not self._actions_checked:
            space = self.action_space
            if not np.can_cast(actions.dtype, space.dtype, "same_kind"):
                problem = f"{space.dtype}"
            elif not space.contains(np.asarray(actions).astype(space.dtype)):
                problem = f"values in {space}"
            self._actions_checked = not problem
        if problem:
            raise ValueError(
                f"actions must have {problem}; got shape {actions.shape} of {actions.dtype}"
                + (f" in {actions.min()} .. {actions.max()}" if actions.size else "")
            )

    @abstractmethod
    def _reset(self, seed: int | None) -> None: ...

    @abstractmethod
    def _recv(self) -> Received: ...

    @abstractmethod
    def _send(self, actions: Any) -> None: ...

    @abstractmethod
    def _notify(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class Serial(VecEnv):
    """All environments in this process, one after the other. Made by `make`.

    What an environment raises comes through as it is, with a note that says which it was.

    With several buffers (double-buffered sampling, Petrenko et al. 2020), they are as many groups,
    which act by turns: a group steps when `recv` comes to it again, and until then the device has
    time to compute its actions, while other groups step.

    Args:
        env_creators: see `make`; one for each environment, as what follows.
        env_args: see `make`.
        env_kwargs: see `make`.
        num_envs: see `make`.
        seed: see `make`.
        num_buffers: a divisor of `num_envs`; a batch is that part of them.
        restart_failed: see `make`.

    Raises:
        ValueError: `num_buffers` is not possible.
    """

    def __init__(
        self,
        env_creators: Sequence[Callable[..., Any] | str],
        env_args: Sequence[Sequence[Any]],
        env_kwargs: Sequence[dict[str, Any]],
        num_envs: int,
        seed: int = 0,
        num_buffers: int = 1,
        restart_failed: bool = False,
        **_: Any,  # those of the other backends
    ):
        if num_buffers not in range(1, num_envs + 1) or num_envs % num_buffers:
            raise ValueError(
                f"num_buffers must divide the number of environments, {num_envs}; got {num_buffers}"
            )
        makers = [*map(Maker, env_creators, env_args, env_kwargs)]
        driver = makers[0]()
        layout = Layout.of(driver)
        driver.close()
        each = self._each = num_envs // num_buffers
        self._groups: list[Envs] = []
        try:
            for first in range(0, num_envs, each):
                part = makers[first : first + each]
                buffers = layout.buffers(layout.num_agents * each)
                group = Envs(part, layout, buffers, seed + first, first, restart_failed)
                self._groups.append(group)
        except BaseException:
            self._close()
            raise
        super().__init__(self.envs[0], layout, num_envs, each)
        self.num_buffers = num_buffers
        self._turn = 0
        self._actions: list[Any] = [None] * num_buffers  # that a group has not played yet
        self._infos: list[list[Info]] = [[]] * num_buffers
        self._given = [[group.buf[name] for name in GIVEN] for group in self._groups]
        self._ids = np.split(self.agent_ids, num_buffers)

    @property
    def envs(self) -> list[Any]:
        """The environments."""
        return [env for group in self._groups for env in group.envs]

    def _reset(self, seed: int | None) -> None:
        self._turn = 0
        for i, group in enumerate(self._groups):
            self._actions[i] = None
            self._infos[i] = group.reset(None if seed is None else seed + i * self._each)

    def _recv(self) -> Received:
        turn = self._turn
        if self._actions[turn] is not None:
            self._step(turn)
        obs, rewards, terminals, truncations, masks = self._given[turn]
        return obs, rewards, terminals, truncations, self._infos[turn], self._ids[turn], masks

    def _send(self, actions: Any) -> None:
        turn, self._turn = self._turn, (self._turn + 1) % self.num_buffers
        self._actions[turn] = actions
        if self.num_buffers == 1:
            self._step(turn)

    def _step(self, turn: int) -> None:
        actions, self._actions[turn] = self._actions[turn], None
        self._groups[turn].buf["actions"][:] = actions
        self._infos[turn] = self._groups[turn].step()

    def _notify(self) -> None:
        for group in self._groups:
            group.notify()

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:
            for group in self._groups:
                stack.callback(group.close)


class _Share(NamedTuple):
    """Environments that step one after the other, as one part of a batch.

    Attributes:
        worker: that has them.
        envs: their numbers, in a row.
    """

    worker: int
    envs: range


class _Pool(VecEnv):
    """Environments spread over workers, in equal and contiguous parts.

    Batches are made of units: of the workers of a whole batch side by side (`zero_copy`), or of
    single workers.

    Args:
        env_creators: see `make`; one for each environment, as what follows.
        env_args: see `make`.
        env_kwargs: see `make`.
        num_envs: see `make`.
        num_workers: a divisor of `num_envs`; by default, the largest that the cores allow.
        batch_size: how many environments act at once; by default, all. If fewer, the others step
            meanwhile.
        zero_copy: batches are of environments in a row, so that their arrays need no copying.
        sync_traj: batches come in the order in which they were sent, each environment as often as
            any other; or else, in the order in which they are done.
        overwork: allow more workers than cores.
        seed: see `make`.
        timeout: seconds that a worker may take for one order; by default, for ever. (A minute more
            to start; by default, ten.)
        restart_failed: see `make`.

    Raises:
        ValueError: the numbers do not go together.
        WorkerError: an environment could not be made.
    """

    def __init__(
        self,
        env_creators: Sequence[Callable[..., Any] | str],
        env_args: Sequence[Sequence[Any]],
        env_kwargs: Sequence[dict[str, Any]],
        num_envs: int,
        num_workers: int | None = None,
        batch_size: int | None = None,
        zero_copy: bool = True,
        sync_traj: bool = True,
        overwork: bool = False,
        seed: int = 0,
        timeout: float | None = None,
        restart_failed: bool = False,
    ):
        batch_size = num_envs if batch_size is None else batch_size
        if not 1 <= batch_size <= num_envs:
            raise ValueError(f"batch_size must be 1 .. num_envs ({num_envs}); got {batch_size}")
        if zero_copy and num_envs % batch_size:
            raise ValueError(
                f"with zero_copy, num_envs must be a multiple of batch_size; got {num_envs} and "
                f"{batch_size}"
            )
        shares = self._shares = self._divide(num_envs, num_workers, batch_size, overwork)
        makers = [*map(Maker, env_creators, env_args, env_kwargs)]
        driver = makers[0]()
        layout = Layout.of(driver)
        super().__init__(driver, layout, num_envs, batch_size)

        per_batch = len(shares) * batch_size // num_envs
        if per_batch == len(shares):
            zero_copy = True  # there is but one batch
        self._per_unit = per_batch if zero_copy else 1
        self._units_per_batch = per_batch // self._per_unit
        self._sync_traj = sync_traj
        self._owing = [0] * (len(shares) // self._per_unit)  # shares a unit waits for
        self._sent: list[int] = []  # units, in that order
        self._done: list[int] = []  # units among them, in that order
        self._batch: list[int] = []

        self._timeout = math.inf if timeout is None else timeout
        self._start_limit = _PATIENCE if timeout is None else timeout + _STARTING
        self._restart_failed = restart_failed
        self._num_workers = 1 + max(share.worker for share in shares)
        # By their numbers, as everywhere below, the shares that a worker has.
        self._shares_of: list[list[int]] = [[] for _ in range(self._num_workers)]
        for number, share in enumerate(shares):
            self._shares_of[share.worker].append(number)
        self._busy: dict[int, tuple[bytes, Any]] = {}
        self._due = [math.inf] * len(shares)
        self._restarts = [0] * self._num_workers
        self._unproven: dict[int, int] = {}  # restarted share -> steps till it has really made one
        self._missing: set[int] = set()  # restarted while they had nothing to do: no step for them
        self._infos: list[list[Info]] = [[] for _ in shares]

        each = layout.num_agents
        self._rows = [slice(s.envs.start * each, s.envs.stop * each) for s in shares]
        self._parts: list[tuple[list[Maker], Layout, dict[str, Any]]] = []
        for share in shares:
            first = share.envs.start
            options = {"seed": seed + first, "first": first, "restart_failed": restart_failed}
            self._parts.append(([makers[i] for i in share.envs], layout, options))
        self._buffers = self._or_close(self._open, layout)
        self._given = [self._buffers[name] for name in GIVEN]
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
    ) -> list[_Share]:
        """The shares, batch by batch: here, one of each worker, which are of equal sizes."""
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
        return [_Share(w, range(w * each, (w + 1) * each)) for w in range(num_workers)]

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
        return _cores()

    @abstractmethod
    def _open(self, layout: Layout) -> dict[str, np.ndarray]:
        """The buffers of all agents, before any worker starts."""

    @abstractmethod
    def _start(self, worker: int) -> None:
        """Start a worker with its shares, in the place of a lost one if there was one."""

    @abstractmethod
    def _give(self, share: int, order: bytes, argument: Any) -> list[Info] | None:
        """Give the share's worker an order. If it has been obeyed by then: what was told."""

    @abstractmethod
    def _replies(self, timeout: float | None) -> Iterator[tuple[int, list[Info] | Failure]]:
        """By share, those of the workers that have done what they were told, after waiting."""

    @abstractmethod
    def _kill(self, worker: int) -> None:
        """End a worker at once."""

    # --- waiting for workers ---

    def _order(
        self, share: int, order: bytes, argument: Any = None, limit: float | None = None
    ) -> None:
        told = self._give(share, order, argument)
        if told is not None:
            self._obeyed(share, told)
            return
        self._busy[share] = order, argument
        # The worker may have others of its shares to step before.
        busy = sum(own in self._busy for own in self._shares_of[self._shares[share].worker])
        self._due[share] = time.monotonic() + busy * (self._timeout if limit is None else limit)

    def _obeyed(self, share: int, told: list[Info]) -> None:
        self._infos[share] += told
        unit = share // self._per_unit
        self._owing[unit] -= 1
        if not self._owing[unit]:
            self._done.append(unit)

    def _wait(self) -> None:
        """Wait until a worker has done what it was told, or has failed or hung."""
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
        """Start the worker of a share anew, if that is wanted and can help."""
        worker, envs = self._shares[lost]
        tasks = {share: self._busy.pop(share, None) for share in self._shares_of[worker]}
        again = "after a restart, " * (lost in self._unproven)
        unwanted = not (self._restart_failed and failure.lost)
        if unwanted or again or tasks[lost] == (Order.READY, None):
            raise WorkerError(
                f"worker {worker} (environments {envs.start} to {envs.stop - 1}) "
                f"{again}{failure.reason}"
            )
        self._restarts[worker] += 1
        self._start(worker)
        for share, task in tasks.items():
            self._unproven[share] = 2  # the first may but reset
            self._infos[share].append({"restarts": len(self._shares[share].envs)})
            if task is None:
                self._missing.add(share)
            else:
                order = Order.RESET if task[0] == Order.RESET else Order.RESTART
                self._order(share, order, task[1], limit=self._start_limit)

    # --- the protocol ---

    def _reset(self, seed: int | None) -> None:
        while self._busy:  # with the steps before
            self._wait()
        self._sent, self._done = [*range(len(self._owing))], []
        self._owing = [self._per_unit] * len(self._owing)
        self._missing.clear()
        for number, share in enumerate(self._shares):
            self._infos[number] = []
            self._order(number, Order.RESET, None if seed is None else seed + share.envs.start)

    def _recv(self) -> Received:
        while not (batch := self._next_batch()):
            self._wait()
        self._batch = batch
        for unit in batch:
            self._sent.remove(unit)
            self._done.remove(unit)
        infos: list[Info] = []
        for share in self._batch_shares():
            if self._infos[share]:
                infos += self._infos[share]
                self._infos[share] = []
        rows = self._batch_rows()
        obs, rewards, terminals, truncations, masks = [array[rows] for array in self._given]
        return obs, rewards, terminals, truncations, infos, self.agent_ids[rows], masks

    def _next_batch(self) -> list[int]:
        """Its units, or none if some of them must be waited for."""
        batch = (self._sent if self._sync_traj else self._done)[: self._units_per_batch]
        ready = len(batch) == self._units_per_batch and not any(self._owing[u] for u in batch)
        return batch if ready else []

    def _batch_shares(self) -> list[int]:
        return [u * self._per_unit + i for u in self._batch for i in range(self._per_unit)]

    def _batch_rows(self) -> Any:
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
            if share in self._missing:
                self._missing.remove(share)
                self._order(share, Order.RESTART)
            else:
                self._order(share, Order.STEP)

    def _notify(self) -> None:
        for share in range(len(self._shares)):
            self._give(share, Order.NOTIFY, None)

    def _close(self) -> None:
        self.driver_env.close()


class Multiprocessing(_Pool):
    """Environments in several processes that write into one block of shared memory.

    Workers are fresh interpreters, asleep while they have nothing to do, and end with this
    process, however it ends; see `puffer_jax.workers`.

    Args:
        args: `_Pool`'s.
        local_worker: the last worker is this process, which steps its share within `send` while
            the others step theirs. What its environments raise comes through as it is, and no
            `timeout` ends them. Each worker then has a share of each batch. If there are several
            batches, the others step one while this process acts on the next, so that its own
            shares are a quarter as large.
        kwargs: `_Pool`'s.

    Raises:
        ValueError: see `_Pool`; or with a local worker, there are more workers than environments
            in a batch.
        WorkerError: an environment could not be made.
    """

    def __init__(self, *args: Any, local_worker: bool = False, **kwargs: Any):
        self._has_local = local_worker
        if local_worker:  # shares differ in size, so a batch is of those that make one
            kwargs["zero_copy"] = True
        super().__init__(*args, **kwargs)

    def _divide(
        self, num_envs: int, num_workers: int | None, batch_size: int, overwork: bool
    ) -> list[_Share]:
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
            _Share(worker, range(batch + begin, batch + end))
            for batch in range(0, num_envs, batch_size)
            for worker, (begin, end) in enumerate(itertools.pairwise([0, *ends]))
        ]

    def _open(self, layout: Layout) -> dict[str, np.ndarray]:
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
        self._poll.register(process.fd, select.POLLIN)
        self._worker_of[process.fd] = worker
        self._ordered[worker].clear()
        for share in shares:
            payload = self._payload(share, self.num_agents, self._rows[share])
            process.order(Order.START, shares.index(share), payload)

    def _give(self, share: int, order: bytes, argument: Any) -> list[Info] | None:
        if share in self._local:
            return self._local[share].obey(order, argument)
        worker = self._shares[share].worker
        if order != Order.NOTIFY:
            self._ordered[worker].append(share)
        message = pickle.dumps(argument) if order == Order.RESET else b""
        self._processes[worker].order(order, self._shares_of[worker].index(share), message)
        return None

    def _replies(self, timeout: float | None) -> Iterator[tuple[int, list[Info] | Failure]]:
        for fd, _ in wait(self._poll, timeout):
            worker = self._worker_of[fd]
            reply = self._processes[worker].reply()
            if isinstance(reply, Failure):
                self._poll.unregister(fd)
            ordered = self._ordered[worker]  # empty: it died without an order
            yield ordered.popleft() if ordered else self._shares_of[worker][0], reply

    def _kill(self, worker: int) -> None:
        self._poll.unregister(self._processes[worker].fd)
        self._processes[worker].kill()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, without this one's."""
        return [self._processes[worker].pid for worker in sorted(self._processes)]

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(super()._close)
            stack.callback(self._end)
            for envs in self._local.values():
                stack.callback(envs.close)


def _end(processes: dict[int, Process], memory: Memory, owner: int) -> None:
    if os.getpid() != owner:  # in a fork of it
        return
    for process in processes.values():
        process.order(Order.CLOSE)
    deadline = time.monotonic() + _CLOSING
    for process in processes.values():
        process.join(deadline)
    memory.close()


class Ray(_Pool):
    """Environments in actors of a Ray cluster, spread over its nodes.

    What they observe comes as shared objects: a node's agents read and write its object store.
    Starts Ray if that is not done, and then shuts it down when closed. The arguments are `_Pool`'s;
    cores are the cluster's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        try:
            import ray
        except ImportError as error:
            raise ImportError("Ray is not installed: pip install 'puffer_jax[ray]'") from error
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

    def _open(self, layout: Layout) -> dict[str, np.ndarray]:
        return layout.buffers(self.num_agents)

    def _start(self, worker: int) -> None:
        (share,) = self._shares_of[worker]
        agents = self._rows[share].stop - self._rows[share].start
        payload = self._payload(share, agents, slice(None))
        per_core = -(-self._num_workers // self._cores())  # with overwork, more than one
        actor = self._ray.remote(num_cpus=1 / per_core, scheduling_strategy="SPREAD")(Actor)
        self._actors[worker] = actor.remote(sys.path, payload)

    def _give(self, share: int, order: bytes, argument: Any) -> list[Info] | None:
        if order == Order.STEP:
            argument = self._buffers["actions"][self._rows[share]]
        reply = self._actors[self._shares[share].worker].obey.remote(order, argument)
        if order != Order.NOTIFY:
            self._replying[reply] = share
        return None

    def _replies(self, timeout: float | None) -> Iterator[tuple[int, list[Info] | Failure]]:
        for ref in self._ray.wait([*self._replying], num_returns=1, timeout=timeout)[0]:
            share = self._replying.pop(ref)
            try:
                reply, arrays = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                reply, arrays = Failure(f"was lost: {error}", lost=True), {}
            for name, array in arrays.items():
                self._buffers[name][self._rows[share]] = array
            yield share, reply

    def _kill(self, worker: int) -> None:
        mine = self._shares_of[worker]
        self._replying = {ref: s for ref, s in self._replying.items() if s not in mine}
        self._ray.kill(self._actors[worker])

    def _close(self) -> None:
        if self._ray.is_initialized():
            closing = [actor.obey.remote(Order.CLOSE, None) for actor in self._actors.values()]
            self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSING)
        self._leave()
        super()._close()

    def _leave(self) -> None:
        if self._ray.is_initialized():
            for actor in self._actors.values():
                self._ray.kill(actor)
            if self._started_ray:
                self._ray.shutdown()


class JaxVecEnv(VecEnv):
    """Many of one JAX-native environment behind the protocol; a step is one dispatch.

    For loops that are not compiled as a whole: `puffer_jax.PuffeRL` compiles rollout and update
    together if it is given the environment itself. As an emulated environment, it ends an episode
    with its last observation, and packs structured ones.

    Args:
        env: as in `puffer_jax.as_jax_env`.
        num_envs: how many.
        seed: of the first, as `make`'s.
    """

    def __init__(self, env: Any, num_envs: int, seed: int = 0):
        import jax
        import jax.numpy as jnp

        from puffer_jax.environments.jax_native import as_jax_env

        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1; got {num_envs}")
        env = as_jax_env(env)
        space, structured = emulate_observation_space(_gymnasium_space(env.observation_space))
        emulated = {"observation_dtype": space.dtype, "emulated_observation_dtype": structured}
        layout = Layout(space, _gymnasium_space(env.action_space), 1, emulated=True)
        driver = SimpleNamespace(
            single_observation_space=layout.observation_space,
            single_action_space=layout.action_space,
            num_agents=1,
            emulated=emulated,
            env=env,
        )
        super().__init__(driver, layout, num_envs, num_envs)
        self._buffers = layout.buffers(num_envs)
        self._buffers["masks"][:] = True
        flat = self._buffers["observations"]
        is_box = kind_of(env.observation_space) == "box"
        self._fields = flat if is_box else flat.view([("f0", structured)])["f0"][:, 0]
        self._infos: list[Info] = []

        @jax.jit
        def begin(keys: Any) -> tuple[Any, Any, Any]:
            keys = jax.vmap(jax.random.split)(keys)
            obs, state = jax.vmap(env.reset)(keys[:, 1])
            return keys[:, 0], state, obs

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        @jax.vmap
        def step(key: Any, state: Any, over: Any, action: Any) -> tuple[Any, ...]:
            key, step_key, reset_key = jax.random.split(key, 3)
            obs, new, reward, terminated, truncated, info = env.step(step_key, state, action)
            obs, new = jax.tree.map(
                lambda a, b: jnp.where(over, a, b), env.reset(reset_key), (obs, new)
            )
            ends = (terminated & ~over, truncated & ~over)
            return key, new, obs, jnp.where(over, 0, reward), *ends, info

        self._begin, self._step = begin, step
        self._seeded = jax.jit(jax.vmap(jax.random.key))
        self._keys, self._env_state = self._seeded(np.arange(seed, seed + num_envs)), None

    def _reset(self, seed: int | None) -> None:
        if seed is not None:
            self._keys = self._seeded(np.arange(seed, seed + self.num_agents))
        self._keys, self._env_state, obs = self._begin(self._keys)
        self._keep(obs, 0, False, False, {})

    def _send(self, actions: np.ndarray) -> None:
        over = self._buffers["terminals"] | self._buffers["truncations"]
        actions = actions.astype(self._action.base, copy=False)
        self._keys, self._env_state, *kept = self._step(self._keys, self._env_state, over, actions)
        self._keep(*kept)

    def _keep(self, obs: Any, reward: Any, terminated: Any, truncated: Any, info: Any) -> None:
        _fill(self._fields, obs)
        for name, value in zip(GIVEN[1:4], (reward, terminated, truncated), strict=True):
            self._buffers[name][:] = value
        self._infos = [{name: np.asarray(value) for name, value in info.items()}] if info else []

    def _recv(self) -> Received:
        obs, rewards, terminals, truncations, masks = (self._buffers[n] for n in GIVEN)
        return obs, rewards, terminals, truncations, self._infos, self.agent_ids, masks

    def _notify(self) -> None:
        """Pure functions have nobody to tell."""

    def _close(self) -> None:
        """Nor anything to close."""


def _gymnasium_space(space: Any) -> Any:
    """Gymnasium's, if the space is a leaf; a structured one is only looked at."""
    from gymnasium import spaces

    match kind_of(space):
        case "discrete":
            return spaces.Discrete(int(space.n))
        case "multidiscrete":
            return spaces.MultiDiscrete(np.asarray(space.nvec))
        case "box":
            low, high = (
                np.broadcast_to(np.asarray(bound, space.dtype), space.shape)
                for bound in (space.low, space.high)
            )
            return spaces.Box(low, high, dtype=space.dtype)
        case _:
            return space


def _fill(fields: np.ndarray, tree: Any) -> None:
    """Copy a tree of arrays into those of a structured dtype."""
    if isinstance(tree, dict | tuple):
        named = tree if isinstance(tree, dict) else {f"f{i}": x for i, x in enumerate(tree)}
        for name, value in named.items():
            _fill(fields[name], value)
    else:
        fields[...] = tree


BACKENDS: dict[str, Any] = {backend.__name__: backend for backend in (Serial, Multiprocessing, Ray)}

_OPTIONS = (
    *("num_workers", "batch_size", "zero_copy", "sync_traj", "overwork"),
    *("timeout", "restart_failed", "num_buffers", "local_worker"),
)


def make(
    env_creator_or_creators: Any,
    env_args: Any = None,
    env_kwargs: Any = None,
    backend: Any = Serial,
    num_envs: int = 1,
    seed: int = 0,
    **kwargs: Any,
) -> VecEnv:
    """Many environments as one (`pufferlib.vector.make`).

    Args:
        env_creator_or_creators: what makes an environment of gymnasium, PettingZoo or PufferLib
            (see `puffer_jax.workers.Maker`), or its name (`puffer_jax.environments.env_creator`);
            or a list of `num_envs` of these, and then of `env_args` and `env_kwargs`, too.
        env_args: positional arguments of the creator.
        env_kwargs: keyword arguments of the creator.
        backend: `Serial`, `Multiprocessing`, `Ray`, or the name of one.
        num_envs: how many environments.
        seed: environment i is made with `seed + i`.
        kwargs: num_workers and batch_size (None or "auto": chosen here, see `Multiprocessing`; an
            "auto" batch is half of the environments), zero_copy, sync_traj, overwork, timeout,
            local_worker (of Multiprocessing), and restart_failed: an environment that raises, and
            those of a worker that dies or hangs, are made anew, with other seeds; the step counts
            as truncated, and infos have {"restarts": how many}; what then fails before it has made
            a step is an error. `Serial` knows the last and its own num_buffers only; as in the
            reference, it makes no more than batch_size environments.

    Raises:
        ValueError: a number that is not possible, or numbers that do not go together.
        TypeError: something is of the wrong type, or there is no such option.
        ImportError: an extra is missing; the message has the line that installs it.
        WorkerError: an environment could not be made in its worker.
    """
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        backend = BACKENDS[backend]
    if not callable(backend):
        raise TypeError(f"backend must be a class such as Serial, or its name; got {backend!r}")
    if not isinstance(num_envs, int | np.integer) or num_envs < 1:
        raise ValueError(f"num_envs must be an integer of at least 1; got {num_envs!r}")
    for name in kwargs:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"no option {name!r}; {hint}There are: {', '.join(_OPTIONS)}")
    if "num_buffers" in kwargs and backend in (Multiprocessing, Ray):
        raise TypeError(f"num_buffers is Serial's; {backend.__name__} has batch_size")
    if "local_worker" in kwargs and backend in (Serial, Ray):
        raise TypeError(f"local_worker is Multiprocessing's; got the backend {backend.__name__}")
    if kwargs.get("num_workers") == "auto":
        kwargs["num_workers"] = None
    if kwargs.get("batch_size") == "auto":
        kwargs["batch_size"] = max(1, num_envs // 2)
    if backend is Serial:
        num_envs = kwargs.get("batch_size") or num_envs

    if isinstance(env_creator_or_creators, list | tuple):
        creators = env_creator_or_creators
        args = [()] * num_envs if env_args is None else env_args
        options = [{}] * num_envs if env_kwargs is None else env_kwargs
    else:
        creators = [env_creator_or_creators] * num_envs
        args = [() if env_args is None else env_args] * num_envs
        options = [{} if env_kwargs is None else env_kwargs] * num_envs
    for name, given in (("creators", creators), ("env_args", args), ("env_kwargs", options)):
        if not isinstance(given, list | tuple) or len(given) != num_envs:
            raise ValueError(
                f"{name} must be a list of num_envs ({num_envs}), as the creators are one; got "
                f"{given!r}"
            )
    for i, (creator, positional, named) in enumerate(zip(creators, args, options, strict=True)):
        if not (callable(creator) or isinstance(creator, str)):
            raise TypeError(f"creator {i} must be callable, or a name; got {creator!r}")
        if not isinstance(positional, list | tuple):
            raise TypeError(f"env_args of environment {i} must be a list; got {positional!r}")
        if not isinstance(named, dict):
            raise TypeError(f"env_kwargs of environment {i} must be a dict; got {named!r}")
    vecenv: Any = backend(creators, args, options, num_envs, seed=seed, **kwargs)
    return vecenv


def measure(vecenv: Any, seconds: float = 1.0, think: float = 0.0) -> float:
    """Steps of agents a second, of random actions.

    Args:
        vecenv: ours, the reference's, or a `gymnasium.vector.VectorEnv`. It is not closed.
        seconds: how long.
        think: seconds slept for each batch, as a policy on an accelerator would take.
    """
    vecenv.action_space.seed(0)
    actions = [vecenv.action_space.sample() for _ in range(16)]
    if hasattr(vecenv, "async_reset"):
        actions = [a.astype(np.int32) if a.dtype == np.int64 else a for a in actions]
        vecenv.async_reset(0)

        def step(action: Any) -> None:
            vecenv.recv()
            time.sleep(think) if think else None
            vecenv.send(action)
    else:
        vecenv.reset(seed=0)

        def step(action: Any) -> None:
            time.sleep(think) if think else None
            vecenv.step(action)

    batches = -max(8, 2 * vecenv.num_envs // len(actions[0]))  # that warm up
    began = time.perf_counter()
    while batches < 0 or time.perf_counter() - began < seconds:
        step(actions[batches % len(actions)])
        batches += 1
        if batches == 0:
            began = time.perf_counter()
    rate = batches * len(actions[0]) / (time.perf_counter() - began)
    if hasattr(vecenv, "async_reset"):
        vecenv.recv()
    return rate


def autotune(
    env_creator: Any,
    batch_size: int,
    max_envs: int | None = None,
    cores: int | None = None,
    think: float = 0.0,
    seconds: float = 1.0,
    **kwargs: Any,
) -> dict[str, Any]:
    """Find by trial what is fastest here, and print a table of what was tried.

    Tried are `Serial`, and `Multiprocessing`, with and without a local worker, with one batch of
    environments and with several, of which the others step while one is acted on.

    Args:
        env_creator: see `make`.
        batch_size: how many environments act at once.
        max_envs: in all; by default, twice `batch_size`.
        cores: the most workers; by default, one for each core.
        think: seconds that acting on a batch takes.
        seconds: of each trial.
        kwargs: others of `make`'s.

    Returns:
        Arguments of `make`: `make(env_creator, **autotune(env_creator, 8))`.

    Raises:
        ValueError: `batch_size` is not within 1 and `max_envs`.
    """
    from rich.console import Console
    from rich.table import Table

    max_envs = 2 * batch_size if max_envs is None else max_envs
    if not 1 <= batch_size <= max_envs:
        raise ValueError(f"batch_size must be 1 .. max_envs ({max_envs}); got {batch_size}")
    cores = _cores() if cores is None else cores
    trials: list[dict[str, Any]] = [{"backend": Serial, "num_envs": batch_size}]
    for num_envs in range(batch_size, max_envs + 1, batch_size):
        for num_workers in range(1, min(cores, num_envs) + 1):
            trial: dict[str, Any] = {
                "backend": Multiprocessing,
                "num_envs": num_envs,
                "num_workers": num_workers,
                "batch_size": batch_size,
                "overwork": num_workers > _cores(),
            }
            if not num_envs % num_workers and not batch_size % (num_envs // num_workers):
                trials.append(trial)
            if 1 < num_workers <= batch_size:
                trials.append(trial | {"local_worker": True})
    rates = []
    for trial in trials:
        with make(env_creator, **trial, **kwargs) as vecenv:
            rates.append(measure(vecenv, seconds, think))
    best = int(np.argmax(rates))
    table = Table(title=f"batches of {batch_size} environments, {1000 * think:g} ms to act on one")
    for name in ("backend", "num_envs", "num_workers", "steps/s", ""):
        table.add_column(name, justify="left" if name == "backend" else "right")
    for i, (trial, rate) in enumerate(zip(trials, rates, strict=True)):
        cells = (trial["num_envs"], trial.get("num_workers", ""), f"{rate:,.0f}")
        name = trial["backend"].__name__ + ", local_worker" * ("local_worker" in trial)
        table.add_row(name, *map(str, cells), "<" if i == best else "")
    Console().print(table)
    return trials[best]


def _cores() -> int:
    """How many this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
