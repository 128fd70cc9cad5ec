"""Environments of MuJoCo Playground, which run in JAX."""

import importlib
from collections.abc import Iterable
from typing import Any

from puffer_jax.environments.families import Arguments, jax_family


def _registry() -> Any:
    return importlib.import_module("mujoco_playground").registry


def _flat(options: Arguments) -> Iterable[str]:
    for name, value in options.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in _flat(value))


def _options(known: str) -> Iterable[str]:
    return _flat(_registry().get_default_config(known).to_dict())


def _make(known: str, arguments: Arguments) -> object:
    """An environment whose arguments replace those of its config."""
    wrappers = importlib.import_module("brax.envs.wrappers.training")
    config = _registry().get_default_config(known)
    config.update_from_flattened_dict(dict(arguments))
    env = _registry().load(known, config=config)
    repeat = config.get("action_repeat", 1)
    return wrappers.EpisodeWrapper(env, config.episode_length, repeat)


FAMILY = jax_family(
    "playground",
    ids=lambda: _registry().ALL_ENVS,
    make=_make,
    options=_options,
    package="mujoco_playground",
)
