"""The library of CPU kernels as a file: compiled where it runs, kept in the user's cache.

What lies in the cache is loaded only if it is what was once compiled, and if nobody but the user
and root could have put it there.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

import jax

_logger = logging.getLogger(__name__)

TYPES = {"float32": "float", "float64": "double"}
"""The dtypes that there are kernels for, and what C++ calls them."""

_FLAGS = (
    *("-O2", "-std=c++20", "-fPIC", "-shared", "-pthread", "-fno-math-errno"),
    "-falign-loops=64",  # the product's loop ran up to a tenth slower elsewhere
)

# How compilers are told to use all that the processor has, where they can be: Clang for Apple's
# processors and for ARM knows one or the other by its version.
_TUNING = (("-march=native",), ("-mcpu=native",), ())

# Of each dtype, the libraries used last: of several environments or compilers, say.
_KEPT = 8

# For another process that compiles the same; that takes half a minute on a slow machine.
_LONGEST_WAIT = 300.0  # seconds

# What has failed in this process: whoever asks next need not wait for it to fail again.
_failures: dict["Compiler", str] = {}


class BuildError(Exception):
    """Why there are no kernels, in one line."""


class Compiler(NamedTuple):
    """How kernels are compiled.

    Attributes:
        command: the compiler, perhaps behind a wrapper: ("ccache", "g++").
        flags: all but the number's type.
    """

    command: tuple[str, ...]
    flags: tuple[str, ...]


def load(dtype: str) -> ctypes.CDLL:
    """Load the library for "float32" or "float64", from the cache or compiled now.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be used.
    """
    path = compiled(find_compiler(), dtype)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the CPU kernels cannot be loaded ({error})") from error


def find_compiler() -> Compiler:
    """The compiler of the environment: `CXX`, else c++ or g++.

    `CXX` may have arguments, "ccache g++ -O1". Flags among them, and after these the ones in
    `PUFFER_JAX_CXXFLAGS`, come after our own.

    Raises:
        BuildError: there is none.
    """
    given, extra = _words("CXX"), _words("PUFFER_JAX_CXXFLAGS")
    first = next((i for i, word in enumerate(given) if word.startswith("-")), len(given))
    command, flags = given[:first], given[first:]
    found = next(filter(None, map(shutil.which, command[:1] or ("c++", "g++"))), None)
    if found is None:
        raise BuildError(" ".join(["no C++ compiler", *command[:1]]))
    return Compiler((found, *command[1:]), (*_FLAGS, *flags, *extra))


def tuning(compiler: Compiler) -> tuple[tuple[str, ...], str]:
    """The flags for this processor that the compiler takes, and what it predefines with them.

    Raises:
        subprocess.CalledProcessError: it fails even without any.
    """
    for flags in _TUNING:
        try:
            words = (*compiler.command, *flags, "-dM", "-E", "-x", "c++", os.devnull)
            return flags, _run(words)
        except subprocess.CalledProcessError:
            if not flags:
                raise
    raise AssertionError("the last flags are none")


def _words(variable: str) -> list[str]:
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        reason = f"{variable}={text!r} is not a command ({error})"
        raise BuildError(f"the CPU kernels could not be built: {reason}") from error


def compiled(compiler: Compiler, dtype: str) -> Path:
    """The shared library for "float32" or "float64", from the cache or compiled now.

    Raises:
        BuildError: see `load`.
    """
    if compiler in _failures:
        raise BuildError(_failures[compiler])
    try:
        return _library(compiler, dtype)
    except (OSError, subprocess.CalledProcessError) as error:
        name = shlex.join(compiler.command)
        _failures[compiler] = f"the CPU kernels could not be built by {name} ({_line(error)})"
        raise BuildError(_failures[compiler]) from error


def _line(error: OSError | subprocess.CalledProcessError) -> str:
    """The line of an error that says most."""
    if isinstance(error, OSError):
        return str(error)
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    _logger.debug("%s", error.stderr)
    telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return telling[0] if telling else f"exit status {error.returncode}"


def _library(compiler: Compiler, dtype: str) -> Path:
    sources = files("puffer_jax.kernels") / "cc"
    # What the compiler predefines tells its version and the processor's instructions.
    tuned, target = tuning(compiler)
    flags = [*tuned, *compiler.flags, f"-DNUMBER={TYPES[dtype]}"]
    parts = target, " ".join(flags), version("jaxlib")
    name = f"{dtype}-{key(sources, *(part.encode() for part in parts))}"
    folder = cache_folder()
    if kept := _cached(folder, name):
        return kept
    with _turn(folder / f".{dtype}.lock"), _scratch(folder) as scratch:
        if kept := _cached(folder, name):  # by another process, in the meantime
            return kept
        _logger.info("compiling the CPU kernels to %s", folder)
        # It includes all others, which lie beside it; with -I, <threads.h> would be ours, too.
        source = str(sources / "kernels.cc")
        result = scratch / "kernels.so"
        include = ["-isystem", jax.ffi.include_dir()]
        _run([*compiler.command, *flags, *include, source, "-o", str(result)])
        kept = keep(result, folder, name)
    for old in _by_age(folder.glob(f"{dtype}-*.so"))[_KEPT:]:
        old.unlink(missing_ok=True)
    return kept


def _cached(folder: Path, name: str) -> Path | None:
    for kept in folder.glob(f"{name}-*.so"):
        if is_sound(kept):
            os.utime(kept)  # the ones used last are kept
            return kept
        _logger.warning("%s is not what was compiled once, and is compiled again", kept)
        with suppress(OSError):
            kept.unlink()
    return None


def _run(command: Sequence[str]) -> str:
    environment = os.environ | {"LC_ALL": "C"}  # errors in the language that `_line` reads
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "env": environment}
    done = subprocess.run(command, check=True, text=True, errors="replace", **options)
    return done.stdout


def key(sources: Traversable, *parts: bytes) -> str:
    """What identifies a library: all its sources, headers included, and the other parts."""
    found = sorted(sources.iterdir(), key=lambda file: file.name)
    named = (part for file in found for part in (file.name.encode(), file.read_bytes()))
    return hashlib.sha256(b"\0".join((*named, *parts))).hexdigest()[:16]


def _by_age(paths: Iterator[Path]) -> list[Path]:
    """The newest first."""
    times = []
    for path in paths:
        with suppress(FileNotFoundError):  # another process cleans up, too
            times.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(times, reverse=True)]


# --- the cache: what may be loaded from it, and what is left in it --------------------------


def cache_folder() -> Path:
    """`puffer_jax` in the user's cache; made if need be.

    Raises:
        BuildError: it is not the user's own.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puffer_jax"
    except RuntimeError as error:
        raise BuildError("no home directory for the CPU kernels; set XDG_CACHE_HOME") from error
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    info = folder.stat()
    if info.st_uid == os.geteuid() and info.st_mode & stat.S_IWOTH:
        folder.chmod(stat.S_IMODE(info.st_mode) & ~stat.S_IWOTH)
        info = folder.stat()
    reason = distrusted(info)
    if reason:
        raise BuildError(f"the CPU kernels are not kept in {folder}, since {reason}")
    return folder


def distrusted(info: os.stat_result) -> str | None:
    """Why a file or folder may hold what neither the user nor root put there; None if it may not.

    In a sticky folder (like /tmp) everybody may write, but not touch the files of others.
    """
    if info.st_uid not in (os.geteuid(), 0):
        return f"it belongs to another user, number {info.st_uid}"
    sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
    if info.st_mode & stat.S_IWOTH and not sticky:
        return "everybody may write to it"
    return None


def is_sound(path: Path) -> bool:
    """Whether a library is what `keep` once put there: its name ends with its hash."""
    try:
        # Neither through a link nor waiting for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or distrusted(info):
                return False
            return path.stem.endswith(f"-{hashlib.file_digest(file, 'sha256').hexdigest()}")
    except OSError:
        return False


def keep(result: Path, folder: Path, name: str) -> Path:
    """Move a compiled library into the folder: there it is whole, even after a crash."""
    result.chmod(0o755)
    with open(result, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    kept = result.replace(folder / f"{name}-{digest}.so")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return kept


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait while another process compiles the same, but not for ever: it may have been stopped."""
    import fcntl  # Windows has none, nor kernels

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        deadline = time.monotonic() + _LONGEST_WAIT
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for one build, locked while its process lives; those of dead ones are removed."""
    for pattern, seconds in {".build-*": 10, "tmp*": 3600}.items():  # the latter by old versions
        for path in folder.glob(pattern):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > seconds:
                    with _locked(path):
                        shutil.rmtree(path)
    with (
        tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch,
        _locked(Path(scratch)),
    ):
        yield Path(scratch)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises BlockingIOError if it is locked by another process."""
    import fcntl  # Windows has none, nor kernels

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
