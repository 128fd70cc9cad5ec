"""A run's files under attack: flipped bits, lies, two writers, power cuts."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from puffer_jax.run import checkpoint
from puffer_jax.run.loggers import NoLogger
from puffer_jax.run.run import Run

STATE = {
    "w": np.random.default_rng(0).normal(size=(7, 9)),
    "mu": jnp.asarray(np.random.default_rng(1).normal(size=(7, 9)), jnp.float32),
    "key": jax.random.key(3),
    "none": jnp.zeros((0, 2)),
    "count": 5,
}
METADATA = {"config": {"total_timesteps": 100}, "global_step": 32, "epoch": 2}


class Policy(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(np.ones(2, np.float32))


def save(run, epoch, state=STATE, metadata=METADATA):
    checkpoint.save(run, epoch, Policy(), state, metadata)
    return run / f"state_{epoch:06d}"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with the states of two epochs, to be copied."""
    run = tmp_path_factory.mktemp("run")
    for epoch in (1, 2):
        save(run, epoch)
    return run


def plain(state):
    state = state | {"key": jax.random.key_data(state["key"])}
    return {name: np.asarray(leaf).tolist() for name, leaf in state.items()}


def test_one_flipped_bit_is_noticed(tmp_path):
    folder = save(tmp_path, 1)
    refusals = 0
    for path in filter(os.path.isfile, sorted(folder.rglob("*"))):
        data = path.read_bytes()
        for place in range(0, len(data), max(1, len(data) // 3)):
            flipped = bytes([data[place] ^ (1 << place % 8)])
            path.write_bytes(data[:place] + flipped + data[place + 1 :])
            try:
                state, metadata = checkpoint.restore(tmp_path, STATE)
                assert plain(state) == plain(STATE) and metadata == METADATA
            except ValueError as error:
                assert type(error) is ValueError and str(folder) in str(error)
                assert "No older checkpoint is whole" in str(error)
                refusals += 1
        path.write_bytes(data)
    assert refusals > 10
    assert plain(checkpoint.restore(tmp_path, STATE)[0]) == plain(STATE)


INDICES = {
    "nothing": lambda index: "",
    "no text": lambda index: "\udcff",
    "a list": lambda index: "[]",
    "null": lambda index: "null",
    "nested": lambda index: "[" * 50_000,
    "no format": lambda index: {n: v for n, v in index.items() if n != "format"},
    "no leaves": lambda index: {n: v for n, v in index.items() if n != "leaves"},
    "no metadata": lambda index: {n: v for n, v in index.items() if n != "metadata"},
    "no checksums": lambda index: {n: v for n, v in index.items() if n != "sha256"},
    "no checksum of itself": lambda index: {n: v for n, v in index.items() if n != "index_sha256"},
    "other checksums": lambda index: index | {"sha256": {}},
    "other metadata": lambda index: index | {"metadata": METADATA | {"global_step": 33}},
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_is_none(tmp_path, two, kind):
    folder = shutil.copytree(two, tmp_path, dirs_exist_ok=True) / "state_000002"
    path = folder / "index" / "metadata"
    broken = INDICES[kind](json.loads(path.read_text()))
    text = broken if isinstance(broken, str) else json.dumps(broken)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="state_000002: its index cannot be read") as caught:
        checkpoint.restore(tmp_path, STATE)
    assert caught.type is ValueError
    assert "state_000001 is whole: restore with epoch=1, or delete state_0" in str(caught.value)
    assert plain(checkpoint.restore(tmp_path, STATE, epoch=1)[0]) == plain(STATE)


# As in version 0.1, without any checksums.
LEAVES = {"a list": [1], "no pair": {"['w']": 3}, "no sizes": {"['w']": ["float64", ["7"]]}}


@pytest.mark.parametrize("kind", LEAVES)
def test_leaves_that_are_none(tmp_path, two, kind):
    path = shutil.copytree(two, tmp_path, dirs_exist_ok=True) / "state_000002/index/metadata"
    index = {"format": 1, "leaves": LEAVES[kind], "metadata": {}}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="state_000002: its index cannot be read"):
        checkpoint.restore(tmp_path, STATE)


def test_arrays_larger_than_they_should_be_are_not_read(tmp_path, monkeypatch):
    folder = save(tmp_path, 1, {"w": np.zeros(3)})
    other = save(tmp_path / "other", 1, {"w": np.zeros((1000, 1000))})
    (folder / "arrays").rename(tmp_path / "old")
    (other / "arrays").rename(folder / "arrays")
    with pytest.raises(
        ValueError, match=r"its arrays .*0 is float64\(1000, 1000\), not float64\(3,"
    ):
        checkpoint.restore(tmp_path, {"w": np.zeros(3)})


def test_a_missing_piece(tmp_path, two):
    folder = shutil.copytree(two, tmp_path, dirs_exist_ok=True) / "state_000002"
    (folder / "arrays" / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match=r"state_000002: its arrays .* state_000001 is whole"):
        checkpoint.restore(tmp_path, STATE)


@pytest.mark.parametrize(
    "change",
    [
        {"global_step": -5},
        {"global_step": 1e300},
        {"global_step": 2**70},
        {"global_step": True},
        {"global_step": None},
        {"epoch": "2"},
        {"config": []},
        {"config": {"total_timesteps": 0}},
    ],
)
def test_metadata_that_a_trainer_cannot_go_on_from(tmp_path, change):
    run = Run(tmp_path, NoLogger("run"), 3)
    run.save(2, Policy(), STATE, METADATA | change)
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"run: {name}.* in the state's metadata is") as caught:
        run.restore(STATE)
    assert "must be a whole number" in str(caught.value)
    run.save(2, Policy(), STATE, METADATA)
    assert run.restore(STATE)[1] == METADATA
    run.close(tmp_path)


WRITER = """
    import os, sys, time
    from pathlib import Path
    from puffer_jax.base import locks
    locks.claim(Path(sys.argv[1]))
    # A fork of the writer does not keep the folder when the writer is dead.
    if os.fork() == 0:
        print("ready", flush=True)
    time.sleep(100)
"""


def test_two_writers_of_one_run(tmp_path):
    run = Run(tmp_path, NoLogger("run"), 3)
    folder = tmp_path / "run"
    script = [sys.executable, "-c", textwrap.dedent(WRITER), folder]
    writer = subprocess.Popen(script, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert writer.stdout.readline() == "ready\n"
        before = sorted(folder.iterdir())
        for write in (
            lambda: run.save(2, Policy(), STATE, METADATA),
            lambda: run.restore(STATE),
            lambda: save(folder, 2),
        ):
            with pytest.raises(
                RuntimeError, match=rf"another process .*{folder} \(process {writer.pid} on"
            ):
                write()
        assert sorted(folder.iterdir()) == before
        writer.kill()
        writer.wait()
        run.save(2, Policy(), STATE, METADATA)
        assert run.restore(STATE)[1] == METADATA
    finally:
        os.killpg(writer.pid, 9)
        writer.stdout.close()
    # In this process, others may write; the run still has its folder then.
    save(folder, 3)
    assert (folder / ".writer").exists()
    run.close(tmp_path)
    assert not (folder / ".writer").exists()


def test_a_state_is_on_the_disk_before_it_is_seen(tmp_path, monkeypatch):
    happened = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        happened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(source, target):
        happened.append(("renamed", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    final = save(tmp_path, 1)
    seen = happened.index(("renamed", str(final)))
    files = [str(tmp_path / ".state_000001" / p.relative_to(final)) for p in final.rglob("*")]
    assert set(files) <= set(happened[:seen]) and str(tmp_path) in happened[seen:]
