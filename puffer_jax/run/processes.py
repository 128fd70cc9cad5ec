"""Several processes that train one policy: how they find each other, agree, and end together.

JAX connects them, and its coordination service, a store of keys and values, is all that is used
here: for numbers that all must know (`exchange`), and for the last words of a process that fails
(`together`), which otherwise the others would wait for.
"""

import atexit
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from puffer_jax.base import checksums
from puffer_jax.base.text import Json, from_json

# Seconds between two signs of life; how long silence means death, once a collective has failed; how
# long where nothing has, since Python may be busy; and how long a process may take to end by itself
# when another one has failed.
_BEAT, _SILENCE, _PATIENCE, _GRACE = 1.0, 10.0, 20.0, 10.0

# After so many seconds without one of JAX's own signs of life, JAX ends the other processes. There
# are two in that time, so it may be half as long after a death: enough to name who is gone.
HEARTBEAT_TIMEOUT = 56

_SPACE = "puffer_jax"


class ProcessLostError(RuntimeError):
    """Another process of this training has failed or is gone; the message names it."""


@dataclass
class _Member:
    """This process among the others.

    Attributes:
        client: the coordination service's client.
        index: which process this is.
        count: how many there are.
        ending: why this process cannot go on, as the others are told; None: it can.
        arguments: what `initialize` was called with.
        rounds: the number of the next `exchange`.
    """

    client: Any
    index: int
    count: int
    arguments: tuple[Any, ...]
    ending: str | None = None
    rounds: Iterator[int] = field(default_factory=itertools.count)

    def name(self, index: int) -> str:
        """A process by its number, host and process id."""
        where = ""
        with suppress(jax.errors.JaxRuntimeError):  # process 0 is gone
            where = _entries(self, "where").get(index, "")
        return f"process {index} of {self.count}{f' ({where})' if where else ''}"


_me: _Member | None = None


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: int | Sequence[int] | None = None,
    cluster_detection_method: str | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout_seconds: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Join the processes that train together; before anything is computed with JAX.

    It is `jax.distributed.initialize`, which knows SLURM, Open MPI, TPU pods, Kubernetes and others
    without an argument; CPUs talk through gloo. Where a launcher has called that already, this
    takes over what it made. A second call with the same arguments does nothing.

    From then on a process that fails tells the others, whose `PuffeRL` raises `ProcessLostError`
    with its last words. One that is killed or unplugged is named by that error, or, where a
    collective only hangs, by JAX's own, which ends the process after `heartbeat_timeout_seconds`.

    Args:
        coordinator_address: HOST:PORT of process 0, reachable from all; None: from the launcher.
        num_processes: how many processes there are; None: from the launcher.
        process_id: which one this is, from 0; None: from the launcher.
        local_device_ids: the devices that this process uses; None: see JAX.
        cluster_detection_method: see `jax.distributed.initialize`.
        initialization_timeout: how many seconds to wait for all others.
        heartbeat_timeout_seconds: how many seconds without a sign of life JAX takes for death.

    Raises:
        ValueError: the arguments do not fit together, or no launcher was found and they are
            missing.
        RuntimeError: it is too late, since something has been computed, or an earlier call had
            other arguments; or the others did not come in time.

    Example:
        >>> from puffer_jax import distributed
        >>> distributed.initialize("127.0.0.1:7654", 2, 0)  # doctest: +SKIP
    """
    global _me
    given = (coordinator_address, num_processes, process_id, local_device_ids)
    if _me is not None:
        if given not in (_me.arguments, (None,) * 4):
            raise RuntimeError(
                f"this process is process {_me.index} of {_me.count} already, by "
                f"initialize{_me.arguments}; it cannot join others by initialize{given}"
            )
        return
    _check_arguments(coordinator_address, num_processes, process_id)
    if not jax.distributed.is_initialized():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                local_device_ids,
                cluster_detection_method,
                initialization_timeout,
                heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            )
        except ValueError as error:
            raise ValueError(
                "JAX found no launcher that it knows (SLURM, Open MPI, a TPU pod, Kubernetes): "
                f"give coordinator_address, num_processes and process_id. (It said: {error})"
            ) from error
    from jax._src import distributed  # JAX has no other way to the store

    state = distributed.global_state
    _me = _Member(state.client, state.process_id, state.num_processes, given)
    where = f"{socket.gethostname()}, process id {os.getpid()}"
    _me.client.key_value_set(f"{_SPACE}/where/{_me.index}", where, True)
    _me.client.key_value_set(f"{_SPACE}/alive/{_me.index}", "0", True)
    threading.Thread(target=_live, args=(_me,), daemon=True, name="puffer_jax processes").start()
    atexit.register(_leave, _me)  # before what JAX registered, which waits for all others


def _check_arguments(address: str | None, count: int | None, index: int | None) -> None:
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator_address must be HOST:PORT; got {address!r}")
    if count is not None and count < 1:
        raise ValueError(f"num_processes must be at least 1; got {count}")
    if index is not None and not 0 <= index < (count or index + 1):
        most = "" if count is None else f" and below num_processes, {count}"
        raise ValueError(f"process_id must be at least 0{most}; got {index}")


def index() -> int:
    """Which process this is; 0 where there is but one."""
    return 0 if _me is None else _me.index


def count() -> int:
    """How many processes there are."""
    return 1 if _me is None else _me.count


def exchange(value: Json) -> list[Json]:
    """What all processes call it with, by process; it waits for all of them.

    For small things, once an epoch: they go through process 0's memory as text.

    Raises:
        ProcessLostError: another process has failed meanwhile.
    """
    if _me is None or _me.count == 1:
        return [value]
    if _me.ending is not None:
        raise ProcessLostError(_me.ending)
    number = next(_me.rounds)
    _me.client.key_value_set(f"{_SPACE}/exchange/{number}/{_me.index}", json.dumps(value))
    texts = [_awaited(_me, f"{_SPACE}/exchange/{number}/{i}") for i in range(_me.count)]
    if number:
        # All have come this far, so all have read what was exchanged before.
        _me.client.key_value_delete(f"{_SPACE}/exchange/{number - 1}/{_me.index}")
    return [from_json(text) for text in texts]


def check_mesh(mesh: Mesh | None) -> None:
    """Whether all processes have devices of a mesh; one that JAX connects by itself joins now.

    Raises:
        ValueError: some have none, and would wait for ever, or train a run of their own.
    """
    if jax.distributed.is_initialized():
        initialize()
    there = set() if mesh is None else {device.process_index for device in mesh.devices.flat}
    if count() > 1 and len(there) < count():
        given = "there is no mesh" if mesh is None else f"the mesh is on {sorted(there)}"
        raise ValueError(
            f"{count()} processes train one policy on devices of all of them, so each must be "
            f"given mesh=puffer_jax.mesh(); {given}"
        )


def check_same(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare what must be the same in all processes, by a hash of each part.

    Args:
        parts: by the part's name, texts or numbers by theirs: {"config": {"gamma": 0.99}}.

    Raises:
        ValueError: a process differs from process 0; in all processes the same message, which names
            the process, the part and what differs in it.
        ProcessLostError: another process has failed meanwhile.
    """
    plain = from_json(json.dumps(parts, default=str))
    hashes = exchange({name: checksums.of_json(part) for name, part in plain.items()})
    different = [i for i, found in enumerate(hashes) if found != hashes[0]]
    if not different:
        return
    contents = exchange(plain)
    other = different[0]
    lines = []
    for part in sorted(contents[0].keys() | contents[other].keys()):
        first: dict[str, Json] = contents[0].get(part, {})
        second: dict[str, Json] = contents[other].get(part, {})
        names = sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))
        shown = ", ".join(f"{n} ({second.get(n)!r}, not {first.get(n)!r})" for n in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines += [f"{part}: {shown}{more}"] if names else []
    assert _me is not None  # alone, it is the same
    raise ValueError(f"{_me.name(other)} is not the same as process 0 in {'; '.join(lines)}")


@contextmanager
def together() -> Iterator[None]:
    """What all processes do; if this one fails, the others are told, and end.

    Raises:
        ProcessLostError: a computation failed because another process did, or is gone.
    """
    try:
        yield
    except ProcessLostError:
        raise
    except BaseException as error:
        if _me is None or _me.count == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and (reason := _who_is_lost(_me)):
            raise _lost(_me, reason) from error
        fail(error)
        raise


def fail(error: BaseException) -> None:
    """Tell the others that this process cannot go on."""
    if _me is not None and _me.count > 1:
        _tell(_me, f"{type(error).__name__}: {error}")


def _entries(me: _Member, kind: str) -> dict[int, str]:
    """What the processes have put under a name."""
    found = me.client.key_value_dir_get(f"{_SPACE}/{kind}/")
    return {int(key.rpartition("/")[2]): value for key, value in found}


class _Watch:
    """Which processes give signs of life, since it was made."""

    def __init__(self, me: _Member):
        self._me = me
        self._beats: dict[int, str] = {}
        self._since: dict[int, float] = {}

    def silent(self, seconds: float) -> list[int]:
        """Who has given none for so long."""
        now, found = time.monotonic(), _entries(self._me, "alive")
        self._since |= {i: now for i, beat in found.items() if self._beats.get(i) != beat}
        self._beats = found
        since = self._since.items()
        return [i for i, last in since if i != self._me.index and now - last > seconds]

    def lost(self, seconds: float) -> str | None:
        """The first of them, in words."""
        for i in self.silent(seconds):
            return f"{self._me.name(i)} is gone: no sign of life from it for {seconds:.0f} s"
        return None


def _awaited(me: _Member, key: str) -> str:
    """A value, once it is there; however long that takes, while all processes live."""
    watch = _Watch(me)
    while True:
        try:
            return me.client.blocking_key_value_get(key, round(1000 * _BEAT))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if reason := _last_words(me) or watch.lost(_PATIENCE):
            raise _lost(me, reason)


def _last_words(me: _Member) -> str | None:
    """What another process that failed has said."""
    words = {i: text for i, text in _entries(me, "failed").items() if i != me.index}
    return words[min(words)] if words else None


def _who_is_lost(me: _Member) -> str | None:
    """Who failed or is gone, after a collective failed; None: everybody seems to live."""
    watch, end = _Watch(me), time.monotonic() + 2 * _SILENCE
    while time.monotonic() < end:
        try:
            if reason := _last_words(me) or watch.lost(_SILENCE):
                return reason
        except jax.errors.JaxRuntimeError:
            return f"{me.name(0)} is gone: its coordination service does not answer"
        time.sleep(_BEAT / 4)
    return None


def _lost(me: _Member, reason: str) -> ProcessLostError:
    _tell(me, reason, whole=True)
    return ProcessLostError(
        f"{reason}. Start all processes again: the run goes on from its last checkpoint"
    )


def _tell(me: _Member, reason: str, whole: bool = False) -> None:
    if me.ending is None:
        me.ending = reason if whole else f"{me.name(me.index)} failed with {reason[:500]}"
        with suppress(jax.errors.JaxRuntimeError):
            me.client.key_value_set(f"{_SPACE}/failed/{me.index}", me.ending, True)


def _live(me: _Member) -> None:
    """Give signs of life; end this process if it waits for one that has failed."""
    for beat in itertools.count(1):
        time.sleep(_BEAT)
        try:
            me.client.key_value_set(f"{_SPACE}/alive/{me.index}", str(beat), True)
            reason = _last_words(me)
        except Exception:
            return  # shut down, or process 0 is gone, which JAX says
        if reason is None:
            continue
        # If it waits in a collective that does not fail, nothing in Python can end it.
        time.sleep(_GRACE)
        if me.ending is None:
            print(f"puffer_jax: {_lost(me, reason)}", file=sys.stderr, flush=True)
            os._exit(1)
        return


def _leave(me: _Member) -> None:
    """At the end of this process: if it failed, without waiting for the others as JAX would."""
    error = getattr(sys, "last_value", None)
    if error is not None:
        fail(error)
    if me.ending is None:
        return
    # With process 0 goes the store, where the others read why.
    watch, end = _Watch(me), time.monotonic() + (_GRACE + 2 * _BEAT if me.index == 0 else 0)
    with suppress(jax.errors.JaxRuntimeError):
        while time.monotonic() < end:
            if len(_entries(me, "failed").keys() | watch.silent(3 * _BEAT)) >= me.count:
                break
            time.sleep(_BEAT / 4)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
