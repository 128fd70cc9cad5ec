"""PufferLib 4's `.ini` files: what they ask for, by the names that it has here."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from puffer_jax.base.text import near
from puffer_jax.ppo.presets import read_ini

Sections = Mapping[str, Mapping[str, Any]]

# By section: what is used, and what only its own trainer has a use for.
_USED = {
    "base": ("env_name", "seed", "checkpoint_dir", "checkpoint_interval", "reset_state"),
    "vec": ("total_agents",),
    "policy": ("hidden_size", "num_layers"),
    "torch": ("network", "encoder", "decoder"),
}
_UNUSED = {
    "base": tuple(
        "rank world_size gpu_id nccl_id profile log_dir eval_episodes cudagraphs".split()
    ),
    "vec": ("num_buffers", "num_threads"),
    "policy": ("expansion_factor",),
    "train": ("gpus",),
}
_SECTIONS = ("base", "vec", "env", "policy", "torch", "train", "sweep")

# What only such a file has.
_SIGNS = {
    "vec": {"total_agents", "num_buffers", "num_threads"},
    "policy": {"num_layers", "expansion_factor"},
    "train": {"horizon", "replay_ratio", "beta1", "beta2", "eps"},
}


class V4Ini(NamedTuple):
    """A PufferLib 4 `.ini` file.

    Attributes:
        env_name: the environment, by PufferLib's name; None: the file names none.
        env: keyword arguments for it.
        policy: arguments of `puffer_jax.v4.Policy.for_env`: widths, and the parts' names.
        train: arguments of `puffer_jax.PuffeRLConfig.v4`.
        unused: a line about what has no meaning here; None: all of it has.
    """

    env_name: str | None
    env: dict[str, Any]
    policy: dict[str, Any]
    train: dict[str, Any]
    unused: str | None


def is_v4(sections: Sections) -> bool:
    """Whether the sections are those of a file of PufferLib 4, not 3."""
    if "core" in sections.get("policy", {}):  # a preset of ours
        return False
    signs = (names & sections.get(section, {}).keys() for section, names in _SIGNS.items())
    return "torch" in sections or any(signs)


def load_ini(path: str | Path, sections: Sections | None = None) -> V4Ini:
    """Read a PufferLib 4 `.ini` file.

    `[base] checkpoint_dir` is our `data_dir`, and `[vec] total_agents` our `num_envs`; without
    `reset_state` the state is carried from one epoch to the next (`store_initial_state`).

    Args:
        path: the file.
        sections: its contents, if they are read already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no `.ini` file, or has a section or key that PufferLib 4's do not have.

    Example:
        >>> from puffer_jax import v4
        >>> lines = "[vec]", "total_agents = 64", "num_buffers = 2", "[train]", "horizon = 32"
        >>> with open("x.ini", "w") as file:
        ...     print(*lines, sep=chr(10), file=file)
        >>> read = v4.load_ini("x.ini")
        >>> read.train
        {'horizon': 32, 'num_envs': 64}
        >>> read.unused
        "x.ini: PufferLib 4's, with no meaning here: [vec] num_buffers"
    """
    sections = read_ini(path) if sections is None else sections
    _check(path, "section", {name.partition(".")[0] for name in sections}, _SECTIONS)
    given = {name: dict(sections.get(name, {})) for name in _SECTIONS}
    for name, used in _USED.items():
        _check(path, f"key in [{name}]", given[name], [*used, *_UNUSED.get(name, ())])
    unused = [
        f"[{section}] {', '.join(found)}"
        for section, names in _UNUSED.items()
        if (found := [name for name in names if name in given[section]])
    ]
    unused += ["[sweep]"] if any(name.partition(".")[0] == "sweep" for name in sections) else []
    base, train = given["base"], given["train"]
    train = {name: value for name, value in train.items() if name not in _UNUSED["train"]}
    if train.get("anneal_lr") in (0, 1):
        train["anneal_lr"] = bool(train["anneal_lr"])
    if "total_agents" in given["vec"]:
        train["num_envs"] = given["vec"]["total_agents"]
    if "reset_state" in base:
        train["store_initial_state"] = base["reset_state"] in (False, 0)
    for theirs, ours in (
        ("checkpoint_dir", "data_dir"),
        ("checkpoint_interval", "checkpoint_interval"),
    ):
        if theirs in base:
            train[ours] = base[theirs]
    if "seed" in base:
        train.setdefault("seed", base["seed"])
    policy = {name: given["policy"][name] for name in _USED["policy"] if name in given["policy"]}
    return V4Ini(
        None if base.get("env_name") in (None, "None") else str(base["env_name"]),
        given["env"],
        policy | given["torch"],
        train,
        f"{path}: PufferLib 4's, with no meaning here: {'; '.join(unused)}" if unused else None,
    )


def _check(path: str | Path, what: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{path}: no such {what}: {', '.join(near(unknown, known))}")
