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
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from typing import IO, Any, NamedTuple

import numpy as np

from puffer_jax.base.packages import require
from puffer_jax.vector.envs import WRITTEN, Envs, Info, Order

_DONE, _INFOS, _ERROR = b".", b"i", b"!"

_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from puffer_jax.vector.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
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


class Process:
    """The parent's end of a worker process.

    The worker's death closes the channel, which wakes the parent; the parent's death, however it
    comes, closes the worker's standard input, which ends the worker (`main`).

    Args:
        memory: file descriptor of the block to share.
    """

    def __init__(self, memory: int):
        ours, theirs = socket.socketpair()
        with theirs:
            channel = theirs.fileno()
            # A process group of its own: Ctrl-C is for the parent, and killing the worker also
            # kills what its environments started.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(channel), str(memory)],
                stdin=subprocess.PIPE,
                pass_fds=(channel, memory),
                process_group=0,
                env=_SINGLE | os.environ | {"JAX_PLATFORMS": "cpu"},
            )
        self._connection = Connection(ours.detach())
        self.fd = self._connection.fileno()
        self.pid = self._process.pid

    def order(self, order: bytes, share: int = 0, argument: bytes = b"") -> None:
        """Send an order for a share; a dead worker gets none, and `reply` reports its death."""
        if self._connection.closed:
            return
        try:
            os.write(self.fd, order + share.to_bytes(2))
            if argument:
                self._connection.send_bytes(argument)
        except ConnectionError:
            pass

    def reply(self) -> list[Info] | Failure:
        """Read the reply that has come; for a dead worker, how it died."""
        try:
            reply = os.read(self.fd, 1)
            if reply == _DONE:
                return []
            if reply:
                told = self._connection.recv()
                return told if reply == _INFOS else Failure(told, lost=False)
        except (ConnectionError, EOFError):
            pass
        self.join(time.monotonic() + 1)  # the channel closes a little before the process ends
        code = self._process.returncode
        if code >= 0:
            return Failure(f"exited with status {code}", lost=True)
        return Failure(f"was killed by signal {-code} ({signal.strsignal(-code)})", lost=True)

    def join(self, deadline: float) -> None:
        """Wait until `time.monotonic()` is `deadline` for it to end, then kill it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End it and the processes it started."""
        if self._connection.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._connection.close()


def boot(payload: bytes, memory: mmap.mmap | None = None) -> Envs:
    """Make the environments of `pack((makers, layout, agents, rows, options))`.

    Their buffers are `rows` of those of all `agents`, in `memory` or in new memory; `options` are
    the other arguments of `Envs`.
    """
    makers, layout, agents, rows, options = pickle.loads(payload)
    buf = {name: array[rows] for name, array in layout.buffers(agents, memory).items()}
    return Envs(makers, layout, buf, **options)


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
        self, order: bytes, argument: int | np.ndarray | None
    ) -> tuple[list[Info] | Failure, dict[str, np.ndarray]]:
        """Carry out an order; STEP's argument is its actions. Returns infos and the buffers."""
        if self._failure is not None:
            return self._failure, {}
        try:
            if order == Order.STEP:
                self._envs.buf["actions"][:] = argument
            infos = self._envs.obey(order, argument)
        except Exception as error:
            return Failure(_told(error), lost=False), {}
        return infos, {name: self._envs.buf[name] for name in WRITTEN}


def main(channel: int, memory: int) -> None:
    """A worker process: carry out the orders that come from a socket, and sleep between them.

    Args:
        channel: file descriptor of the socket.
        memory: file descriptor of the block that holds the buffers.
    """
    import fcntl

    # The parent holds the other end of standard input and never writes. When it dies, the kernel
    # sends SIGIO, which ends this process even while an environment hangs.
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    connection = Connection(channel)
    with contextlib.suppress(ConnectionError, EOFError):
        _serve(connection, memory)


def _serve(connection: Connection, memory: int) -> None:
    channel = connection.fileno()
    shares: dict[int, Envs] = {}
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while True:
        wait(poll)
        told, argument = os.read(channel, 3), None
        if not told:
            return
        order, share = told[:1], int.from_bytes(told[1:])
        try:
            if order == Order.START:
                shares[share] = boot(connection.recv_bytes(), mmap.mmap(memory, 0))
                continue
            if order == Order.RESET:
                argument = connection.recv()
            if order == Order.CLOSE:
                with contextlib.ExitStack() as stack:
                    for envs in shares.values():
                        stack.callback(envs.close)
                return
            infos = shares[share].obey(order, argument)
            reply = pickle.dumps(infos) if infos else b""
        except Exception as error:
            os.write(channel, _ERROR)
            connection.send(_told(error))
            return
        if order == Order.NOTIFY:
            continue
        os.write(channel, _INFOS if reply else _DONE)
        if reply:
            connection.send_bytes(reply)


def _told(error: Exception) -> str:
    what = (getattr(error, "__notes__", None) or [""])[0].strip("()")
    return (
        f"failed {what}: {type(error).__name__}: {error}\n\n"
        + "".join(traceback.format_exception(error)).rstrip()
    )
