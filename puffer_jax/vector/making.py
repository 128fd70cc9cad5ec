"""A vecenv from whatever makes environments."""

from collections.abc import Callable
from typing import Any

import numpy as np

from puffer_jax.base.text import hint
from puffer_jax.vector.multiprocessing import Multiprocessing
from puffer_jax.vector.options import names
from puffer_jax.vector.pool import Pool, settle_batch
from puffer_jax.vector.protocol import VecEnv
from puffer_jax.vector.ray import Ray
from puffer_jax.vector.serial import Serial

BACKENDS: dict[str, type[Serial] | type[Pool]] = {
    backend.__name__: backend for backend in (Serial, Multiprocessing, Ray)
}


def make(
    env_creator_or_creators: Any,
    env_args: Any = None,
    env_kwargs: Any = None,
    backend: Any = Serial,
    num_envs: int = 1,
    seed: int = 0,
    **kwargs: Any,
) -> VecEnv:
    """Many environments as one (`pufferlib.vector.make`).

    Args:
        env_creator_or_creators: what makes an environment of gymnasium, PettingZoo or PufferLib
            (see `puffer_jax.vector.envs.Maker`), or its name
            (`puffer_jax.environments.env_creator`); or a list of `num_envs` of these, and then of
            `env_args` and `env_kwargs` too.
        env_args: positional arguments of the creator.
        env_kwargs: keyword arguments of the creator.
        backend: `Serial`, `Multiprocessing`, `Ray`, or the name of one.
        num_envs: number of environments.
        seed: environment i is made with `seed + i`.
        kwargs: the backend's options, see `puffer_jax.vector.options`. An option that only one
            other backend has is refused, one that several have is ignored; given batch_size,
            `Serial` makes only so many environments, as in the reference.

    Raises:
        ValueError: a number is impossible, or numbers do not fit together.
        TypeError: something is of the wrong type, or there is no such option.
        ImportError: an extra is missing; the message has the line that installs it.
        WorkerError: an environment could not be made in its worker.

    Example:
        >>> import puffer_jax
        >>> with puffer_jax.vector.make("CartPole-v1", num_envs=4) as vecenv:
        ...     obs, infos = vecenv.reset(seed=0)
        ...     obs, rewards, *_ = vecenv.step(vecenv.action_space.sample())
        >>> obs.shape, rewards.shape
        ((4, 4), (4,))
    """
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        backend = BACKENDS[backend]
    if not callable(backend):
        raise TypeError(f"backend must be a class such as Serial, or its name; got {backend!r}")
    if not isinstance(num_envs, int | np.integer) or num_envs < 1:
        raise ValueError(f"num_envs must be an integer of at least 1; got {num_envs!r}")
    kwargs = _own_options(backend, kwargs)
    if backend is Serial:
        num_envs = settle_batch(kwargs.pop("batch_size", None), num_envs)

    if isinstance(env_creator_or_creators, list | tuple):
        creators = env_creator_or_creators
        args = [()] * num_envs if env_args is None else env_args
        options = [{}] * num_envs if env_kwargs is None else env_kwargs
    else:
        creators = [env_creator_or_creators] * num_envs
        args = [() if env_args is None else env_args] * num_envs
        options = [{} if env_kwargs is None else env_kwargs] * num_envs
    for name, values in (("creators", creators), ("env_args", args), ("env_kwargs", options)):
        if not isinstance(values, list | tuple) or len(values) != num_envs:
            raise ValueError(
                f"{name} must be a list of num_envs ({num_envs}), as the creators are one; got "
                f"{values!r}"
            )
    for i, (creator, positional, named) in enumerate(zip(creators, args, options, strict=True)):
        if not (callable(creator) or isinstance(creator, str)):
            raise TypeError(f"creator {i} must be callable, or a name; got {creator!r}")
        if not isinstance(positional, list | tuple):
            raise TypeError(f"env_args of environment {i} must be a list; got {positional!r}")
        if not isinstance(named, dict):
            raise TypeError(f"env_kwargs of environment {i} must be a dict; got {named!r}")
    vecenv: Any = backend(creators, args, options, num_envs, seed=seed, **kwargs)
    return vecenv


def _own_options(backend: Callable[..., object], options: dict[str, Any]) -> dict[str, Any]:
    """The options that the backend takes, and `batch_size`."""
    known = {name: backend.Options for name, backend in BACKENDS.items()}
    own = getattr(backend, "Options", None)
    if own is None:  # not one of ours: it must know its options itself
        return options
    every = dict.fromkeys(name for kind in known.values() for name in names(kind))
    for name in options:
        owners = [owner for owner, kind in known.items() if name in names(kind)]
        if not owners:
            raise TypeError(f"no option {name!r}{hint(name, every)}; there are: {', '.join(every)}")
        if len(owners) == 1 and name not in names(own):
            raise TypeError(
                f"{name} is {owners[0]}'s; {backend.__name__} has {', '.join(names(own))}"
            )
    return {n: value for n, value in options.items() if n in names(own) or n == "batch_size"}
