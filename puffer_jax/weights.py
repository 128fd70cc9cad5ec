"""Weights in and out: torch state_dicts, and files in three formats.

| suffix | what it is | needs torch |
|---|---|---|
| `.pt` | the state_dict PufferLib's trainer writes and reads | yes (>= 2.10) |
| `.safetensors` | torch's names and layouts, with the policy's class and sizes as metadata | no |
| `.bin` | the flat float32 file of PufferLib's C inference, with a JSON sidecar | no |

Nothing is ever unpickled beyond tensors, a file is replaced as a whole or not at all, and a
load that fails leaves the policy as it was.
"""

import hashlib
import json
import os
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from puffer_jax.describe import build, describe, infer
from puffer_jax.modules import mismatches, torch_aliases, torch_parameters

_TORCH_INSTALL = "pip install 'torch>=2.10'"
_METADATA_KEY = "puffer_jax"


# --- state dicts -----------------------------------------------------------------------------


def state_dict(policy: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters as torch names them, orders them and lays them out.

    Tied keys (`cell.*` of an LSTMWrapper) are included, as in torch, and share memory with
    the keys they are tied to. Pass the merge of a graphdef and gradients to have gradients
    under torch's names.

    Raises:
        TypeError: the policy has a layer with no torch counterpart.
    """
    tensors = {parameter.name: parameter.to_torch() for parameter in torch_parameters(policy)}
    return tensors | {alias: tensors[name] for alias, name in torch_aliases(policy).items()}


class LoadResult(NamedTuple):
    """What `load_state_dict(strict=False)` did not use."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_state_dict(
    policy: nnx.Module,
    state_dict: Mapping[str, Any],
    strict: bool = True,
    *,
    allow_non_finite: bool = False,
) -> LoadResult:
    """Copy a state_dict into the policy, in place.

    Floating tensors of any width are converted to the policy's own dtype: float16 and
    bfloat16 exactly, float64 rounded, as torch does. The prefixes `module.` (DDP) and
    `_orig_mod.` (torch.compile) are stripped, and of tied keys one is enough.

    Args:
        policy: any `nnx.Module` whose layers have a torch counterpart.
        state_dict: torch's names -> NumPy, torch or JAX arrays.
        strict: whether missing and unexpected keys are an error; a wrong shape always is.
        allow_non_finite: accept NaN and infinity.

    Raises:
        ValueError: keys are missing, unexpected or mis-shaped, tied keys differ, or a value is
            not finite; all are named at once.
        TypeError: a value is no floating-point tensor.
    """
    parameters = {parameter.name: parameter for parameter in torch_parameters(policy)}
    aliases = torch_aliases(policy)
    arrays = _as_arrays(_strip_prefixes(state_dict, {*parameters, *aliases}))
    problems = _resolve_aliases(arrays, aliases)
    expected = {name: parameter.shape for name, parameter in parameters.items()}
    given = {name: array.shape for name, array in arrays.items()}
    differences = mismatches(expected, given)
    problems += [p for p in differences if strict or p.startswith("wrong shape")]

    new: list[tuple[nnx.Param, Any]] = []
    non_finite = []
    for name, parameter in parameters.items():
        if name in arrays and arrays[name].shape == expected[name]:
            for variable, array in zip(
                parameter.variables, parameter.from_torch(arrays[name]), strict=True
            ):
                with np.errstate(over="ignore"):
                    array = np.ascontiguousarray(array).astype(variable.dtype)
                if not allow_non_finite and not np.isfinite(array.astype(np.float64)).all():
                    non_finite.append(name)
                new.append((variable, array))
    if non_finite:
        names = ", ".join(dict.fromkeys(non_finite))
        problems.append(f"NaN or infinity (allow_non_finite=True lets them in): {names}")
    if problems:
        raise ValueError("the state_dict does not fit the policy: " + "; ".join(problems))
    for variable, array in new:
        variable[...] = jnp.asarray(array)
    return LoadResult(
        [name for name in expected if name not in given],
        [name for name in given if name not in expected],
    )


def _strip_prefixes(tensors: Mapping[str, Any], expected: set[str]) -> dict[str, Any]:
    def strip(name: str) -> str:
        if name not in expected:
            name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        while name not in expected and name.startswith("module."):
            name = name.removeprefix("module.")
        return name

    stripped = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"a state_dict maps names to tensors; got the key {name!r}")
        if strip(name) in stripped:
            raise ValueError(f"two keys of the state_dict both stand for {strip(name)!r}")
        stripped[strip(name)] = tensor
    return stripped


def _as_arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays, wrong = {}, []
    for name, tensor in tensors.items():
        if hasattr(tensor, "detach"):
            tensor = tensor.detach().cpu()
            # NumPy has no bfloat16 of its own; float32 holds both half formats exactly.
            tensor = (tensor.float() if tensor.itemsize == 2 else tensor).numpy()
        array = np.asarray(tensor)
        if jnp.issubdtype(array.dtype, jnp.floating):
            arrays[name] = array
        else:
            wrong.append(f"{name} ({array.dtype})")
    if wrong:
        raise TypeError(f"weights are floating-point tensors; these are not: {', '.join(wrong)}")
    return arrays


def _resolve_aliases(arrays: dict[str, np.ndarray], aliases: Mapping[str, str]) -> list[str]:
    """Drop tied keys from `arrays`, filling in the key they are tied to; report differences."""
    problems = []
    for alias, name in aliases.items():
        if alias in arrays:
            array = arrays.pop(alias)
            if not np.array_equal(arrays.setdefault(name, array), array, equal_nan=True):
                problems.append(f"{alias} and {name} are one tensor in the policy but differ here")
    return problems


# --- files -----------------------------------------------------------------------------------


def save_weights(policy: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Write the policy's weights; the suffix `.pt`, `.safetensors` or `.bin` says how.

    The file appears whole or not at all: it is written beside its final place, synced and
    renamed. `.bin` gets a sidecar `<path>.json` with names, shapes and a checksum.

    Raises:
        ValueError: another suffix.
        ImportError: `.pt` without torch.
        TypeError: the policy has a layer with no torch counterpart.
    """
    path = Path(path)
    _SAVERS[_suffix(path)](policy, path)


def load_weights(
    policy: nnx.Module,
    path: str | os.PathLike[str],
    strict: bool = True,
    *,
    allow_non_finite: bool = False,
) -> LoadResult:
    """Read weights from a `.pt`, `.safetensors` or `.bin` file into the policy, in place.

    Args:
        policy: the policy to fill; unchanged when anything is wrong.
        path: the file.
        strict: see `load_state_dict`.
        allow_non_finite: see `load_state_dict`.

    Raises:
        ValueError: a suffix, file or content that does not fit, with the reason.
        ImportError: `.pt` without torch >= 2.10.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if _suffix(path) == ".bin":
        shapes = {p.name: p.shape for p in torch_parameters(policy)}
        tensors = _read_bin(path, shapes)
    else:
        tensors, _ = _READERS[_suffix(path)](path)
    return load_state_dict(policy, tensors, strict, allow_non_finite=allow_non_finite)


def _suffix(path: Path) -> str:
    if path.suffix not in _SAVERS:
        raise ValueError(
            f"{path}: the suffix says the format and must be one of {', '.join(_SAVERS)}"
        )
    return path.suffix


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replace `path` by what `write` puts into a file, or leave it untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a checkpoint gets the permissions any new file would.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f".pt files need torch: {_TORCH_INSTALL} (.safetensors needs nothing more)"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise ImportError(
            f".pt files need torch >= 2.10, whose loader is safe against hostile files; found "
            f"{torch.__version__}: {_TORCH_INSTALL}"
        )
    return torch


def _save_pt(policy: nnx.Module, path: Path) -> None:
    torch = _import_torch()

    def to_tensor(array: np.ndarray) -> Any:
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.astype(np.float32)).bfloat16()
        return torch.from_numpy(array.copy())

    tensors = OrderedDict(
        (parameter.name, to_tensor(parameter.to_torch())) for parameter in torch_parameters(policy)
    )
    # The same tensor under both names: torch then stores it once, as the reference does.
    tensors.update((alias, tensors[name]) for alias, name in torch_aliases(policy).items())
    write_atomically(path, lambda file: torch.save(tensors, file))


def _read_pt(path: Path) -> tuple[dict[str, Any], None]:
    torch = _import_torch()
    with open(path, "rb") as file:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{path} is not a readable state_dict. It is refused unless torch.load with "
                f"weights_only=True accepts it, since unpickling anything else can run code. If "
                f"it holds a whole module, save module.state_dict() instead. ({reason})"
            ) from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not a state_dict")
    strangers = [str(k) for k, v in tensors.items() if not isinstance(v, torch.Tensor)]
    if strangers:
        raise ValueError(f"{path} is not a state_dict; no tensors: {', '.join(strangers)}")
    return dict(tensors), None


def _save_safetensors(policy: nnx.Module, path: Path) -> None:
    from safetensors.numpy import save

    # Tied keys are left out: the format has no tied tensors, and loading restores them.
    tensors = {parameter.name: parameter.to_torch() for parameter in torch_parameters(policy)}
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(describe(policy))}
    data = save(tensors, metadata)
    write_atomically(path, lambda file: file.write(data))


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        description = json.loads(metadata.get(_METADATA_KEY, "null"))
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors, description


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _save_bin(policy: nnx.Module, path: Path) -> None:
    tensors = {parameter.name: parameter.to_torch() for parameter in torch_parameters(policy)}
    data = b"".join(tensor.astype("<f4").tobytes() for tensor in tensors.values())
    sidecar = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "parameters": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "policy": describe(policy),
    }
    # Two files cannot be replaced in one step. Without a sidecar the weights still load, so
    # the old one goes first: a crash leaves a file that lacks its check, never a false one.
    _sidecar(path).unlink(missing_ok=True)
    write_atomically(path, lambda file: file.write(data))
    text = json.dumps(sidecar, indent=1).encode()
    write_atomically(_sidecar(path), lambda file: file.write(text))


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    try:
        sidecar = json.loads(_sidecar(path).read_bytes())
        return {
            "sha256": str(sidecar["sha256"]),
            "parameters": {name: tuple(s) for name, s in sidecar["parameters"].items()},
            "policy": sidecar["policy"],
        }
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{_sidecar(path)} is not a sidecar of weights: {error}") from error


def _read_bin(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    sidecar = _read_sidecar(path)
    if sidecar is not None:
        problems = mismatches(shapes, sidecar["parameters"])
        if not problems and list(shapes) != list(sidecar["parameters"]):
            problems = [f"order {list(sidecar['parameters'])} instead of {list(shapes)}"]
        if problems:
            raise ValueError(f"{_sidecar(path)} does not fit the policy: {'; '.join(problems)}")
        if hashlib.sha256(data).hexdigest() != sidecar["sha256"]:
            raise ValueError(f"{path} is damaged: its checksum is not the one in its sidecar")
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    if len(data) != 4 * sum(sizes):
        raise ValueError(
            f"{path} holds {len(data)} bytes, {len(data) / 4:g} float32 numbers; the policy has "
            f"{sum(sizes)} parameters"
        )
    numbers = np.split(np.frombuffer(data, "<f4"), np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(shape)
        for (name, shape), part in zip(shapes.items(), numbers, strict=True)
    }


_SAVERS: dict[str, Callable[[nnx.Module, Path], None]] = {
    ".pt": _save_pt,
    ".safetensors": _save_safetensors,
    ".bin": _save_bin,
}
_READERS: dict[str, Callable[[Path], tuple[dict[str, Any], dict[str, Any] | None]]] = {
    ".pt": _read_pt,
    ".safetensors": _read_safetensors,
}


# --- a policy from its checkpoint --------------------------------------------------------


def policy_from_checkpoint(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    env: Any = None,
    *,
    nvec: tuple[int, ...] | int | None = None,
    image_shape: tuple[int, ...] | None = None,
    channels_last: bool = False,
    downsample: int = 1,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    allow_non_finite: bool = False,
) -> Any:
    """Build the policy a checkpoint was saved from, and load it.

    Class and sizes come from the metadata of our own files or else from keys and shapes. What
    shapes cannot tell comes from `env`, or from an argument.

    Args:
        checkpoint: a `.pt`, `.safetensors` or `.bin` file, or a state_dict.
        env: the environment the policy was trained on; gives both spaces.
        nvec: how a fused discrete head splits: 5 for Discrete(5), (2, 3) for MultiDiscrete.
            Not needed for heads of fewer than four rows, which cannot hold two choices.
        image_shape: observation shape of a ProcgenResnet (H, W, C), or of a Convolutional to
            have its sizes checked.
        channels_last: as `Convolutional` was built.
        downsample: as `Convolutional` was built.
        dtype: of the policy's matmuls.
        param_dtype: of its parameters.
        allow_non_finite: see `load_state_dict`.

    Raises:
        ValueError: the keys are those of no known policy (load a custom one with
            `load_weights`), something shapes cannot tell was not given, or the file is broken.
    """
    description = None
    if isinstance(checkpoint, Mapping):
        tensors = dict(checkpoint)
    else:
        path = Path(checkpoint)
        if _suffix(path) == ".bin":
            sidecar = _read_sidecar(path)
            if sidecar is None:
                raise ValueError(
                    f"{path} has no sidecar {_sidecar(path).name}, and a .bin file names nothing; "
                    "build the policy yourself and use load_weights"
                )
            tensors = _read_bin(path, sidecar["parameters"])
            description = sidecar["policy"]
        else:
            tensors, description = _READERS[_suffix(path)](path)
    if description is None:
        arrays = _as_arrays(_strip_prefixes(tensors, set()))
        description = infer(
            arrays,
            env,
            nvec,
            image_shape,
            {"channels_last": channels_last, "downsample": downsample},
        )
    policy = build(description, env, {"dtype": dtype, "param_dtype": param_dtype})
    load_state_dict(policy, tensors, allow_non_finite=allow_non_finite)
    return policy
