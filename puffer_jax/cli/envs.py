"""Environments and policies from options."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from puffer_jax import environments, vector
from puffer_jax.base.packages import PUFFERLIB, require
from puffer_jax.cli.options import PolicyOptions, VecOptions
from puffer_jax.environments import registry
from puffer_jax.environments.families import Arguments
from puffer_jax.environments.jax_native import AdaptedEnv, as_jax_env
from puffer_jax.policies import v4
from puffer_jax.policies.masks import AUTO
from puffer_jax.policies.protocol import is_recurrent
from puffer_jax.policies.recurrent import with_core
from puffer_jax.vector.options import names

_BACKENDS = ("Serial", "Multiprocessing")
# Options of PufferLib's Multiprocessing. A PufferLib file may set them with any backend.
_PUFFERLIBS = ("num_workers", "batch_size", "zero_copy")


@contextmanager
def naming_the_flag() -> Iterator[None]:
    """Put --env before the message of an error about an environment's name or arguments."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"--env {error}") from error
    except ImportError as error:
        raise ImportError(f"--env {error}") from error


def make_jax_env(name: str, arguments: Arguments) -> AdaptedEnv | None:
    """A JAX-native environment, or None if the environment `name` runs on the host."""
    if not registry.find(name)[0].in_jax:
        return None
    with naming_the_flag():
        return as_jax_env(environments.make(name, **arguments))


def info_mask(action_mask: str | None) -> str | None:
    """The mask that an info may hold, of `PolicyOptions.action_mask`."""
    return None if action_mask == AUTO else action_mask


def make_envs(
    name: str, vec: VecOptions, arguments: Arguments, action_mask: str | None = None
) -> tuple[Any, Any, int | None]:
    """What the trainer takes, what a policy takes, and `num_envs` if it is JAX-native."""
    if vec.num_envs is not None and vec.num_envs < 1:
        raise ValueError(f"--vec.num-envs is {vec.num_envs}; must be positive")
    env = make_jax_env(name, arguments)
    if env is not None:
        return env, env, vec.num_envs
    family, known = registry.find(name)
    mode, mask = vec.mode, info_mask(action_mask)
    if mask is not None and mode == "auto":
        mode = "puffer_jax"  # gymnasium's own vector forms cannot be wrapped
    if family.make_vec is None:
        if mode not in ("auto", "puffer_jax"):
            raise ValueError(f"--vec.mode {mode} is for gymnasium's, not for --env {name}")
        mode = "puffer_jax"
    _check_backend(vec, mode)
    count = vec.num_envs or (64 if mode in ("auto", "sync", "vector") else 8)
    if mode == "puffer_jax":
        create = environments.env_creator(name)
        if mask is not None:
            create = partial(create, action_mask=mask)
        options = {n: getattr(vec, n) for n in names(vector.BACKENDS[vec.backend].Options)}
        envs = vector.make(
            create, env_kwargs=arguments, backend=vec.backend, num_envs=count, **options
        )
        return envs, envs.driver_env, None
    with naming_the_flag():
        if mode == "puffer":
            create = partial(registry.create, name, **arguments)
            envs = _make_pufferlib(name, _pufferlib_options(vec, count), create)
            return envs, envs.driver_env, None
        require(family.package, name, family.install)
        form = {"auto": None, "vector": "vector_entry_point"}.get(mode, mode)
        assert family.make_vec is not None  # otherwise the mode is puffer_jax
        envs = family.make_vec(name, known, count, form, arguments)
        return envs, envs, None


def _check_backend(vec: VecOptions, mode: str) -> None:
    """Refuse an option that the mode and backend would ignore."""
    for field in dataclasses.fields(VecOptions):
        backends = [b for b in _BACKENDS if field.name in names(vector.BACKENDS[b].Options)]
        value = getattr(vec, field.name)
        if not backends or field.name in _PUFFERLIBS or value == field.default:
            continue
        if mode != "puffer_jax" or vec.backend not in backends:
            flag = f"--vec.{field.name.replace('_', '-')}"
            raise ValueError(
                f"{flag if value is True else f'{flag} {value}'} is for --vec.mode puffer_jax with "
                f"the backend {' or '.join(backends)}; got {mode} with {vec.backend}"
            )


def _pufferlib_options(vec: VecOptions, count: int) -> dict[str, object]:
    options: dict[str, object] = {"backend": vec.backend, "num_envs": count}
    if vec.backend == "Multiprocessing":
        chosen = {name: getattr(vec, name) for name in _PUFFERLIBS}
        options |= {name: value for name, value in chosen.items() if value is not None}
    return options


def _make_pufferlib(name: str, options: dict[str, object], create: Callable[[], object]) -> Any:
    user = f"{name}: --vec.mode puffer"
    emulation = require("pufferlib.emulation", user, PUFFERLIB)
    emulated = partial(emulation.GymnasiumPufferEnv, env_creator=create)
    return require("pufferlib.vector", user, PUFFERLIB).make(emulated, **options)


def make_policy(
    env: Any,
    options: PolicyOptions,
    rnn: bool,
    precision: str = "float32",
    seed: int = 0,
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """A new policy for an environment.

    Args:
        env: gives the spaces, see `puffer_jax.spaces.env_spec`.
        options: an option that is None comes from the observation space, or has the policy's
            default.
        rnn: whether to put an LSTM between the encoder and the heads.
        precision: precision of matmuls, "float32" or "bfloat16".
        seed: seed of the weights.
        rngs: of the weights, in place of the seed.

    Raises:
        ValueError: an option that the policy does not have or that does not fit the environment.
    """
    chosen = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    core = chosen.pop("core", "lstm" if rnn else None)
    dtype = jnp.bfloat16 if precision == "bfloat16" else None
    rngs = nnx.Rngs(seed) if rngs is None else rngs
    if options.name == V4:
        return _make_v4(env, chosen, core, rngs=rngs, dtype=dtype)
    layers = (
        {}
        if core is None or "num_layers" not in chosen
        else {"num_layers": chosen.pop("num_layers")}
    )
    policy = environments.Policy(env, **chosen, rngs=rngs, dtype=dtype)
    if core is None:
        return policy
    return with_core(core, env, policy, rngs=rngs, dtype=dtype, **layers)


V4 = "v4"

_V4_OPTIONS = ("hidden_size", "num_layers", "network", "encoder", "decoder")


def _make_v4(env: Any, chosen: dict[str, Any], core: str | None, **options: Any) -> v4.Policy:
    mask = chosen.pop("action_mask", AUTO)
    others = [name for name in chosen if name not in ("name", *_V4_OPTIONS)]
    if core is not None or others or mask != AUTO:
        others += ["core"] * (core is not None) + ["action_mask"] * (mask != AUTO)
        raise ValueError(
            f"PufferLib 4's policy has {', '.join(_V4_OPTIONS)}; got {', '.join(others)}"
        )
    return v4.Policy.for_env(env, **{n: chosen[n] for n in _V4_OPTIONS if n in chosen}, **options)


def settled(options: PolicyOptions, policy: Any) -> PolicyOptions:
    """The options that make a policy like this one again, whatever other versions' defaults are."""
    if isinstance(policy, v4.Policy):
        network: Any = policy.network
        parts = {n: type(getattr(policy, n)).__name__ for n in ("network", "encoder", "decoder")}
        sizes = {"hidden_size": policy.hidden_size, "num_layers": network.num_layers}
        return dataclasses.replace(options, name=V4, **sizes, **parts)
    inner = policy.policy if is_recurrent(policy) else policy
    known = {field.name for field in dataclasses.fields(PolicyOptions)}
    sizes = {name: getattr(inner, name) for name in inner.sizes if name in known}
    if "hidden_sizes" not in sizes:
        sizes["hidden_size"] = inner.hidden_size
    if is_recurrent(policy) and "num_layers" in getattr(policy.core, "sizes", ()):
        sizes["num_layers"] = policy.core.num_layers
    return dataclasses.replace(options, name=type(inner).__name__, **sizes)
