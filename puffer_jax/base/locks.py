"""One process at a time may write to a folder."""

import atexit
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from puffer_jax.base.files import is_at

_NAME = ".writer"

# The system frees a lock when its process ends, however that happens.
_claims: dict[Path, IO[bytes]] = {}


def claim(folder: Path) -> None:
    """Keep other processes from claiming the folder until `release`, or this process's end.

    Claiming it twice is claiming it once. Where the file system has no locks, nothing is kept.

    Raises:
        RuntimeError: another process has it.
        OSError: the folder cannot be written to.
    """
    folder = folder.resolve()
    path = folder / _NAME
    if folder in _claims and is_at(_claims[folder], path):
        return
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = file.read().decode(errors="replace")
            file.close()
            raise RuntimeError(
                f"another process writes to {folder} ({who or 'just starting'}); one at a time, or "
                "they delete each other's checkpoints. Stop it, or give this run another name"
            ) from error
        except OSError:
            pass
        # Its last owner may have removed it in between.
        if is_at(file, path):
            break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    _claims[folder] = file


def release(folder: Path) -> None:
    """Let others claim the folder."""
    folder = folder.resolve()
    file = _claims.pop(folder, None)
    if file is not None:
        with file:
            if is_at(file, folder / _NAME):
                (folder / _NAME).unlink()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """`claim` and `release`, unless this process has it already."""
    before = folder.resolve() in _claims
    claim(folder)
    try:
        yield
    finally:
        if not before:
            release(folder)


def _forget() -> None:
    """A forked child has no claims, and must not keep its parent's alive."""
    while _claims:
        _claims.popitem()[1].close()


def _release_all() -> None:
    for folder in list(_claims):
        release(folder)


os.register_at_fork(after_in_child=_forget)
atexit.register(_release_all)
