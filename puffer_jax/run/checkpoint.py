"""Checkpoints of a run: the model as PufferLib reads it, and the full train state to resume from.

A run's folder holds, for each of its last epochs,

    model_{epoch:06d}.pt    the policy's weights, `.safetensors` where torch is missing
    state_{epoch:06d}/      orbax: the train state, and a JSON dict

The state is written last and appears whole, by a rename, so a process killed at any moment leaves
only complete checkpoints and hidden litter, which the next `save` removes. The JSON has checksums
of every leaf and of itself, so that damage is an error.

Several processes (see `puffer_jax.run.processes`) write one checkpoint together, to a folder that
all of them see: process 0 writes everything but the leaves that are spread over processes, of which
each writes what it holds. It is restored on any number of devices and processes.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from puffer_jax.base import checksums
from puffer_jax.base.files import sync, sync_tree
from puffer_jax.base.locks import claimed
from puffer_jax.base.packages import require
from puffer_jax.base.text import from_json
from puffer_jax.run import processes
from puffer_jax.run.loggers import PathLike
from puffer_jax.weights.files import save_weights

# Leaves of the trainer that 0.1 did not have; where they are missing, `like` keeps its own.
_LATER = ("['train'].unplayed", "['train'].lost", "['stream'].lost")

_FORMAT = 1

# What an index has; version 0.1 wrote no checksums.
_KEYS_0_1 = {"format", "leaves", "metadata"}

_KEYS = _KEYS_0_1 | {"sha256", "index_sha256"}

_STATE = re.compile(r"state_(\d{6,})")

_MODEL = re.compile(r"model_(\d{6,})\.(pt|safetensors)")

# Folders on their way in or out; orbax adds a suffix of its own.
_LITTER = re.compile(r"\.(state_\d{6,}(\.old|\.orbax-checkpoint-tmp.*)?|model_\d{6,}\..*\.tmp)")

# What JSON holds.
Metadata = dict[str, Any]

# Dtype and shape of a leaf, as the index holds them.
Description = list[str | list[int]]

# NumPy's where one process holds all of it, else JAX's, spread over several.
_Saved = np.ndarray | jax.Array


class _Damaged(ValueError):
    """What was written is not there."""


def save(
    run: PathLike,
    epoch: int,
    policy: nnx.Module,
    state: PyTree,
    metadata: Metadata,
    keep: int = 3,
) -> Path:
    """Write a checkpoint and delete old ones; complete on return.

    A checkpoint of the same epoch is replaced, by two renames: a process killed between them
    leaves none of that epoch. Of the checkpoints up to this epoch, the last `keep` stay, this one
    included; files with other names, and checkpoints of later epochs, are left alone. Only one
    process at a time may write to a run's folder; see `puffer_jax.base.locks`.

    Args:
        run: the run's folder; created if missing.
        epoch: the checkpoint's epoch, at least 0.
        policy: the policy that goes into the model file.
        state: a pytree of NumPy and JAX arrays of numbers or booleans, typed PRNG keys, and
            Python numbers. Of an array that is spread over processes each writes its part.
        metadata: anything that `json.dumps` takes; tuples come back as lists.
        keep: how many checkpoints to keep.

    Returns:
        The path of the model file.

    Raises:
        ValueError: a bad argument, or a leaf of `state` that is not a number, an array or a key.
            Nothing is written then.
        TypeError: `metadata` is not JSON, or a layer of the policy has no torch counterpart.
        ImportError: orbax is missing.
        RuntimeError: another process writes to the folder.
        ProcessLostError: one of the processes that train together has failed.
    """
    if epoch < 0 or keep < 1:
        raise ValueError(
            f"epoch is {epoch} and must be at least 0; keep is {keep} and must be at least 1"
        )
    run = Path(run).absolute()
    _orbax()
    processes.exchange(None)  # together or not at all
    leaves = [(name, leaf, _describe(name, leaf)) for name, leaf in _named(state)]
    arrays = {name: _data(leaf) for name, leaf, _ in leaves}
    index = {
        "format": _FORMAT,
        "leaves": {name: description for name, _, description in leaves},
        "metadata": metadata,
        "sha256": _checksums(arrays),
    }
    index["index_sha256"] = checksums.of_json(from_json(json.dumps(index)))
    # orbax refuses arrays without elements, in which there is nothing to save.
    data = {str(i): array for i, array in enumerate(arrays.values()) if array.size}
    first = processes.index() == 0
    with claimed(run) if first else nullcontext():
        model = _save_model(run, epoch, policy) if first else None
        _save_state(run, epoch, index, data)
        if first:
            _prune(run, epoch, keep)
        return Path(processes.exchange(str(model))[0])


def _save_model(run: Path, epoch: int, policy: nnx.Module) -> Path:
    for path in run.iterdir():
        if _LITTER.fullmatch(path.name):
            _delete(path)
    model = run / f"model_{epoch:06d}.pt"
    try:
        save_weights(policy, model)
    except ImportError:
        model = model.with_suffix(".safetensors")
        save_weights(policy, model)
    return model


def _save_state(run: Path, epoch: int, index: Metadata, data: dict[str, _Saved]) -> None:
    ocp = _orbax()
    final, new = _folder(run, epoch), run / f".state_{epoch:06d}"
    items = {"index": ocp.args.JsonSave(index)}
    if data:
        items["arrays"] = ocp.args.PyTreeSave(data)
    with _checkpointer(ocp) as checkpointer:
        checkpointer.save(new, args=ocp.args.Composite(**items))
    if processes.index() > 0:
        return
    sync_tree(new)
    if final.exists():
        os.replace(final, new.with_suffix(".old"))
    os.replace(new, final)
    sync(run)
    if new.with_suffix(".old").exists():
        _delete(new.with_suffix(".old"))


def latest(run: PathLike) -> int | None:
    """The last epoch with a complete checkpoint in the run's folder, or None."""
    return max(_epochs(Path(run)), default=None)


def restore(run: PathLike, like: PyTree, epoch: int | None = None) -> tuple[PyTree, Metadata]:
    """Read a checkpoint's state and metadata, bit for bit.

    Args:
        run: the run's folder.
        like: a pytree like the saved one, with the same dtypes and shapes; its values are not
            used. An array comes back as NumPy's where `like` has NumPy's, as JAX's where it has
            JAX's or a `jax.ShapeDtypeStruct`, on the devices that the one in `like` is committed
            to, if any. JAX's weak types come back strong.
        epoch: which checkpoint; None: the latest.

    Returns:
        `(state, metadata)`.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no complete one.
        ValueError: the checkpoint holds other leaves, shapes or dtypes than `like` (all are
            named), or another version of puffer_jax wrote it.
        ImportError: orbax is missing.
    """
    run = Path(run).absolute()
    epochs = sorted(_epochs(run))
    if epoch not in epochs and (epoch is not None or not epochs):
        wanted = "state_*" if epoch is None else _folder(run, epoch).name
        raise FileNotFoundError(f"no complete checkpoint {wanted} in {run}; epochs: {epochs}")
    epoch = epochs[-1] if epoch is None else epoch
    folder = _folder(run, epoch)
    try:
        return _read(folder, like)
    except _Damaged as error:
        for older in reversed(epochs[: epochs.index(epoch)]):
            try:
                _read(_folder(run, older), like)
            except ValueError:
                continue
            raise ValueError(
                f"{error}. {_folder(run, older).name} is whole: restore with epoch={older}, or "
                f"delete {folder.name}"
            ) from error
        raise ValueError(f"{error}. No older checkpoint is whole") from error


def _read(folder: Path, like: PyTree) -> tuple[PyTree, Metadata]:
    """The state and the metadata in one folder; nothing but `_Damaged` and misfits is raised."""
    ocp = _orbax()
    with _checkpointer(ocp) as checkpointer:
        with _damage(folder, "its index"):
            index = checkpointer.restore(
                folder, args=ocp.args.Composite(index=ocp.args.JsonRestore())
            ).index
            _check_index(index)
        leaves = dict(_named(like))
        found: dict[str, Description] = index["leaves"]
        absent = {name for name in _LATER if name in leaves and name not in found}
        expected = {name: _describe(name, leaf) for name, leaf in leaves.items()}
        problems = _mismatches(
            {name: what for name, what in expected.items() if name not in absent}, found
        )
        if problems:
            raise ValueError(f"{folder} does not fit: {'; '.join(problems)}")

        # The leaves may come in another order: they are matched by name.
        keys = {name: str(i) for i, name in enumerate(found)}
        blank = {name: _blank(leaf) for name, leaf in leaves.items() if name not in absent}
        full = {keys[name]: array for name, array in blank.items() if array.size}
        data = {}
        if full:
            kinds = dict.fromkeys(full, ocp.RestoreArgs(restore_type=np.ndarray))
            arguments = ocp.args.PyTreeRestore(dict.fromkeys(full, 0), restore_args=kinds)
            with _damage(folder, "its arrays"):
                # What is as large as it says it is, and not as it should be, is not read.
                _check_sizes(full, ocp.PyTreeCheckpointHandler().metadata(folder / "arrays"))
                data = checkpointer.restore(
                    folder, args=ocp.args.Composite(arrays=arguments)
                ).arrays
    arrays = {
        name: data[keys[name]] if array.size else array.copy() for name, array in blank.items()
    }
    if "sha256" in index:
        with _damage(folder, "its arrays"):
            checksums.check(arrays, index["sha256"])
    values = [
        leaf if name in absent else _like(arrays[name], leaf) for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), values), index["metadata"]


@contextmanager
def _damage(folder: Path, what: str) -> Iterator[None]:
    """Whatever is raised means that a part of the folder is damaged."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _Damaged(f"{folder}: {what} cannot be read: {reason}") from error


def _check_index(index: Any) -> None:
    """Whether it is what `save` wrote, by its checksum; version 0.1's by its form."""
    if not isinstance(index, dict):
        raise ValueError(f"it is a {type(index).__name__}")
    if (found := index.get("format")) != _FORMAT:
        raise ValueError(f"it has format {found!r}; this version reads {_FORMAT}")
    if index.keys() not in (_KEYS, _KEYS_0_1):
        raise ValueError(f"it has {sorted(index)}, not {sorted(_KEYS)}")
    if "index_sha256" in index:
        content = {name: value for name, value in index.items() if name != "index_sha256"}
        if checksums.of_json(content) != index["index_sha256"]:
            raise ValueError("the checksum is another one")
    for name, (dtype, shape) in index["leaves"].items():
        if not (isinstance(dtype, str) and all(type(size) is int for size in shape)):
            raise ValueError(f"{name} has dtype {dtype!r} and shape {shape!r}")


def _check_sizes(expected: dict[str, np.ndarray], metadata: Any) -> None:
    tree = getattr(metadata, "tree", metadata)
    for name, array in expected.items():
        if tuple(tree[name].shape) != array.shape or tree[name].dtype != array.dtype:
            raise ValueError(
                f"array {name} is {tree[name].dtype}{tree[name].shape}, not "
                f"{array.dtype}{array.shape}"
            )


def _orbax() -> ModuleType:
    return require("orbax.checkpoint", "a checkpoint", "orbax-checkpoint")


def _checkpointer(ocp: ModuleType) -> Any:
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            arrays=ocp.PyTreeCheckpointHandler(), index=ocp.JsonCheckpointHandler()
        )
    )


def _folder(run: Path, epoch: int) -> Path:
    return run / f"state_{epoch:06d}"


def _epochs(run: Path) -> Iterator[int]:
    for path in run.iterdir() if run.is_dir() else ():
        if (match := _STATE.fullmatch(path.name)) and path.is_dir():
            yield int(match[1])


def _prune(run: Path, epoch: int, keep: int) -> None:
    oldest = sorted(e for e in _epochs(run) if e <= epoch)[-keep:][0]
    for path in run.iterdir():
        match = _STATE.fullmatch(path.name) or _MODEL.fullmatch(path.name)
        if match and int(match[1]) < oldest:
            _delete(path)


def _delete(path: Path) -> None:
    if not path.is_dir():
        path.unlink()
        return
    if not path.name.startswith("."):
        # Deleting a folder takes time; half a folder must not look like a checkpoint.
        path = path.rename(path.with_name(f".{path.name}.old"))
    shutil.rmtree(path)


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    # In version 0.1 the keys of a policy's lists were numbers.
    return [
        (re.sub(r"\['(\d+)'\]", r"[\1]", jax.tree_util.keystr(path)), leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _describe(name: str, leaf: Any) -> Description:
    if isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
        if isinstance(leaf, int) and not -(2**63) <= leaf < 2**63:
            raise ValueError(f"{name}: {leaf} does not fit 64 bits")
        return [f"Python {type(leaf).__name__}", []]
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    number = dtype is not None and (jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_)
    if shape is None or not (number or _is_key(leaf)):
        kind = type(leaf).__name__ if dtype is None else f"an array of {dtype}"
        raise ValueError(
            f"{name} is {kind}; a state holds arrays of numbers or booleans, typed PRNG keys and "
            "Python numbers; text belongs in the metadata"
        )
    return [str(dtype), list(shape)]


def _data(leaf: Any) -> _Saved:
    data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    whole = not isinstance(data, jax.Array) or data.is_fully_addressable
    return np.asarray(data) if whole or data.is_fully_replicated else data


def _checksums(arrays: dict[str, _Saved]) -> dict[str, Any]:
    """Of each array, or of its parts, see `checksums.check`."""
    parts = {
        name: [
            [_bounds(shard.index, array.shape), checksums.of_array(np.asarray(shard.data))]
            for shard in array.addressable_shards
            if shard.replica_id == 0
        ]
        for name, array in arrays.items()
        if isinstance(array, jax.Array)
    }
    found = {n: checksums.of_array(x) for n, x in arrays.items() if isinstance(x, np.ndarray)}
    if parts:
        everywhere = processes.exchange(parts)
        found |= {name: [part for some in everywhere for part in some[name]] for name in parts}
    return {name: found[name] for name in arrays}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[list[int]]:
    return [list(part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)]


def _blank(leaf: Any) -> np.ndarray:
    """An array like `_data` of such a leaf; its numbers take no memory."""
    shaped = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    if not hasattr(shaped, "shape"):
        shaped = np.asarray(shaped)
    return np.broadcast_to(np.zeros((), shaped.dtype), shaped.shape)


def _like(array: np.ndarray, leaf: Any) -> Any:
    """Saved data as the kind of leaf that `leaf` is."""
    if isinstance(leaf, np.generic):
        return array[()]
    if isinstance(leaf, np.ndarray):
        return array
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return type(leaf)(array.item())
    committed = not isinstance(leaf, jax.Array) or leaf.committed
    sharding = leaf.sharding if committed else None
    if sharding is not None and not sharding.is_fully_addressable:
        value = jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])
        return _wrapped(value, leaf)
    # A copy that JAX owns, so that it can be donated.
    value = _wrapped(jnp.array(array, copy=True), leaf)
    return value if sharding is None else jax.device_put(value, sharding)


def _wrapped(data: jax.Array, leaf: Any) -> jax.Array:
    if not _is_key(leaf):
        return data
    return jax.random.wrap_key_data(data, impl=_implementation(leaf))


def _implementation(key: Any) -> Any:
    found = []
    # Outside a trace `key_impl` does not take a ShapeDtypeStruct.
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


def _mismatches(expected: dict[str, Description], found: dict[str, Description]) -> list[str]:
    def show(description: Description) -> str:
        dtype, shape = description
        return str(dtype) if str(dtype).startswith("Python") else f"{dtype}{tuple(shape)}"

    lines = {
        "missing in the checkpoint": [
            f"{name} {show(what)}" for name, what in expected.items() if name not in found
        ],
        "only in the checkpoint": [
            f"{name} {show(what)}" for name, what in found.items() if name not in expected
        ],
        "different": [
            f"{name} is {show(found[name])} in the checkpoint, not {show(what)}"
            for name, what in expected.items()
            if name in found and found[name] != what
        ],
    }
    return [f"{kind}: {', '.join(names)}" for kind, names in lines.items() if names]
