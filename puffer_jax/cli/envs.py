"""Environments and policies from options."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from puffer_jax import environments, vector
from puffer_jax.cli.options import PolicyOptions, VecOptions
from puffer_jax.environments import host

_INSTALL_PUFFERLIB = "pip install psutil && pip install --no-deps pufferlib-core==3.0.23"


@contextmanager
def _naming_the_flag() -> Iterator[None]:
    """What is wrong with the name of an environment, or with its arguments, is so with --env."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"--env {error}") from error
    except ImportError as error:
        raise ImportError(f"--env {error}") from error


def _native(name: str, arguments: dict[str, Any]) -> Any:
    """A JAX-native environment, or None if the name is not of one."""
    from puffer_jax.environments.jax_native import as_jax_env

    if environments.family(name)[0] not in ("native", "gymnax"):
        return None
    with _naming_the_flag():
        return as_jax_env(environments.make(name, **arguments))


def _make_envs(
    name: str, vec: VecOptions, arguments: dict[str, Any]
) -> tuple[Any, Any, int | None]:
    """What the trainer takes, what a policy takes, and the `num_envs` of a JAX-native one."""
    if vec.num_envs is not None and vec.num_envs < 1:
        raise ValueError(f"--vec.num-envs is {vec.num_envs}; must be positive")
    env = _native(name, arguments)
    if env is not None:
        return env, env, vec.num_envs
    family, known = environments.family(name)
    mode = vec.mode
    if family != "gymnasium":
        if mode not in ("auto", "puffer_jax"):
            raise ValueError(f"--vec.mode {mode} is for gymnasium's, not for --env {name}")
        mode = "puffer_jax"
    if vec.num_buffers != 1 and (mode, vec.backend) != ("puffer_jax", "Serial"):
        raise ValueError(
            f"--vec.num-buffers {vec.num_buffers} is for --vec.mode puffer_jax with the backend "
            f"Serial; got {mode} with {vec.backend}"
        )
    if vec.local_worker and (mode, vec.backend) != ("puffer_jax", "Multiprocessing"):
        raise ValueError(
            f"--vec.local-worker is for --vec.mode puffer_jax with the backend Multiprocessing; "
            f"got {mode} with {vec.backend}"
        )
    count = vec.num_envs or (64 if mode in ("auto", "sync", "vector") else 8)
    if mode == "puffer_jax":
        create = environments.env_creator(name)
        options = _backend(vec, count)
        if vec.backend == "Serial":
            options["num_buffers"] = vec.num_buffers
        else:
            options["local_worker"] = vec.local_worker
        envs = vector.make(create, env_kwargs=arguments, **options)
        return envs, envs.driver_env, None
    with _naming_the_flag():
        host.check_gymnasium(name, known, arguments)
        import gymnasium

        with host.errors(name):
            if mode == "puffer":
                create = partial(gymnasium.make, known, **arguments)
                envs = _make_pufferlib(name, _backend(vec, count), create)
                return envs, envs.driver_env, None
            form = {"auto": None, "vector": "vector_entry_point"}.get(mode, mode)
            envs = gymnasium.make_vec(known, num_envs=count, vectorization_mode=form, **arguments)
            return envs, envs, None


def _backend(vec: VecOptions, count: int) -> dict[str, Any]:
    """The options of a vecenv, of PufferLib's names."""
    options: dict[str, Any] = {"backend": vec.backend, "num_envs": count}
    if vec.backend == "Multiprocessing":
        given = {"num_workers": vec.num_workers, "batch_size": vec.batch_size}
        options |= {n: v for n, v in given.items() if v is not None}
        options["zero_copy"] = vec.zero_copy
    return options


def _make_pufferlib(name: str, options: dict[str, Any], create: Callable[[], Any]) -> Any:
    try:
        import pufferlib.emulation
        import pufferlib.vector
    except ImportError as error:
        raise ImportError(
            f"{name}: --vec.mode puffer needs PufferLib: {_INSTALL_PUFFERLIB}"
        ) from error
    emulated = partial(pufferlib.emulation.GymnasiumPufferEnv, env_creator=create)
    make: Any = pufferlib.vector.make
    return make(emulated, **options)


def make_policy(
    env: Any, options: PolicyOptions, rnn: bool, precision: str = "float32", seed: int = 0
) -> Any:
    """A new policy for an environment.

    Args:
        env: gives the spaces, see `puffer_jax.spaces.env_spec`.
        options: what is not given comes from the observation space or is the policy's default.
        rnn: put an LSTM between its encoder and its heads.
        precision: "float32" or "bfloat16", of matmuls.
        seed: of the weights.

    Raises:
        ValueError: an option the policy does not have, or that does not fit the environment.
    """
    import jax.numpy as jnp
    from flax import nnx

    from puffer_jax.policies.recurrent import with_core

    given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    core = given.pop("core", "lstm" if rnn else None)
    dtype = jnp.bfloat16 if precision == "bfloat16" else None
    rngs = nnx.Rngs(seed)
    policy = environments.Policy(env, **given, rngs=rngs, dtype=dtype)
    if core is None:
        return policy
    return with_core(core, env, policy, rngs=rngs, dtype=dtype)
