"""Environments of MuJoCo Playground, which run in JAX."""

import importlib
from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.base.text import near
from puffer_jax.environments.families import Arguments, Family, unknown


def _names() -> Iterable[str]:
    registry = importlib.import_module("mujoco_playground").registry
    return [f"playground:{known}" for known in registry.ALL_ENVS]


def _create(name: str, known: str, arguments: Arguments) -> Env:
    """An environment whose arguments replace those of its config."""
    from puffer_jax.environments.jax_native import as_jax_env

    registry = importlib.import_module("mujoco_playground").registry
    wrappers = importlib.import_module("brax.envs.wrappers.training")
    if known not in registry.ALL_ENVS:
        raise unknown(name, _names())
    config = registry.get_default_config(known)
    options = list(_flat(config.to_dict()))
    if wrong := [argument for argument in arguments if argument not in options]:
        raise TypeError(f"{name}: no such argument: {', '.join(near(wrong, options))}")
    config.update_from_flattened_dict(dict(arguments))
    env = registry.load(known, config=config)
    repeat = config.get("action_repeat", 1)
    return as_jax_env(wrappers.EpisodeWrapper(env, config.episode_length, repeat))


def _flat(options: Arguments) -> Iterable[str]:
    for name, value in options.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in _flat(value))


FAMILY = Family(
    name="playground",
    create=_create,
    names=_names,
    prefixes=("playground:",),
    package="mujoco_playground",
    install="playground",
    in_jax=True,
)
