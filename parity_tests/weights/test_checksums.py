"""No file is believed that is not what was written: checksums, pairs of files, dead writers."""

import fcntl
import io
import json
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx

import puffer_jax
from puffer_jax import load_weights, save_weights
from puffer_jax.base.files import write_atomically

SUFFIXES = [".pt", ".safetensors", ".bin"]


class Blob(nnx.Module):
    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        for name in ("ab", "ac", "b"):
            setattr(self, name, nnx.Param(rng.normal(size=5).astype(np.float32)))


def numbers(blob):
    return np.concatenate(list(puffer_jax.state_dict(blob).values())).tolist()


OLD, NEW = numbers(Blob(0)), numbers(Blob(1))


def load(path):
    load_weights(blob := Blob(2), path)
    return numbers(blob)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.bin", "x.bin.json"])
def test_one_flipped_bit_is_noticed(tmp_path, name):
    """A file is refused, unless what was flipped was no weight."""
    path = tmp_path / name
    save_weights(Blob(0), tmp_path / name.removesuffix(".json"))
    data, refusals = path.read_bytes(), 0
    places = range(0, len(data), 1 if name == "x.bin" else 7)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        try:
            assert load(tmp_path / name.removesuffix(".json")) == OLD
        except ValueError as error:
            assert type(error) is ValueError and name in str(error)
            refusals += 1
    # Of a sidecar, only the checksum, names and shapes matter; of a .pt file, the padding does not.
    assert refusals > (0.6 if name == "x.safetensors" else 0.2) * len(places)


def test_equal_shapes_swapped_in_a_header(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(Blob(0), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["ab"], header["b"] = header["b"], header["ab"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ValueError, match=r"x\.safetensors: damaged: the checksum .* ab, b"):
        load(path)


@pytest.mark.parametrize("key", ["puffer_jax", "puffer_jax.sha256", "puffer_jax.sha25"])
def test_checksums_cannot_be_left_out_by_half(tmp_path, key):
    path = tmp_path / "x.safetensors"
    save_weights(Blob(0), path)
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {n: file.get_tensor(n) for n in ("ab", "ac", "b")}
    if key.endswith("25"):
        metadata[key] = metadata.pop("puffer_jax.sha256")
    else:
        del metadata[key]
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"x\.safetensors: damaged: .*metadata"):
        load(path)
    # Another library's file has neither.
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert load(path) == OLD


def pt_records(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_pt_file_with_a_record_twice(tmp_path):
    path = tmp_path / "x.pt"
    save_weights(Blob(0), path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", np.ones(5, np.float32).tobytes())
    with pytest.raises(ValueError, match=r"x\.pt: .*records that occur twice: archive/data/0"):
        load(path)


def test_a_pt_file_whose_numbers_are_marked_as_a_folder(tmp_path):
    """torch gives what happens to be in memory for them."""
    path = tmp_path / "x.pt"
    save_weights(Blob(0), path)
    data = bytearray(path.read_bytes())
    # In the directory at the end, the attributes are 8 bytes before the name.
    data[data.rindex(b"archive/data/1") - 8] |= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.pt: damaged: .*folders: archive/data/1"):
        load(path)


def test_a_pt_file_that_inflates(tmp_path):
    path = tmp_path / "x.pt"
    save_weights(Blob(0), path)
    records = pt_records(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert load(path) == OLD  # by itself, compression does no harm
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data/99", "w", force_zip64=True) as record:
            for _ in range(100):
                record.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"x\.pt: \d+ bytes that would inflate to 10485"):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_a_pt_file_written_without_checksums(tmp_path):
    tensors = {name: torch.from_numpy(x) for name, x in puffer_jax.state_dict(Blob(0)).items()}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load(tmp_path / "x.pt") == OLD
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    assert load(tmp_path / "x.pt") == OLD


@pytest.mark.parametrize("sidecar", [True, False])
def test_a_bin_file_and_its_sidecar_always_belong_together(tmp_path, monkeypatch, sidecar):
    """A writer dies between the two renames; on a full disk it does not come to the first."""
    path = tmp_path / "x.bin"
    save_weights(Blob(0), path)
    if not sidecar:
        (tmp_path / "x.bin.json").unlink()
    replace = os.replace

    def dying(source, target):
        if target == path:
            raise KeyboardInterrupt
        replace(source, target)

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", dying)
            save_weights(Blob(1), path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.bin.json"]
        if sidecar:
            assert load(path) == OLD
        else:
            with pytest.warns(UserWarning, match="no sidecar"):
                assert load(path) == OLD
    save_weights(Blob(1), path)
    assert load(path) == NEW
    other = tmp_path / "y.bin"
    save_weights(Blob(3), other)
    path.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"x\.bin: it and x\.bin\.json do not belong together"):
        load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_files_of_dead_writers_are_removed(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    dead, alive, other = (
        tmp_path / f".{name}.0123456789abcde{i}.tmp"
        for i, name in enumerate([path.name, path.name, f"y{suffix}"])
    )
    for file in (dead, alive, other):
        file.write_bytes(b"half")
    with open(alive, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save_weights(Blob(0), path)
        assert (dead.exists(), alive.exists(), other.exists()) == (False, True, True)
    save_weights(Blob(0), path)
    assert not alive.exists() and load(path) == OLD


def test_a_writer_swept_before_it_has_its_lock_begins_again(tmp_path, monkeypatch):
    lock, swept = fcntl.flock, []

    def late(file, how):
        if not swept:
            swept.append(os.unlink(file.name))
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomically(tmp_path / "x", lambda file: file.write(b"new"))
    assert (tmp_path / "x").read_bytes() == b"new" and len(swept) == 1
