"""Files and state_dicts of other libraries: what they are, and what to do with them."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

# Both of torch's forms: a zip archive, and before version 1.6 a pickle of a number of its own.
_TORCH = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9")

# The name of a global that weights_only=True refuses, in torch's message.
_GLOBAL = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

# Names of what a layer computes its weight from -> what undoes it, in torch.
_PARAMETRISED = {
    r"(?P<module>.*\.)?parametrizations\.(?P<name>.+)\.original\d*": (
        "torch.nn.utils.parametrize.remove_parametrizations(layer, name)"
    ),
    r"(?P<module>.*\.)?(?P<name>(weight|bias)\w*)_[gv]": "torch.nn.utils.remove_weight_norm(layer)",
    r"(?P<module>.*\.)?(?P<name>(weight|bias)\w*)_orig": (
        "torch.nn.utils.remove_spectral_norm(layer), or torch.nn.utils.prune.remove(layer, name)"
    ),
}

# A layer of a recurrent core that is not its first, or runs backwards.
_MORE_CORE = re.compile(
    r"(?P<module>.*\.)?(weight|bias)_(ih|hh|hr)_l(?P<layer>\d+)(?P<back>_reverse)?"
)

# PufferLib 4's networks, which have any number of layers.
_LAYERED = ("network.lstm.", "network.gru.")


def format_of(path: Path) -> str | None:
    """The suffix that a file's first bytes speak for, `.pt` or `.safetensors`; None: unknown."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(_TORCH):
        return ".pt"
    length = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and 2 <= length <= path.stat().st_size - 8:
        return ".safetensors"
    return None


def misnamed(path: Path) -> str | None:
    """What to say of a file whose content is of another format than its suffix; None: nothing."""
    suffix = format_of(path) if path.is_file() else None
    if suffix is None and path.suffix == ".bin" and path.is_file() and _is_pickle(path):
        return (
            "it is a pickle by its first bytes, which is not unpickled, since that can run code; "
            "in torch, `torch.save(module.state_dict(), 'x.pt')` writes what is read here"
        )
    if suffix in (None, path.suffix):
        return None
    kind = "torch" if suffix == ".pt" else "safetensors"
    return f"it is a {kind} file by its first bytes; rename it to {path.stem}{suffix}"


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle of protocol 4 or 5, whose first frame has its length in front."""
    with open(path, "rb") as file:
        start = file.read(11)
    frame = int.from_bytes(start[3:], "little")
    return start[:3] in (b"\x80\x04\x95", b"\x80\x05\x95") and frame <= path.stat().st_size - 11


def refusal(error: Exception) -> str:
    """Why torch did not read a file, without its advice to read it unsafely."""
    text = _COLOUR.sub("", str(error))
    if found := _GLOBAL.search(text):
        return (
            f"it holds a {found[1]}. If it is a training checkpoint, save only its state_dict, say "
            '`torch.save(checkpoint["model"], path)`'
        )
    # Its first words are the same for all refusals; the reason comes after them.
    reason = text.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    reason = reason.splitlines()[0]
    return type(error).__name__ if reason.startswith("Weights only load failed") else reason


def one_level_down(content: Mapping[Any, Any], is_tensor: type) -> str | None:
    """What to say of a checkpoint in which a state_dict is one of several values; None: nothing."""
    inner = [
        name
        for name, value in content.items()
        if isinstance(value, Mapping)
        and value
        and all(isinstance(tensor, is_tensor) for tensor in value.values())
    ]
    if not inner:
        return None
    return (
        f"the state_dict is one level down, under {' or '.join(map(repr, inner))}; save it by "
        f"itself, `torch.save(checkpoint[{inner[0]!r}], path)`"
    )


def obstacles(names: Iterable[str], known: Collection[str] | None = None) -> list[str]:
    """Why loading the keys that a policy has would not give the policy that was saved.

    Args:
        names: those of the state_dict.
        known: those of the policy; only what concerns them counts. None: everything counts.
    """
    new = [name for name in names if known is None or name not in known]
    return _parametrised(new, known) + _more_layers(new, known)


def _parametrised(names: Iterable[str], known: Collection[str] | None) -> list[str]:
    found: dict[str, list[str]] = {}
    for name in names:
        for pattern, undo in _PARAMETRISED.items():
            match = re.fullmatch(pattern, name)
            if match and (known is None or f"{match['module'] or ''}{match['name']}" in known):
                found.setdefault(undo, []).append(name)
    return [
        f"{', '.join(parts)}: a layer computes its weight from them; in torch, fold them first "
        f"with {undo}, and save again"
        for undo, parts in found.items()
    ]


def _more_layers(names: Iterable[str], known: Collection[str] | None) -> list[str]:
    found: dict[str, list[str]] = {}
    for name in names:
        match = _MORE_CORE.fullmatch(name)
        if match is None or (match["layer"] == "0" and not match["back"]):
            continue
        if known is None and match["module"] in _LAYERED and not match["back"]:
            continue
        first = f"{match['module'] or ''}weight_ih_l0"
        if known is None or first in known:
            which = "a way back (bidirectional)" if match["back"] else "more layers (num_layers)"
            found.setdefault(which, []).append(name)
    return [
        f"{', '.join(parts)}: the recurrent core has {which}, which those here do not"
        for which, parts in found.items()
    ]
