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
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from puffer_jax.base.files import write_atomically
from puffer_jax.base.text import _from_json, _to_json
from puffer_jax.describe import build, describe, infer
from puffer_jax.nn.params import mismatches
from puffer_jax.nn.torch_layout import TorchParameter, torch_aliases, torch_parameters

_TORCH_INSTALL = "pip install 'torch>=2.10'"

_METADATA_KEY = "puffer_jax"


def state_dict(policy: nnx.Module) -> dict[str, np.ndarray]:
    """Copies of the parameters as torch names them, orders them and lays them out.

    Tied keys (`cell.*` of an LSTMWrapper) are included, as in torch, and share memory with
    the keys they are tied to. Pass the merge of a graphdef and gradients to have gradients
    under torch's names.

    Raises:
        TypeError: the policy has a layer with no torch counterpart.
    """
    parameters, aliases = _parameters(policy)
    tensors = {name: parameter.to_torch() for name, parameter in parameters.items()}
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def _parameters(policy: nnx.Module) -> tuple[dict[str, TorchParameter], dict[str, str]]:
    """Torch's name of every parameter, and the tied keys: alias -> the name it is tied to."""
    parameters, aliases = {}, {}
    names: dict[tuple[int, ...], str] = {}
    for parameter in torch_parameters(policy):
        # A submodule under two attributes is one module in torch too, and two keys.
        name = names.setdefault(tuple(map(id, parameter.variables)), parameter.name)
        if name == parameter.name:
            parameters[name] = parameter
        else:
            aliases[parameter.name] = name
    covered = {id(v) for parameter in parameters.values() for v in parameter.variables}
    dropped = [
        ".".join(map(str, path))
        for path, value in nnx.iter_graph(policy, graph=True)
        if isinstance(value, nnx.Variable | np.ndarray | jax.Array) and id(value) not in covered
    ]
    if dropped:
        raise TypeError(
            "only nnx.Param in modules, nnx.List, nnx.Dict and nnx.Sequential have a torch "
            f"counterpart; these would be lost: {', '.join(dropped)}"
        )
    return parameters, aliases | torch_aliases(policy)


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
        ValueError: keys are missing, unexpected or mis-shaped, tied keys differ, a value is no
            floating-point tensor or not finite; all are named at once.
        TypeError: the policy has a layer with no torch counterpart.
    """
    parameters, aliases = _parameters(policy)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    expected = shapes | {alias: shapes[name] for alias, name in aliases.items()}
    tensors = _strip_prefixes(state_dict, expected.keys())
    for alias, name in aliases.items():  # of tied keys one is enough
        if alias not in tensors:
            expected.pop(alias)
        elif name not in tensors:
            expected.pop(name, None)
    given = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()}
    problems = [
        problem
        for problem in mismatches(expected, given)
        if strict or problem.startswith("wrong shape")
    ]

    # Only tensors of the right shape are looked into, however large the others claim to be.
    fitting = [name for name, shape in expected.items() if given.get(name) == shape]
    arrays = {name: _as_array(tensors[name]) for name in fitting}
    wrong = [f"{name} ({_dtype(tensors[name])})" for name in fitting if arrays[name] is None]
    if wrong:
        problems.append(f"no floating-point numbers: {', '.join(wrong)}")
    arrays = {name: array for name, array in arrays.items() if array is not None}
    for alias in [alias for alias in aliases if alias in arrays]:
        name, array = aliases[alias], arrays.pop(alias)
        if not np.array_equal(arrays.setdefault(name, array), array, equal_nan=True):
            problems.append(f"{alias} and {name} are one tensor in the policy but differ here")

    new: list[tuple[nnx.Param, jax.Array]] = []
    non_finite = []
    for name, array in arrays.items():
        variables = parameters[name].variables
        unpacked = parameters[name].from_torch(array)
        with np.errstate(over="ignore"):
            converted = [a.astype(v.dtype) for a, v in zip(unpacked, variables, strict=True)]
        if not all(np.isfinite(a).all() for a in converted):
            non_finite.append(name)
        new += zip(variables, map(jnp.asarray, converted), strict=True)
    if non_finite and not allow_non_finite:
        names = ", ".join(non_finite)
        problems.append(f"NaN or infinity (allow_non_finite=True lets them in): {names}")
    if problems:
        raise ValueError("the state_dict does not fit the policy: " + "; ".join(problems))
    for variable, array in new:
        variable.set_value(array)
    return LoadResult(
        [name for name in expected if name not in given],
        [name for name in given if name not in expected],
    )


def _strip_prefixes(tensors: Mapping[str, Any], expected: Collection[str]) -> dict[str, Any]:
    def strip(name: str) -> str:
        if name not in expected:
            name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        while name not in expected and name.startswith("module."):
            name = name.removeprefix("module.")
        return name

    stripped = {}
    for name, tensor in tensors.items():
        if strip(name) in stripped:
            raise ValueError(f"two keys of the state_dict both stand for {strip(name)!r}")
        stripped[strip(name)] = tensor
    return stripped


def _as_array(tensor: Any) -> np.ndarray | None:
    """`tensor` as a NumPy array, or None where it does not hold floating-point numbers."""
    if hasattr(tensor, "detach"):
        try:
            tensor = tensor.detach().cpu()
            # NumPy has no narrow formats but float16; float32 holds them all exactly.
            narrow = tensor.is_floating_point() and tensor.itemsize < 4
            tensor = (tensor.float() if narrow else tensor).numpy()
        except (TypeError, RuntimeError):  # sparse, quantised, without data
            return None
    array = np.asarray(tensor)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else None


def _dtype(tensor: Any) -> str:
    return str(getattr(tensor, "dtype", type(tensor).__name__))


def save_weights(policy: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Write the policy's weights; the suffix `.pt`, `.safetensors` or `.bin` says how.

    The file appears whole or not at all: it is written beside its final place, synced and
    renamed. A symbolic link is replaced by the file, so what it pointed to stays. `.bin` gets a
    sidecar `<path>.json` with names, shapes and a checksum.

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
    read = _READERS[_suffix(path)]
    shapes = {name: parameter.shape for name, parameter in _parameters(policy)[0].items()}
    with _naming(path):
        tensors, _ = read(path, shapes)
        return load_state_dict(policy, tensors, strict, allow_non_finite=allow_non_finite)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _suffix(path: Path) -> str:
    if path.suffix not in _SAVERS:
        raise ValueError(
            f"{path}: the suffix says the format and must be one of {', '.join(_SAVERS)}"
        )
    return path.suffix


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
        return torch.from_numpy(array)

    parameters, aliases = _parameters(policy)
    tensors = OrderedDict((name, to_tensor(p.to_torch())) for name, p in parameters.items())
    # The same tensor under both names: torch then stores it once, as the reference does.
    tensors.update((alias, tensors[name]) for alias, name in aliases.items())
    write_atomically(path, lambda file: torch.save(tensors, file))


# What a reader gives: tensors under torch's names, and the description of the policy if any.
Contents = tuple[dict[str, Any], Any]


def _read_pt(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> Contents:
    torch = _import_torch()
    with open(path, "rb") as file:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        # A damaged pickle is a program gone wrong: any exception can come out of it.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                "not a readable state_dict. It is refused unless torch.load with "
                "weights_only=True accepts it, since unpickling anything else can run code. If "
                f"it holds a whole module, save module.state_dict() instead. ({reason})"
            ) from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"holds a {type(tensors).__name__}, not a state_dict")
    strangers = [
        str(name)
        for name, tensor in tensors.items()
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor))
    ]
    if strangers:
        raise ValueError(f"not a state_dict; no names of tensors: {', '.join(strangers)}")
    # A view that repeats one number claims any size, and a policy of that size would be built.
    hollow = [str(name) for name, t in tensors.items() if not _is_dense(t, torch)]
    if hollow:
        raise ValueError(f"tensors that do not hold their own numbers: {', '.join(hollow)}")
    return dict(tensors), None


def _is_dense(tensor: Any, torch: Any) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _save_safetensors(policy: nnx.Module, path: Path) -> None:
    from safetensors.numpy import save

    # Tied keys are left out: the format has no tied tensors, and loading restores them.
    tensors = {name: p.to_torch() for name, p in _parameters(policy)[0].items()}
    metadata = {"format": "pt", _METADATA_KEY: _to_json(describe(policy))}
    data = save(tensors, metadata)
    write_atomically(path, lambda file: file.write(data))


def _read_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> Contents:
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # its errors name the path; those of safe_open may not
        pass
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    # AttributeError: a number format NumPy does not have.
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"not a readable safetensors file: {error}") from error
    return tensors, _from_json(metadata.get(_METADATA_KEY, "null"))


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _save_bin(policy: nnx.Module, path: Path) -> None:
    tensors = {name: p.to_torch() for name, p in _parameters(policy)[0].items()}
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
    text = _to_json(sidecar, indent=1).encode()
    write_atomically(_sidecar(path), lambda file: file.write(text))


class _Sidecar(NamedTuple):
    sha256: str
    shapes: dict[str, tuple[int, ...]]
    description: Any


def _read_sidecar(path: Path) -> _Sidecar | None:
    sidecar = _sidecar(path)
    try:
        content = _from_json(sidecar.read_bytes())
        shapes = {name: tuple(shape) for name, shape in content["parameters"].items()}
        if not all(type(size) is int and size >= 0 for s in shapes.values() for size in s):
            raise ValueError("sizes that are no sizes")
        return _Sidecar(content["sha256"], shapes, content["policy"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{sidecar.name} is not a sidecar of weights: {error!r}") from error


def _read_bin(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> Contents:
    data = path.read_bytes()
    sidecar = _read_sidecar(path)
    name = _sidecar(path).name
    if shapes is None:
        if sidecar is None:
            raise ValueError(
                f"no sidecar {name}, and a .bin file names nothing; build the policy yourself "
                "and use load_weights"
            )
        shapes = sidecar.shapes
    if sidecar is not None:
        problems = mismatches(shapes, sidecar.shapes)
        if not problems and list(shapes) != list(sidecar.shapes):
            problems = [f"the order {list(sidecar.shapes)}, not {list(shapes)}"]
        if problems:
            raise ValueError(f"{name} does not fit the policy; it has {'; '.join(problems)}")
        if hashlib.sha256(data).hexdigest() != sidecar.sha256:
            raise ValueError(
                f"the checksum is not the one in {name}: the file is damaged, or another program "
                f"wrote it; delete {name} to load it unchecked"
            )
    sizes = [math.prod(shape) for shape in shapes.values()]
    if len(data) != 4 * sum(sizes):
        raise ValueError(
            f"{len(data)} bytes, {len(data) / 4:g} float32 numbers; the policy has {sum(sizes)} "
            "parameters"
        )
    numbers = np.split(np.frombuffer(data, "<f4"), np.cumsum(sizes)[:-1])
    tensors = {
        name: part.reshape(shape)
        for (name, shape), part in zip(shapes.items(), numbers, strict=True)
    }
    return tensors, sidecar and sidecar.description


_SAVERS: dict[str, Callable[[nnx.Module, Path], None]] = {
    ".pt": _save_pt,
    ".safetensors": _save_safetensors,
    ".bin": _save_bin,
}

# Readers are told the shapes to expect, where a policy is there to tell; .bin has no other.
_READERS: dict[str, Callable[[Path, Mapping[str, tuple[int, ...]] | None], Contents]] = {
    ".pt": _read_pt,
    ".safetensors": _read_safetensors,
    ".bin": _read_bin,
}


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

    def restore(tensors: Mapping[str, Any], description: Any) -> Any:
        if description is None:
            named = _strip_prefixes(tensors, set())
            shapes = {name: tuple(np.shape(tensor)) for name, tensor in named.items()}
            options = {"channels_last": channels_last, "downsample": downsample}
            description = infer(shapes, env, nvec, image_shape, options)
        policy = build(description, env, {"dtype": dtype, "param_dtype": param_dtype})
        load_state_dict(policy, tensors, allow_non_finite=allow_non_finite)
        return policy

    if isinstance(checkpoint, Mapping):
        return restore(checkpoint, None)
    path = Path(checkpoint)
    read = _READERS[_suffix(path)]
    with _naming(path):
        tensors, description = read(path, None)
        policy = restore(tensors, description)
        order = list(_parameters(policy)[0])
        # Only the sidecar said which numbers are whose; a permutation may fit as well.
        if path.suffix == ".bin" and list(tensors) != order:
            raise ValueError(f"{_sidecar(path).name} has the order {list(tensors)}, not {order}")
    return policy
