"""Files of weights: the suffix says the format."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from puffer_jax.base.spaces import Env
from puffer_jax.base.text import Json
from puffer_jax.policies.base import Dtypes, Hints
from puffer_jax.weights.bin import is_bare, padding_of, read_bin, save_bin, sidecar_path
from puffer_jax.weights.description import build
from puffer_jax.weights.foreign import misnamed, obstacles
from puffer_jax.weights.inference import infer
from puffer_jax.weights.native import native_policy
from puffer_jax.weights.pt import Contents, read_pt, save_pt
from puffer_jax.weights.safetensors import read_safetensors, save_safetensors
from puffer_jax.weights.state_dicts import (
    LoadResult,
    StateDict,
    load_state_dict,
    named_parameters,
    strip_prefixes,
)


def save_weights(
    policy: nnx.Module, path: str | os.PathLike[str], *, padding: int | None = None
) -> None:
    """Write the policy's weights; the suffix `.pt`, `.safetensors` or `.bin` says how.

    The file appears whole or not at all: it is written beside its final place, synced and
    renamed. A symbolic link is replaced by the file, so what it pointed to stays. `.bin` gets a
    sidecar `<path>.json` with names, shapes and a checksum; killed at any moment, the two that are
    there belong together.

    Args:
        policy: what to save.
        path: the file.
        padding: of `.bin` files: each tensor starts at a multiple of so many floats. None: 8 for
            the network of PufferLib 4's native trainer, as its C inference reads it, otherwise 1.

    Raises:
        ValueError: the suffix is another one, or has no padding.
        ImportError: the file is a `.pt` one and torch is not installed.
        TypeError: the policy has a layer with no torch counterpart.

    Example:
        >>> import puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.Default(env, rngs=nnx.Rngs(0))
        >>> puffer_jax.save_weights(policy, "model.safetensors")
    """
    path = Path(path)
    with _naming(path):
        save = _SAVERS[_suffix(path)]
        _check_padding(path, padding)
        if save is save_bin:
            return save_bin(policy, path, padding)
    save(policy, path)


def _check_padding(path: Path, padding: int | None) -> None:
    if padding is not None and path.suffix != ".bin":
        raise ValueError(f"only .bin files have a padding; got padding={padding}")


def load_weights(
    policy: nnx.Module,
    path: str | os.PathLike[str],
    strict: bool = True,
    *,
    allow_non_finite: bool = False,
    padding: int | None = None,
) -> LoadResult:
    """Read weights from a `.pt`, `.safetensors` or `.bin` file into the policy, in place.

    Args:
        policy: the policy to fill; unchanged when anything is wrong.
        path: the file.
        strict: see `load_state_dict`.
        allow_non_finite: see `load_state_dict`.
        padding: of a `.bin` file without a sidecar, see `save_weights`.

    Raises:
        ValueError: the suffix, the file or its contents do not fit; the message says why.
        ImportError: the file is a `.pt` one and torch >= 2.10 is not installed.
        OSError: the file cannot be read.

    Example:
        >>> import puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> puffer_jax.save_weights(puffer_jax.Default(env, rngs=nnx.Rngs(0)), "model.safetensors")
        >>> policy = puffer_jax.Default(env, rngs=nnx.Rngs(1))
        >>> result = puffer_jax.load_weights(policy, "model.safetensors")
        >>> result.missing_keys
        []
    """
    path = Path(path)
    with _naming(path):
        _check_padding(path, padding)
        tensors, _ = _read(path, _shapes(policy), padding_of(policy, padding))
        return load_state_dict(policy, tensors, strict, allow_non_finite=allow_non_finite)


def _shapes(policy: nnx.Module) -> dict[str, tuple[int, ...]]:
    return {name: parameter.shape for name, parameter in named_parameters(policy)[0].items()}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _suffix(path: Path) -> str:
    if path.suffix not in _SAVERS:
        what = misnamed(path)
        raise ValueError(
            f"the suffix says the format and must be one of {', '.join(_SAVERS)}"
            + (f"; {what}" if what else "")
        )
    return path.suffix


_SAVERS: dict[str, Callable[[nnx.Module, Path], None]] = {
    ".pt": save_pt,
    ".safetensors": save_safetensors,
    ".bin": save_bin,
}

# Readers are told the shapes to expect if there is a policy; a .bin file does not name its own.
_READERS: dict[str, Callable[[Path, Mapping[str, tuple[int, ...]] | None], Contents]] = {
    ".pt": read_pt,
    ".safetensors": read_safetensors,
}


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]] | None, padding: int = 1) -> Contents:
    suffix = _suffix(path)
    if what := misnamed(path):
        raise ValueError(what)
    return read_bin(path, shapes, padding) if suffix == ".bin" else _READERS[suffix](path, shapes)


def policy_from_checkpoint(
    checkpoint: str | os.PathLike[str] | StateDict,
    env: Env = None,
    *,
    nvec: tuple[int, ...] | int | None = None,
    image_shape: tuple[int, ...] | None = None,
    channels_last: bool = False,
    downsample: int = 1,
    activation: str | None = None,
    action_mask: str | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    allow_non_finite: bool = False,
    padding: int | None = None,
) -> Any:
    """Build the policy a checkpoint was saved from, and load it.

    Class and sizes come from the metadata of our own files, otherwise from keys and shapes. What
    shapes cannot tell comes from `env` or from an argument.

    Args:
        checkpoint: a `.pt`, `.safetensors` or `.bin` file, or a state_dict.
        env: the environment the policy was trained on; gives both spaces.
        nvec: how a fused discrete head splits: 5 for Discrete(5), (2, 3) for MultiDiscrete.
            Not needed for heads of fewer than four rows, which cannot hold two choices.
        image_shape: observation shape of a ProcgenResnet or ImpalaEncoder (H, W, C), or of a
            Convolutional or NatureEncoder to have its sizes checked.
        channels_last: as `Convolutional` or `NatureEncoder` was built.
        downsample: as `Convolutional` or `NatureEncoder` was built.
        activation: as `MLP` was built.
        action_mask: as the policy was built; needs `env`.
        dtype: of the policy's matmuls.
        param_dtype: of its parameters.
        allow_non_finite: see `load_state_dict`.
        padding: of a `.bin` without a sidecar: with `env`, one of PufferLib 4's native trainer.

    Raises:
        ValueError: the keys are not those of a known policy (load a custom one with
            `load_weights`), something that shapes cannot tell was not given, or the file is
            damaged.

    Example:
        >>> import puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.Default(env, hidden_size=32, rngs=nnx.Rngs(0))
        >>> puffer_jax.save_weights(policy, "model.safetensors")
        >>> puffer_jax.policy_from_checkpoint("model.safetensors").hidden_size
        32
    """
    dtypes = Dtypes(dtype=dtype, param_dtype=param_dtype)
    more = image_shape, channels_last, downsample, activation, action_mask
    restore = partial(_restore, Hints(env, nvec, *more), dtypes, allow_non_finite)
    if isinstance(checkpoint, Mapping):
        return restore(checkpoint, None)
    path = Path(checkpoint)
    with _naming(path):
        _check_padding(path, padding)
        if env is not None and path.suffix == ".bin" and is_bare(path):
            policy = native_policy(path, env, padding, dtypes)
            tensors, _ = _read(path, _shapes(policy), padding_of(policy, padding))
            load_state_dict(policy, tensors, allow_non_finite=allow_non_finite)
            return policy
        tensors, description = _read(path, None)
        policy = restore(tensors, description)
        order = list(named_parameters(policy)[0])
        # Only the sidecar said which numbers belong where; a permutation may fit as well.
        if path.suffix == ".bin" and list(tensors) != order:
            raise ValueError(
                f"{sidecar_path(path).name} has the order {list(tensors)}, not {order}"
            )
    return policy


def _restore(
    hints: Hints, dtypes: Dtypes, allow_non_finite: bool, tensors: StateDict, description: Json
) -> Any:
    """The policy that the tensors are of; without a description, by their names and shapes."""
    if description is None:
        named = strip_prefixes(tensors, set())
        shapes = {name: tuple(np.shape(tensor)) for name, tensor in named.items()}
        if problems := obstacles(shapes):
            raise ValueError("; ".join(problems))
        description = infer(shapes, hints)
    policy = build(description, hints.env, dtypes)
    load_state_dict(policy, tensors, allow_non_finite=allow_non_finite)
    return policy
