"""The kernels' cache: what is loaded from it, what is compiled again, what is left in it."""

import fcntl
import logging
import os
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from puffer_jax.kernels.cpu import build, native

# Copies a file of the test's to where the library is to be; the first call only asks for macros.
COMPILER = """#!/bin/sh
for last; do :; done
case " $* " in *" -dM "*) exit 0;; esac
echo "$*" >> {folder}/calls
cp {folder}/made "$last"
"""
BROKEN = """#!/bin/sh
case " $* " in *" -dM "*) exit 0;; esac
echo call >> {folder}/calls
printf 'In file included from here\\n  kernels.cc:3: error: broken on purpose\\nmore\\n' >&2
exit 1
"""


PARTICULAR = """#!/bin/sh
case " $* " in *" {refused}"*) exit 1;; esac
case " $* " in *" -dM "*) exit 0;; esac
for last; do :; done
echo "$*" > {folder}/calls
cp {folder}/made "$last"
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PUFFER_JAX_CXXFLAGS", raising=False)
    monkeypatch.setattr(build, "_failures", {})
    (tmp_path / "made").write_bytes(b"a library")
    compile_with(COMPILER, tmp_path, monkeypatch)
    return tmp_path / "puffer_jax"


def compile_with(script, folder, monkeypatch, **more):
    compiler = folder / "compiler"
    compiler.write_text(script.format(folder=folder, **more))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def library(dtype="float32"):
    return build.compiled(build.find_compiler(), dtype)


def content(cache):
    """Without the locks, which stay."""
    return {path for path in cache.iterdir() if path.suffix != ".lock"}


def calls(cache):
    return len((cache.parent / "calls").read_text().splitlines())


def test_what_was_compiled_is_kept(cache):
    first = library()
    assert first.read_bytes() == b"a library" and first.parent == cache
    assert library() == first and calls(cache) == 1
    assert library("float64") != first and calls(cache) == 2
    assert len(content(cache)) == 2
    assert not any(stat.S_IMODE(p.stat().st_mode) & 0o022 for p in (cache, first))


def test_processes_that_need_the_same_compile_it_once(cache):
    kept = library()
    elsewhere = kept.rename(cache.parent / "elsewhere")
    with open(cache / ".float32.lock") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process that compiles
        found = pool.submit(library)
        assert not wait([found], timeout=0.3).done
        elsewhere.rename(kept)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert found.result(10) == kept
    assert calls(cache) == 1


def truncate(path):
    os.truncate(path, 4)


def flip(path):
    path.write_bytes(b"a librarz")


def open_to_all(path):
    path.chmod(0o777)


def link(path):
    shutil.copy(path, path.parent.parent / "elsewhere")
    path.unlink()
    path.symlink_to(path.parent.parent / "elsewhere")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [truncate, flip, open_to_all, link, pipe])
def test_what_is_not_sound_is_compiled_again(cache, damage, caplog):
    kept = library()
    damage(kept)
    assert library() == kept and calls(cache) == 2
    assert "is not what was compiled once" in caplog.text
    assert kept.read_bytes() == b"a library" and not kept.is_symlink()
    assert library() == kept and calls(cache) == 2


def give_away(path, monkeypatch):
    """As if the file were another user's."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)


def test_files_of_others_are_not_loaded(cache, monkeypatch):
    kept = library()
    give_away(kept, monkeypatch)
    assert not build.is_sound(kept)


def test_folders_of_others_are_not_used(cache, monkeypatch):
    library()
    give_away(cache, monkeypatch)
    with pytest.raises(build.BuildError, match=r"puffer_jax, since it belongs to another user"):
        library()


def test_a_folder_that_everybody_may_write_to_is_closed(cache):
    cache.mkdir()
    cache.chmod(0o777)
    library()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o775


FILE, FOLDER = stat.S_IFREG, stat.S_IFDIR


@pytest.mark.parametrize(
    "mode, owner, trusted",
    [
        (FILE | 0o755, "user", True),
        (FILE | 0o755, "root", True),
        (FILE | 0o755, "other", False),
        (FILE | 0o757, "user", False),
        (FILE | 0o1757, "user", False),
        (FOLDER | 0o757, "root", False),
        (FOLDER | 0o1777, "root", True),
        (FOLDER | 0o1777, "other", False),
    ],
)
def test_whom_to_trust(mode, owner, trusted, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    owner = {"user": 1000, "root": 0, "other": 1001}[owner]
    info = os.stat_result((mode, 0, 0, 1, owner, 0, 0, 0, 0, 0))
    assert (build.distrusted(info) is None) == trusted


def test_a_compiler_that_fails_is_not_asked_again(cache, monkeypatch, caplog):
    compile_with(BROKEN, cache.parent, monkeypatch)
    native._warn.cache_clear()
    for dtype in ("float32", "float64", "float32"):
        assert not native._load.__wrapped__(dtype)
    assert calls(cache) == 1
    (record,) = caplog.records
    line = record.getMessage()
    assert "compiler (kernels.cc:3: error: broken on purpose), so LSTMs" in line
    assert "\n" not in line and not content(cache)
    compile_with(COMPILER, cache.parent, monkeypatch)
    monkeypatch.setenv("CXX", os.environ["CXX"] + " -O1")  # another one is asked
    assert library().exists()


@pytest.mark.parametrize("symbols", [False, True])
def test_what_a_compiler_makes_may_be_no_library_of_ours(cache, caplog, symbols):
    if symbols:
        command = ["c++", "-shared", "-fPIC", "-x", "c++", os.devnull]
        subprocess.run([*command, "-o", cache.parent / "made"], check=True)
    native._warn.cache_clear()
    assert not native._load.__wrapped__("float32")
    reason = "undefined symbol: puffer_jax_lstm_forward" if symbols else "cannot be loaded"
    assert reason in caplog.text


@pytest.mark.parametrize(
    "cxx, command, flags",
    [
        ("sh", ["sh"], []),
        ("sh -O1 'a b'", ["sh"], ["-O1", "a b"]),
        ("env c++ -m64", ["env", "c++"], ["-m64"]),
    ],
)
def test_compilers_with_arguments(cache, monkeypatch, cxx, command, flags):
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("PUFFER_JAX_CXXFLAGS", "-DX='1 2'")
    found = build.find_compiler()
    assert found.command == (shutil.which(command[0]), *command[1:])
    assert found.flags == (*build._FLAGS, *flags, "-DX=1 2")


@pytest.mark.parametrize(
    "refused, tuned", [("-other", "-march=native"), ("-march", "-mcpu=native"), ("-m", "-O2")]
)
def test_a_compiler_is_told_of_the_processor_as_it_takes_it(cache, monkeypatch, refused, tuned):
    compile_with(PARTICULAR, cache.parent, monkeypatch, refused=refused)
    library()
    assert (cache.parent / "calls").read_text().split()[0] == tuned


def test_flags_of_the_compiler_come_after_our_own(cache, monkeypatch):
    plain = library()
    monkeypatch.setenv("CXX", os.environ["CXX"] + " -O1")
    assert library() != plain
    words = (cache.parent / "calls").read_text().splitlines()[1].split()
    assert words.index("-O1") > words.index("-O2")


@pytest.mark.parametrize("variable", ["CXX", "PUFFER_JAX_CXXFLAGS"])
def test_words_that_are_no_command(cache, monkeypatch, variable):
    monkeypatch.setenv(variable, "g++ 'O1")
    with pytest.raises(build.BuildError, match=rf"{variable}=\"g\+\+ 'O1\" is not a command"):
        library()


def test_compilers_that_are_not_there(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(build.BuildError, match=r"^no C\+\+ compiler no-such-compiler$"):
        library()


def age(path, seconds):
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_what_killed_builds_leave_is_removed(cache):
    cache.mkdir()
    folders = [cache / name for name in (".build-dead", ".build-alive", ".build-young", "tmpold")]
    for folder in folders:
        folder.mkdir()
        (folder / "kernels.so").write_bytes(b"half")
        age(folder, 0 if folder.name == ".build-young" else 4000)
    alive = os.open(folders[1], os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    kept = library()
    os.close(alive)
    assert content(cache) == {kept, *folders[1:3]}


def test_old_libraries_are_removed(cache):
    used = library()
    others = []
    for i in range(12):
        others.append(cache / f"float32-{i}.so")
        others[-1].write_bytes(b"old")
        age(others[-1], 10 * i + 10)
    double = cache / "float64-1.so"
    double.write_bytes(b"old")
    age(used, 1000)
    library()  # it is in use
    made = cache.parent / "made"
    made.write_bytes(b"another library")
    os.environ["CXX"] += " -O1"  # the fixture restores it
    newest = library()
    assert content(cache) == {newest, used, *others[: build._KEPT - 2], double}


def test_a_library_is_on_the_disk_before_it_has_its_name(cache, monkeypatch):
    order = []

    def record(name, function):
        def recorded(*args, **kwargs):
            order.append(name)
            return function(*args, **kwargs)

        return recorded

    monkeypatch.setattr(os, "fsync", record("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", record("replace", os.replace))
    monkeypatch.setattr(os, "rename", record("replace", os.rename))
    library()
    assert order == ["fsync", "replace", "fsync"]


def test_what_is_logged_of_a_build(cache, caplog):
    caplog.set_level(logging.INFO)
    library()
    assert "compiling the CPU kernels" in caplog.text
