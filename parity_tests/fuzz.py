"""Loads damaged and hostile files of every format that puffer_jax reads, and says what happened.

    python parity_tests/fuzz.py --files 10000 --seed 0
    python parity_tests/fuzz.py --files 100 --formats pt state --seconds 60

Each file is a good one with a few edits: bytes flipped, put in, taken out, numbers that claim other
sizes, values of JSON and of settings replaced, parts missing. Right is: the good content, or a
ValueError that names the file. What a checksum covers may never come back changed. A process of its
own loads the files, so that a crash or a hang is one file's outcome; exit code 1 if there was one,
an unclear error, changed weights behind a checksum, a policy half filled, or too much memory.
"""

import argparse
import functools
import io
import json
import math
import random
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SECONDS_A_FILE = 20.0
MEMORY = 256 << 20

# What a hostile file may put where something sensible was.
VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 10**400, -(2**63), 0.5, 1e300, float("nan"),
    float("inf"), "", "8", "\0", "é\ud800", [], [[]], {}, [1, 2], {"a": 1}, ["x"] * 50, "[" * 999,
]  # fmt: skip

TEXTS = [
    "", "50%", "%(x)s", "%%", "nan", "1e400", "9" * 5000, "(" * 3000, "{[]}", "[1, 2", "\0",
    "'\\d'", "1_0", "0x1f", "true", "None", "-1", "1if 2", "1, 2", "{'a': 1}", "\u2028", "=", "[x]",
]  # fmt: skip


UNFIT = (
    ValueError,
    LookupError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    RecursionError,
)


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        write: write good files into an empty folder; returns the path to load.
        load: read from that path; returns what can be compared.
        checksum: whether the files, as they are now, still have a checksum of what is loaded.
    """

    write: Callable[[Path], Path]
    load: Callable[[Path], Any]
    checksum: Callable[[Path], bool] = lambda path: False


# --- formats -------------------------------------------------------------------------------------


SHAPES = {
    "encoder.0.weight": (8, 4),
    "encoder.0.bias": (8,),
    "decoder.weight": (3, 8),
    "decoder.bias": (3,),
    "value.weight": (1, 8),
    "value.bias": (1,),
}


@functools.cache
def policy(seed: int) -> Any:
    """A small policy; that of seed 0 is in the files."""
    import puffer_jax

    rng = np.random.default_rng(seed)
    tensors = {n: rng.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}
    return puffer_jax.policy_from_checkpoint(tensors, nvec=3)


def contents(module: Any) -> dict[str, bytes]:
    """All of a policy's weights, bit for bit."""
    import puffer_jax

    return {name: array.tobytes() for name, array in puffer_jax.state_dict(module).items()}


class HalfFilled(Exception):
    """A load that failed has changed the policy."""


def load_weights(path: Path) -> dict[str, bytes]:
    """As `puffer_jax.load_weights`, into a policy of other weights."""
    import puffer_jax

    module = policy(1)
    before = contents(module)
    try:
        puffer_jax.load_weights(module, path)
        return contents(module)
    except ValueError:
        if contents(module) != before:
            raise HalfFilled from None
        raise
    finally:
        puffer_jax.load_state_dict(
            module, {n: np.frombuffer(b, "<f4").reshape(SHAPES[n]) for n, b in before.items()}
        )


def rebuild(path: Path) -> dict[str, bytes]:
    """As `puffer_jax.policy_from_checkpoint`."""
    import puffer_jax

    return contents(puffer_jax.policy_from_checkpoint(path, nvec=3))


def saved(suffix: str) -> Callable[[Path], Path]:
    """What we write."""

    def write(folder: Path) -> Path:
        import puffer_jax

        puffer_jax.save_weights(policy(0), folder / f"x{suffix}")
        return folder / f"x{suffix}"

    return write


def bin_alone(folder: Path) -> Path:
    """Without its sidecar."""
    path = saved(".bin")(folder)
    path.with_name("x.bin.json").unlink()
    return path


def old_torch(folder: Path) -> Path:
    """As torch wrote before version 1.6: a pickle, and no checksums."""
    import torch

    import puffer_jax

    tensors = {n: torch.from_numpy(x) for n, x in puffer_jax.state_dict(policy(0)).items()}
    torch.save(tensors, folder / "x.pt", _use_new_zipfile_serialization=False)
    return folder / "x.pt"


def foreign_safetensors(folder: Path) -> Path:
    """As another library writes: no description, no checksums."""
    from safetensors.numpy import save_file

    import puffer_jax

    save_file(puffer_jax.state_dict(policy(0)), folder / "x.safetensors")
    return folder / "x.safetensors"


STATE = {
    "train": {"w": np.linspace(-1, 1, 48, dtype=np.float32).reshape(6, 8), "mu": np.arange(48.0)},
    "none": np.zeros((0, 3)),
    "epoch": 7,
}


def write_state(folder: Path) -> Path:
    """A train state as the trainer writes it."""
    from puffer_jax.run.loggers import NoLogger
    from puffer_jax.run.run import Run

    metadata = {"config": {"total_timesteps": 100}, "global_step": 64, "epoch": 7}
    run = Run(folder, NoLogger("run"), 3)
    run.save(7, policy(0), STATE, metadata)
    run.close(folder)
    (folder / "run" / "model_000007.pt").unlink()
    return folder / "run" / "state_000007"


def load_state(path: Path) -> Any:
    """As the trainer restores it."""
    from puffer_jax.run.loggers import NoLogger
    from puffer_jax.run.run import Run

    state, metadata, _ = Run(path.parents[1], NoLogger("other"), 3).restore(STATE, path.parent)
    arrays = {**state["train"], "none": state["none"], "epoch": np.asarray(state["epoch"])}
    return {name: (x.dtype.str, x.shape, x.tobytes()) for name, x in arrays.items()}, metadata


def write_settings(folder: Path) -> Path:
    """A run's config.json."""
    from puffer_jax.cli import train

    train.write_settings(train.train_defaults(["--env", "cartpole"]), folder)
    return folder / train.SETTINGS


def load_settings(path: Path) -> str:
    """As `puffer-jax train --resume` reads it."""
    from puffer_jax.cli import train

    return repr(train.read_settings(path.parent))


INI = """; a comment
[base]
env_name = CartPole-v1 cartpole
rnn_name = Recurrent

[vec]
num_envs = 4

[policy]
hidden_size = 8

[train]
total_timesteps = 100_000
learning_rate = 0.015
anneal_lr = false
bptt_horizon = 64
minibatch_size = auto
"""


def write_ini(folder: Path) -> Path:
    """PufferLib's form of settings."""
    (folder / "x.ini").write_text(INI)
    return folder / "x.ini"


def load_ini(path: Path) -> str:
    """As `puffer-jax train --config` and `PuffeRLConfig.from_ini` read it."""
    from puffer_jax.cli import train
    from puffer_jax.ppo.config import PuffeRLConfig

    PuffeRLConfig.from_ini(path)
    return repr(train.train_defaults(["--config", str(path)]))


def mentions(*texts: bytes) -> Callable[[Path], bool]:
    """Whether a file still has one of these."""
    return lambda path: any(text in path.read_bytes() for text in texts)


def state_has_checksums(path: Path) -> bool:
    index = path / "index" / "metadata"
    return index.is_file() and b'sha256"' in index.read_bytes()


FORMATS = {
    "pt": Format(saved(".pt"), load_weights, lambda path: True),
    "pt, old": Format(old_torch, load_weights),
    "pt, rebuilt": Format(saved(".pt"), rebuild, lambda path: True),
    # Its records are edited, so their checksums are right.
    "pt, repacked": Format(saved(".pt"), load_weights),
    "safetensors": Format(
        saved(".safetensors"), load_weights, mentions(b"puffer_jax.sha256", b'\\"checked\\": true')
    ),
    "safetensors, rebuilt": Format(
        saved(".safetensors"), rebuild, mentions(b"puffer_jax.sha256", b'\\"checked\\": true')
    ),
    "safetensors, foreign": Format(foreign_safetensors, load_weights),
    "bin": Format(saved(".bin"), load_weights, lambda path: True),
    "bin, rebuilt": Format(saved(".bin"), rebuild, lambda path: True),
    "bin, alone": Format(bin_alone, load_weights),
    "state": Format(write_state, load_state, state_has_checksums),
    "config.json": Format(write_settings, load_settings),
    "ini": Format(write_ini, load_ini),
}


# --- edits ---------------------------------------------------------------------------------------


def edit_bytes(data: bytes, rng: random.Random) -> bytes:
    """One edit of a few bytes, anywhere, or where headers and directories are."""
    data_ = bytearray(data)
    where = rng.choice([rng.random(), rng.random() * 0.1, 1 - rng.random() * 0.2])
    i = int(where * max(len(data) - 1, 0))
    kind = rng.randrange(8)
    if kind <= 1 and data:
        data_[i] ^= 1 << rng.randrange(8)
    elif kind == 2 and data:
        data_[i] = rng.choice([0, 255, rng.randrange(256)])
    elif kind == 3:
        data_[i:i] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 4:
        del data_[i : i + rng.randrange(1, 9)]
    elif kind == 5:
        del data_[i if rng.random() < 0.5 else int(rng.random() * len(data)) :]
    elif kind == 6:
        form, top = rng.choice([("<Q", 64), ("<I", 32), ("<H", 16)])
        number = struct.pack(form, min(2 ** rng.randrange(top), 2**top - 1))
        data_[i : i + len(number)] = number
    else:
        n, j = rng.randrange(1, 64), int(rng.random() * len(data))
        data_[i : i + n], data_[j : j + n] = data_[j : j + n], data_[i : i + n]
    return bytes(data_)


def edit_json(value: Any, rng: random.Random) -> Any:
    """One value, name or entry, at any depth, is another one or gone."""
    if isinstance(value, str) and value[:1] in "{[" and rng.random() < 0.8:
        try:
            return json.dumps(edit_json(json.loads(value), rng))
        except (ValueError, RecursionError):
            pass
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        value = value.copy()
        place: Any = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = rng.randrange(6)
        if kind == 0:
            del value[place]
        elif kind == 1 and isinstance(value, dict):
            value[rng.choice([place + "x", place[:-1], ""])] = value.pop(place)
        elif kind == 2:
            other: Any = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
            value[place], value[other] = value[other], value[place]
        else:
            value[place] = edit_json(value[place], rng)
        return value
    return rng.choice(VALUES)


def edit_text(text: str, rng: random.Random) -> str:
    """One line is another one, or its value is."""
    lines = text.split("\n")
    i = rng.randrange(len(lines))
    name, equals, _ = lines[i].partition("=")
    kind = rng.randrange(4)
    if kind == 0:
        lines[i] = rng.choice(lines)
    elif kind == 1:
        lines[i] = rng.choice(TEXTS)
    else:
        lines[i] = name + equals + rng.choice(TEXTS)
    return "\n".join(lines)


def edit_structure(path: Path, data: bytes, rng: random.Random) -> bytes:
    """One edit of what a file means, where its form is known."""
    if path.suffix == ".ini":
        return edit_text(data.decode(), rng).encode()
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", data[:8])
        header = json.dumps(edit_json(json.loads(data[8 : 8 + length]), rng)).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    return json.dumps(edit_json(json.loads(data), rng)).encode()


def repack(data: bytes, rng: random.Random) -> bytes:
    """A zip archive whose records are edited, put in, left out; all its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(records))
    kind = rng.randrange(5)
    if kind == 0:
        del records[name]
    elif kind == 1:
        records[name] = records[rng.choice(list(records))]
    elif kind == 2:
        records[f"archive/data/{rng.randrange(9)}x"] = bytes(1 << rng.randrange(27))
    else:
        records[name] = edit_bytes(records[name], rng)
    buffer = io.BytesIO()
    how = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def damage(name: str, path: Path, rng: random.Random) -> None:
    """Edit what `path` is loaded from: the file, its sidecar, or the files of its folder."""
    files = sorted(f for f in path.parent.rglob("*") if f.is_file())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        file = rng.choice(files)
        if name == "state" and rng.random() < 0.03:
            file.unlink(missing_ok=True)
        if not file.exists():
            continue
        data = file.read_bytes()
        try:
            if name == "pt, repacked":
                data = repack(data, rng)
            elif rng.random() < 0.5:
                data = edit_structure(file, data, rng)
            else:
                data = edit_bytes(data, rng)
        # It has no such form, or not any more.
        except UNFIT:
            data = edit_bytes(data, rng)
        file.write_bytes(data)


# --- one process loads ---------------------------------------------------------------------------


def memory(field: str) -> int:
    """A line of this process's status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def attempts(name: str, numbers: Iterator[int] | range, seed: int) -> Iterator[dict[str, Any]]:
    """Damage and load files; yields {} once the good one has loaded, and the outcome of each.

    Args:
        name: a key of `FORMATS`.
        numbers: which files; each depends only on its number and the seed.
        seed: of all of them.
    """
    form = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good, work = Path(folder, "good"), Path(folder, "work")
        good.mkdir()
        path = form.write(good)
        expected = form.load(path)
        path = work / path.relative_to(good)
        yield {}
        for number in numbers:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(good, work)
            damage(name, path, random.Random(f"{name} {seed} {number}"))
            size = sum(f.stat().st_size for f in work.rglob("*") if f.is_file())
            yield {"number": number, **attempt(form, path, expected), "size": size}


def attempt(form: Format, path: Path, expected: Any) -> dict[str, Any]:
    """Load one file."""
    Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
    before, error = memory("VmRSS"), ""
    try:
        outcome = "same" if form.load(path) == expected else "changed"
    except ValueError as caught:
        named = type(caught) is ValueError and any(
            str(part) in str(caught) for part in (path, path.parent)
        )
        outcome, error = "refused" if named else "unclear", f"{type(caught).__name__}: {caught}"
    except Exception as caught:
        outcome = "half filled" if isinstance(caught, HalfFilled) else "unclear"
        error = f"{type(caught).__name__}: {caught}\n{traceback.format_exc()}"
    if outcome == "changed" and form.checksum(path):
        outcome = "changed in spite of a checksum"
    return {"outcome": outcome, "error": error, "memory": memory("VmHWM") - before}


def faults(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results that must not be."""
    return [
        result
        for result in results
        if result["outcome"] not in ("same", "changed", "refused")
        or result["memory"] > MEMORY + result["size"]
    ]


# --- another watches -----------------------------------------------------------------------------


def work(names: list[str], first: int, files: int, seed: int, seconds: float) -> None:
    """Attempt files of each format, and print a line of JSON for each.

    Args:
        names: the formats, one after another.
        first: number of the first file of the first of them.
        files: number of files of each format.
        seed: see `attempts`.
        seconds: for each format.
    """
    for i, name in enumerate(names):
        began = math.inf
        for result in attempts(name, range(0 if i else first, files), seed):
            print(json.dumps({"format": name, **result}), flush=True)
            began = min(began, time.monotonic())  # the first result is that the good file loads
            if time.monotonic() > began + seconds:
                break
    print(json.dumps({"format": None}), flush=True)


def watch(names: list[str], files: int, seed: int, seconds: float) -> dict[str, list[Any]]:
    """`work` in a process of its own, begun again after a crash or a hang; outcomes by format."""
    results: dict[str, list[Any]] = {name: [] for name in names}
    todo: list[str] = list(names)
    while todo:
        options = ["--files", files, "--seed", seed, "--seconds", seconds * len(todo)]
        start = ["--worker", "--first", len(results[todo[0]]), *options, "--formats", *todo]
        # Only a crash makes what it says interesting; orbax's threads complain about most files.
        with tempfile.TemporaryFile() as said:
            worker = subprocess.Popen(
                [sys.executable, __file__, *map(str, start)], stdout=subprocess.PIPE, stderr=said
            )
            outcome, began = follow(worker, todo, results)
            worker.kill()
            worker.wait()
            said.seek(0)
            error = said.read()[-2000:].decode(errors="replace")
        if not began:
            raise RuntimeError(f"the good files of {todo[0]!r} do not load: {error}")
        if outcome:
            number = len(results[todo[0]])
            lost = {"number": number, "outcome": outcome, "error": error, "memory": 0, "size": 0}
            results[todo[0]].append(lost)
    return results


def follow(
    worker: "subprocess.Popen[bytes]", todo: list[str], results: dict[str, list[Any]]
) -> tuple[str, bool]:
    """Collect what a worker prints; returns how it ended, "" if well, and if a good file loaded.

    Formats that are done are taken out of `todo`.
    """
    assert worker.stdout is not None
    began = False
    with worker.stdout as lines:
        while True:
            patience = SECONDS_A_FILE if began else 300  # it imports JAX first
            if not select.select([lines], [], [], patience)[0]:
                return "hang", began
            line = lines.readline()
            if not line:
                return "crash", began
            result = json.loads(line)
            name = result.pop("format")
            while todo and todo[0] != name:
                del todo[0]
            if name is None:
                return "", True
            if result:
                results[name].append(result)
            began = True


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--files", type=int, default=1000, help="files of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all formats")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    share = options.seconds / len(options.formats)
    if options.worker:
        work(options.formats, options.first, options.files, options.seed, share)
        return 0
    found = watch(options.formats, options.files, options.seed, share)
    for name, results in found.items():
        counts = Counter(result["outcome"] for result in results)
        over = max((r["memory"] - r["size"] for r in results), default=0)
        said = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
        print(
            f"{name:22}{len(results):7} files: {said}; at most {over / 2**20:.0f} MiB over its size"
        )
        for result in faults(results)[:5]:
            print(f"    file {result['number']}: {result['outcome']}: {result['error'][:3000]}")
    return int(any(faults(results) for results in found.values()))


if __name__ == "__main__":
    sys.exit(main())
