"""Some of a vecenv's environments: built, stepped and, in a process of their own, served.

`Envs` is the loop over environments that every backend of `puffer_jax.vector` runs: `Serial` in
this process, `Multiprocessing` in a `Process`, `Ray` in a `RayWorker`. A process is a fresh
interpreter, not a fork, since JAX is threaded: it loads neither JAX nor torch nor the user's
script, and shares one anonymous block of memory with its parent, so there is no name to clean up.
"""

import contextlib
import json
import math
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from puffer_jax.base.packages import require
from puffer_jax.vector.envs import WRITTEN, Envs, Order, Told

_INFOS, _ERROR = b"i", b"!"

# Before an argument: which order, for which share, and its size; before a reply: which, and size.
_ORDER, _REPLY = struct.Struct("!cHQ"), struct.Struct("!cQ")
_NOTHING = _REPLY.pack(_INFOS, 0)

# Bytes that are sent or received at a time: of what is known to be large, and at first.
_CHUNK, _SMALL = 1 << 18, 1 << 12

_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from puffer_jax.vector.worker import main; main(*map(int, sys.argv[2:]))"
)

# Seconds to poll before sleeping: waking a core takes up to 0.1 ms, as long as many steps.
_AWAKE = 1e-3

# One process per core, so no thread pools inside one.
_SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def wait(poll: Any, timeout: float | None = None) -> list[tuple[int, int]]:
    """`poll.poll`, awake at first, but yielding the core to whoever needs it.

    Args:
        poll: a `select.poll` object.
        timeout: in seconds; None: no limit.
    """
    until = time.perf_counter() + (_AWAKE if timeout is None else min(timeout, _AWAKE))
    while not (ready := poll.poll(0)) and time.perf_counter() < until:
        os.sched_yield()
    return ready or poll.poll(None if timeout is None else math.ceil(timeout * 1000))


class Failure(NamedTuple):
    """What became of a worker's order.

    Attributes:
        reason: the predicate of a sentence and, for an exception, the traceback.
        lost: whether the worker is gone.
    """

    reason: str
    lost: bool


def pack(value: object) -> bytes:
    """`value` as cloudpickle writes it, which takes lambdas and what the user's script defines.

    Raises:
        ImportError: cloudpickle is not installed.
    """
    return require("cloudpickle", "a worker", "'puffer_jax[vector]'").dumps(value)


class Memory:
    """A block of memory without a name, so that nothing is left behind, whichever process dies.

    Args:
        size: number of bytes.

    Attributes:
        fd: file descriptor that worker processes inherit.
        map: the block of memory.
    """

    def __init__(self, size: int):
        if hasattr(os, "memfd_create"):
            self._file: IO[bytes] = open(os.memfd_create("puffer_jax"), "r+b")
        else:
            self._file = tempfile.TemporaryFile()
        self._file.truncate(size)
        self.fd = self._file.fileno()
        self.map = mmap.mmap(self.fd, size)

    def close(self) -> None:
        """Let go of the file; arrays in `map` stay valid."""
        self._file.close()


# What belongs to one process alone: if a fork held it, nobody would notice that the process has
# ended.
_own: weakref.WeakSet[Any] = weakref.WeakSet()


def _let_go() -> None:
    for each in list(_own):
        each.close()


os.register_at_fork(after_in_child=_let_go)


class _Death:
    """What wakes a `select.poll` when another process ends, whoever holds its files.

    Args:
        pid: its id.

    Attributes:
        fd: a file descriptor that is readable from then on; None: this system has none.
    """

    def __init__(self, pid: int):
        self.fd: int | None = None
        with contextlib.suppress(AttributeError, OSError):  # not Linux, an old one, forbidden
            self.fd = os.pidfd_open(pid)

    def close(self) -> None:
        """Watch no longer."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Process:
    """The parent's end of a worker process.

    Nothing here waits for the worker: what it does not take yet is kept, what has not come whole is
    not told yet, and `fds` say when to look again. So whoever polls them keeps its deadlines.

    The worker's death wakes the parent; the parent's, however it comes, closes the lifeline, which
    ends the worker (`main`). Both even if the one that died had forked.

    Args:
        memory: file descriptor of the block to share.
    """

    def __init__(self, memory: int):
        self._channel, theirs = socket.socketpair()
        _own.add(self._channel)
        held, lifeline = os.pipe()
        self._lifeline = open(lifeline, "wb", buffering=0)
        _own.add(self._lifeline)
        with theirs, open(held, "rb", buffering=0):
            theirs.setblocking(True)
            numbers = theirs.fileno(), memory, held, os.getpid()
            # A process group of its own: Ctrl-C is for the parent, and killing the worker also
            # kills what its environments started.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                pass_fds=numbers[:3],
                process_group=0,
                env=_SINGLE | os.environ | {"JAX_PLATFORMS": "cpu"},
            )
        self._channel.setblocking(False)
        self.pid = self._process.pid
        self._death = _Death(self.pid)
        self._outbox, self._inbox = bytearray(), bytearray()

    @property
    def behind(self) -> bool:
        """Whether the worker has not taken all its orders."""
        return bool(self._outbox)

    def fds(self) -> dict[int, int]:
        """What to poll for, by file descriptor."""
        if self._channel.fileno() < 0:
            return {}
        fds = {self._channel.fileno(): select.POLLIN | select.POLLOUT * self.behind}
        return fds if self._death.fd is None else fds | {self._death.fd: select.POLLIN}

    def order(self, order: bytes, share: int = 0, argument: bytes = b"") -> None:
        """Send an order for a share; a dead worker gets none, and `replies` reports its death."""
        message = _ORDER.pack(order, share, len(argument)) + argument
        if not self._outbox and len(message) < _SMALL:  # as almost always
            try:
                message = message[self._channel.send(message) :]
            except BlockingIOError:
                pass
            except OSError:  # it is dead, or has been ended
                return
            if not message:
                return
        self._outbox += message
        self.push()

    def dismiss(self) -> None:
        """Tell it to close its environments and end, and read no more of what it says."""
        self.order(Order.CLOSE)
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RD)

    def push(self) -> None:
        """Send what the worker takes of the orders that it has not taken yet."""
        try:
            while self._outbox:
                with memoryview(self._outbox) as view:
                    sent = self._channel.send(view[:_CHUNK])
                del self._outbox[:sent]
        except BlockingIOError:
            pass
        except OSError:  # it is dead, or has been ended
            self._outbox.clear()

    def replies(self, fds: Sequence[int]) -> list[Told | Failure]:
        """The replies that have come whole; of a dead worker, at last, how it died.

        Args:
            fds: those of `fds` that were ready.
        """
        try:
            # To make room for a large reply takes longer than a step, and most are a few bytes.
            chunk = self._channel.recv(_CHUNK if self._inbox else _SMALL)
        except BlockingIOError:
            if self._death.fd not in fds:
                return []
            chunk = b""
        except ConnectionError:
            chunk = b""
        if not chunk:
            return [self._died()]
        if chunk == _NOTHING and not self._inbox:  # as almost always
            return [Told([], [])]
        self._inbox += chunk
        replies: list[Told | Failure] = []
        while len(self._inbox) >= _REPLY.size:
            kind, size = _REPLY.unpack_from(self._inbox)
            end = _REPLY.size + size
            if len(self._inbox) < end:
                break
            told = bytes(self._inbox[_REPLY.size : end])
            failed = kind == _ERROR
            replies.append(Failure(told.decode(), lost=False) if failed else read_told(told))
            del self._inbox[:end]
        return replies

    def _died(self) -> Failure:
        self.join(time.monotonic() + 1)  # the channel closes a little before the process ends
        code = self._process.returncode
        if code >= 0:
            return Failure(f"exited with status {code}", lost=True)
        return Failure(f"was killed by signal {-code} ({signal.strsignal(-code)})", lost=True)

    def join(self, deadline: float) -> None:
        """Wait until `time.monotonic()` is `deadline` for it to end, then kill it."""
        with contextlib.suppress(OSError):  # it does not take the rest of its orders
            self._channel.settimeout(max(1e-3, deadline - time.monotonic()))
            self._channel.sendall(self._outbox)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End it and the processes it started."""
        if self._channel.fileno() < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for each in (self._channel, self._lifeline, self._death):
            each.close()


def boot(payload: bytes, memory: mmap.mmap | None = None) -> Envs:
    """Make the environments of `pack((makers, layout, agents, rows, options))`.

    Their buffers are `rows` of those of all `agents`, in `memory` or in new memory; `options` are
    the other arguments of `Envs`.
    """
    makers, layout, agents, rows, options = pickle.loads(payload)
    buf = {name: array[rows] for name, array in layout.buffers(agents, memory).items()}
    return Envs(makers, layout, buf, **options)


def packed(told: Told, results: bool = False) -> bytes:
    """What came of an order, as it is sent; nothing if there is nothing to tell.

    Args:
        told: what came of it.
        results: whether these are results of APPLY: one that cannot be pickled becomes an error.

    Raises:
        Exception: an info cannot be pickled; a note names the environment and the key.
    """
    if not told.infos:
        return b""
    try:
        return pickle.dumps(tuple(told))
    except Exception:
        with contextlib.suppress(Exception):  # lambdas, and what the user's script defines
            return pack(tuple(told))
    if results:
        return pack(([*map(_packable, *told)], told.sources))
    for info, i in zip(*told, strict=True):
        if found := _unpackable(info, "info"):
            path, error = found
            error.add_note(f"(sending {path} of environment {i}, which cannot be pickled)")
            raise error
    raise ValueError("infos cannot be pickled together, though each can by itself")


def _packable(result: tuple[bool, object], source: int) -> tuple[bool, object]:
    try:
        pack(result)
    except Exception as error:
        kind = type(result[1]).__name__
        return False, TypeError(
            f"environment {source} is in another process, and the result there, a {kind}, cannot "
            f"be sent, since it cannot be pickled ({error})"
        )
    return result


def _unpackable(value: object, path: str) -> tuple[str, Exception] | None:
    try:
        pack(value)
    except Exception as error:
        inner = value.items() if isinstance(value, Mapping) else ()
        found = (_unpackable(each, f"{path}[{key!r}]") for key, each in inner)
        return next(filter(None, found), (path, error))
    return None


def read_told(sent: bytes) -> Told | Failure:
    """What `packed` packed; a failure if that cannot be read here."""
    try:
        return Told(*pickle.loads(sent)) if sent else Told([], [])
    except Exception as error:
        error.add_note("(sending infos, which its parent could not unpickle)")
        return Failure(_told(error), lost=False)


class RayWorker:
    """A worker process on some node of a Ray cluster.

    Args:
        path: folders in which the parent finds modules.
        payload: see `boot`.
    """

    def __init__(self, path: list[str], payload: bytes):
        sys.path += [folder for folder in path if folder not in sys.path]
        self._failure: Failure | None = None
        try:
            self._envs = boot(payload)
        except Exception as error:
            self._failure = Failure(_told(error), lost=False)

    def obey(
        self, order: bytes, argument: int | bytes | np.ndarray | None
    ) -> tuple[bytes | Failure, dict[str, np.ndarray]]:
        """Carry out an order; STEP's argument is its actions. Returns what is told, and buffers."""
        if self._failure is not None:
            return self._failure, {}
        try:
            if order == Order.STEP:
                self._envs.buf["actions"][:] = argument
            told = packed(self._envs.obey(order, argument), order == Order.APPLY)
        except Exception as error:
            return Failure(_told(error), lost=False), {}
        return told, {name: self._envs.buf[name] for name in WRITTEN}


def main(channel: int, memory: int, lifeline: int, parent: int) -> None:
    """A worker process: carry out the orders that come from a socket, and sleep between them.

    Args:
        channel: file descriptor of the socket.
        memory: file descriptor of the block that holds the buffers.
        lifeline: file descriptor of a pipe that the parent holds the other end of.
        parent: the parent's process id.
    """
    import fcntl

    # When the lifeline's other end closes, the kernel sends SIGIO, which ends this process, even
    # while an environment hangs, and what its environments started.
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    # A fork that knows nothing of `_own` may hold the other end; so, when idle, watch the parent.
    death = _Death(parent)
    if os.getppid() != parent:  # it died before anybody watched
        return
    with socket.socket(fileno=channel) as own, contextlib.suppress(ConnectionError, EOFError):
        _own.add(own)
        _serve(own, memory, death)


def _serve(channel: socket.socket, memory: int, death: _Death) -> None:
    shares: dict[int, Envs] = {}
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    if death.fd is not None:
        poll.register(death.fd, select.POLLIN)
    while True:
        for fd, _ in wait(poll):
            if fd == death.fd:
                return
        order, share, size = _ORDER.unpack(_received(channel, _ORDER.size))
        argument = _received(channel, size)
        try:
            if order == Order.START:
                shares[share] = boot(argument, mmap.mmap(memory, 0))
                continue
            if order == Order.CLOSE:
                _close(shares)
                return
            value = pickle.loads(argument) if order == Order.RESET else argument
            reply = packed(shares[share].obey(order, value), order == Order.APPLY)
        except Exception as error:
            told = _told(error).encode(errors="backslashreplace")
            channel.sendall(_REPLY.pack(_ERROR, len(told)) + told)
            return
        if order != Order.NOTIFY:
            try:
                channel.sendall(_REPLY.pack(_INFOS, len(reply)) + reply)
            except ConnectionError:  # dismissed
                _close(shares)
                return


def _close(shares: dict[int, Envs]) -> None:
    with contextlib.ExitStack() as stack:
        for envs in shares.values():
            stack.callback(envs.close)


def _received(channel: socket.socket, size: int) -> bytes:
    received = channel.recv(size) if 0 < size < _SMALL else b""
    if len(received) == size:
        return received
    received = bytearray(received)
    while len(received) < size:
        chunk = channel.recv(min(_CHUNK, size - len(received)))
        if not chunk:
            raise EOFError
        received += chunk
    return bytes(received)


def _told(error: Exception) -> str:
    what = (getattr(error, "__notes__", None) or [""])[0].strip("()")
    return (
        f"failed {what}: {type(error).__name__}: {error}\n\n"
        + "".join(traceback.format_exception(error)).rstrip()
    )
