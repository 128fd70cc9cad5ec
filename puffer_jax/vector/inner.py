"""The environments inside a vecenv's emulated ones, for functions that `VecEnv.apply` calls.

Workers import this, so it imports nothing.
"""

from typing import Any

from puffer_jax.vector.envs import Env


def inner(env: Env) -> Env:
    """The environment that the creator returned, if it was emulated here; or `env` itself."""
    return env.env if env.emulated else env


def get_attribute(env: Env, name: str) -> Any:
    """An attribute of the environment or of what it wraps; `render_mode` is None if it has none.

    Raises:
        AttributeError: there is none of that name.
    """
    env = inner(env)
    # gymnasium's wrappers have a method for this, and hide what they wrap otherwise.
    find = getattr(env, "get_wrapper_attr", None)
    try:
        return getattr(env, name) if find is None else find(name)
    except AttributeError:
        if name == "render_mode":
            return None
        raise


def set_attribute(env: Env, name: str, value: object) -> None:
    """Set an attribute of the environment, not of what it wraps."""
    setattr(inner(env), name, value)


def call_method(env: Env, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a method of the environment, or of what it wraps, returns."""
    return get_attribute(env, name)(*args, **kwargs)


def is_wrapped(env: Env, wrapper: type) -> bool:
    """Whether the environment is a `wrapper`, or wraps one."""
    layer = inner(env)
    while not isinstance(layer, wrapper):
        if (layer := getattr(layer, "env", None)) is None:
            return False
    return True
