"""Files that appear whole or not at all."""

import fcntl
import glob
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO

Write = Callable[[IO[bytes]], object]
"""What puts a file's content into an open file."""


def write_atomically(path: Path, write: Write) -> None:
    """Replace `path` by what `write` puts into a file, or leave it untouched.

    A process killed meanwhile may leave a file `.<name>.<random>.tmp` beside it, which the next
    write of the same file removes.
    """
    write_together({path: write})


def write_together(files: Mapping[Path, Write]) -> None:
    """As `write_atomically`, several files: none is replaced before all are written.

    They are replaced in the given order; a process killed meanwhile leaves the first ones new.
    """
    with ExitStack() as stack:
        written = {path: _written(path, write, stack) for path, write in files.items()}
        for path, temporary in written.items():
            os.replace(temporary, path)
        for folder in dict.fromkeys(path.parent for path in files):
            sync(folder)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` a folder and all that is in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _written(path: Path, write: Write, stack: ExitStack) -> Path:
    """A temporary file beside `path` with the content; gone with the stack unless renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    file, temporary = _create(path)
    # Closed after the renaming, since the lock says that its writer lives.
    stack.enter_context(file)
    stack.callback(temporary.unlink, missing_ok=True)
    write(file)
    file.flush()
    os.fsync(file.fileno())
    return temporary


def _create(path: Path) -> tuple[IO[bytes], Path]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        # "x": never through somebody else's file or link.
        file = open(temporary, "xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # just now swept by somebody else
        except OSError:
            return file, temporary  # a file system without locks, on which nobody sweeps
        if is_at(file, temporary):
            return file, temporary
        file.close()


def _sweep(path: Path) -> None:
    """Remove the temporary files of writers of `path` that died."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        try:
            with open(temporary, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
        except OSError:
            pass  # its writer lives, or somebody else was faster


def check_writable(folder: Path) -> None:
    """Find out early whether a folder, which need not exist yet, can be written to.

    Raises:
        NotADirectoryError: it, or what it would lie in, is not a folder.
        PermissionError: nothing can be written there.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {folder}: {nearest} is not writable")
