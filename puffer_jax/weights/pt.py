"""`.pt`: the state_dict that PufferLib's trainer writes and reads."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from puffer_jax.base.files import write_atomically
from puffer_jax.base.packages import TORCH, require
from puffer_jax.base.text import Json
from puffer_jax.weights.state_dicts import StateDict, named_parameters


def import_torch() -> Any:
    """The package torch, if its loader is safe.

    Raises:
        ImportError: torch is missing or older than 2.10; the message says how to install it.
    """
    # From this version on, torch's loader is safe against hostile files.
    note = " (.safetensors needs nothing more)"
    return require("torch", "a .pt file", TORCH, oldest=(2, 10), note=note)


def save_pt(policy: nnx.Module, path: Path) -> None:
    """Write the file."""
    torch = import_torch()

    def to_tensor(array: np.ndarray) -> Any:
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.astype(np.float32)).bfloat16()
        return torch.from_numpy(array)

    parameters, aliases = named_parameters(policy)
    tensors = OrderedDict((name, to_tensor(p.to_torch())) for name, p in parameters.items())
    # The same tensor under both names: torch then stores it once, as the reference does.
    tensors.update((alias, tensors[name]) for alias, name in aliases.items())
    write_atomically(path, lambda file: torch.save(tensors, file))


# What a reader gives: tensors under torch's names, and the policy's description if there is one.
Contents = tuple[StateDict, Json]


def read_pt(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> Contents:
    """Read the file; it names its own shapes.

    Raises:
        ValueError: it holds anything but tensors under names.
    """
    torch = import_torch()
    with open(path, "rb") as file:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        # A damaged pickle is a program gone wrong: it can raise any exception.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                "not a readable state_dict. It is refused unless torch.load with "
                "weights_only=True accepts it, since unpickling anything else can run code. If "
                f"it holds a whole module, save module.state_dict() instead. ({reason})"
            ) from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"holds a {type(tensors).__name__}, not a state_dict")
    others = [
        str(name)
        for name, tensor in tensors.items()
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor))
    ]
    if others:
        raise ValueError(f"not a state_dict; these do not name tensors: {', '.join(others)}")
    # A view that repeats one number claims any size, and a policy of that size would be built.
    hollow = [str(name) for name, t in tensors.items() if not _is_dense(t, torch)]
    if hollow:
        raise ValueError(f"tensors that do not hold their own numbers: {', '.join(hollow)}")
    return dict(tensors), None


def _is_dense(tensor: Any, torch: Any) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
