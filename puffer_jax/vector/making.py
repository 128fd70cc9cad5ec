"""A vecenv of whatever makes environments."""

import difflib
from typing import Any

import numpy as np

from puffer_jax.vector.multiprocessing import Multiprocessing
from puffer_jax.vector.protocol import VecEnv
from puffer_jax.vector.ray import Ray
from puffer_jax.vector.serial import Serial

BACKENDS: dict[str, Any] = {backend.__name__: backend for backend in (Serial, Multiprocessing, Ray)}

_OPTIONS = (
    *("num_workers", "batch_size", "zero_copy", "sync_traj", "overwork"),
    *("timeout", "restart_failed", "num_buffers", "local_worker"),
)


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
            `env_args` and `env_kwargs`, too.
        env_args: positional arguments of the creator.
        env_kwargs: keyword arguments of the creator.
        backend: `Serial`, `Multiprocessing`, `Ray`, or the name of one.
        num_envs: how many environments.
        seed: environment i is made with `seed + i`.
        kwargs: num_workers and batch_size (None or "auto": chosen here, see `Multiprocessing`; an
            "auto" batch is half of the environments), zero_copy, sync_traj, overwork, timeout,
            local_worker (of Multiprocessing), and restart_failed: an environment that raises, and
            those of a worker that dies or hangs, are made anew, with other seeds; the step counts
            as truncated, and infos have {"restarts": how many}; what then fails before it has made
            a step is an error. `Serial` knows the last and its own num_buffers only; as in the
            reference, it makes no more than batch_size environments.

    Raises:
        ValueError: a number that is not possible, or numbers that do not go together.
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
    for name in kwargs:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"no option {name!r}; {hint}There are: {', '.join(_OPTIONS)}")
    if "num_buffers" in kwargs and backend in (Multiprocessing, Ray):
        raise TypeError(f"num_buffers is Serial's; {backend.__name__} has batch_size")
    if "local_worker" in kwargs and backend in (Serial, Ray):
        raise TypeError(f"local_worker is Multiprocessing's; got the backend {backend.__name__}")
    if kwargs.get("num_workers") == "auto":
        kwargs["num_workers"] = None
    if kwargs.get("batch_size") == "auto":
        kwargs["batch_size"] = max(1, num_envs // 2)
    if backend is Serial:
        num_envs = kwargs.get("batch_size") or num_envs

    if isinstance(env_creator_or_creators, list | tuple):
        creators = env_creator_or_creators
        args = [()] * num_envs if env_args is None else env_args
        options = [{}] * num_envs if env_kwargs is None else env_kwargs
    else:
        creators = [env_creator_or_creators] * num_envs
        args = [() if env_args is None else env_args] * num_envs
        options = [{} if env_kwargs is None else env_kwargs] * num_envs
    for name, given in (("creators", creators), ("env_args", args), ("env_kwargs", options)):
        if not isinstance(given, list | tuple) or len(given) != num_envs:
            raise ValueError(
                f"{name} must be a list of num_envs ({num_envs}), as the creators are one; got "
                f"{given!r}"
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
