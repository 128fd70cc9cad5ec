"""What must be the same in all processes that train one policy."""

import dataclasses
import inspect
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

import puffer_jax
from puffer_jax.base.spaces import env_spec
from puffer_jax.ppo.config import PuffeRLConfig

Parts = dict[str, dict[str, Any]]


def fingerprint(config: PuffeRLConfig, spaces: Any, policy: nnx.Module, mesh: Mesh | None) -> Parts:
    """By part and name what a training depends on; see `puffer_jax.run.processes.check_same`.

    Args:
        config: its options.
        spaces: has the environment's observation and action space.
        policy: its classes, by their source, and the shapes of its parameters.
        mesh: the devices.
    """
    spec = env_spec(spaces)
    state = nnx.state(policy)
    shapes = {
        jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree.leaves_with_path(state)
    }
    kinds = {type(module) for _, module in nnx.iter_modules(policy)}
    sources = {f"source of {kind.__qualname__}": _source(kind) for kind in kinds}
    devices = [] if mesh is None else [f"{d.device_kind} {d.id}" for d in mesh.devices.flat]
    return {
        "code": {"jax": jax.__version__, "flax": version("flax"), "puffer_jax": _of_the_house()},
        "config": dataclasses.asdict(config),
        "policy": {"class": type(policy).__qualname__} | shapes | sources,
        "environment": {
            "observation": repr(spec.single_observation_space),
            "action": repr(spec.single_action_space),
        },
        "devices": {"mesh": " ".join(devices)},
    }


def _source(kind: type) -> str:
    try:
        text = inspect.getsource(kind)
    except (OSError, TypeError):  # made in an interpreter
        return ""
    return sha256(text.encode()).hexdigest()[:12]


@cache
def _of_the_house() -> str:
    """The version, and a hash of all files of the package."""
    folder = Path(puffer_jax.__file__).parent
    digest = sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return f"{puffer_jax.__version__} {digest.hexdigest()[:12]}"
