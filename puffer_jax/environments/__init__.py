"""Environments by name.

`make` knows the small JAX-native environments of this package, each a
`puffer_jax.jaxenv.JaxEnv`, and those of gymnasium, ALE, minigrid, PettingZoo, and, in JAX, gymnax,
brax, Craftax, JaxMARL, jumanji, navix, pgx and MuJoCo Playground, which are optional. Environments
that run on the host are emulated (`puffer_jax.emulation`), and are made without importing JAX.
Names are imported when first used, as in `puffer_jax`.
"""

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from puffer_jax.base.spaces import Env
from puffer_jax.environments import registry
from puffer_jax.environments.families.native import CLASSES

if TYPE_CHECKING:  # what CLASSES says, for type checkers
    from puffer_jax.environments.cartpole import CartPole as CartPole
    from puffer_jax.environments.ocean import Memory as Memory
    from puffer_jax.environments.ocean import Squared as Squared
    from puffer_jax.environments.probes import ProbeAction as ProbeAction
    from puffer_jax.environments.probes import ProbeDiscount as ProbeDiscount
    from puffer_jax.environments.probes import ProbeMemory as ProbeMemory
    from puffer_jax.environments.probes import ProbeObservationAction as ProbeObservationAction
    from puffer_jax.environments.probes import ProbeObservationValue as ProbeObservationValue
    from puffer_jax.environments.probes import ProbeValue as ProbeValue
    from puffer_jax.environments.wrappers import ActionMask as ActionMask
    from puffer_jax.policies.choice import Policy as Policy

_HOME = {name: f"puffer_jax.environments.{module}" for module, name in CLASSES.values()} | {
    "ActionMask": "puffer_jax.environments.wrappers",
    "Policy": "puffer_jax.policies.choice",
}
__all__ = sorted([*_HOME, "env_creator", "family", "make", "names"])  # type: ignore[reportUnsupportedDunderAll]


def names() -> tuple[str, ...]:
    """The names of the JAX-native environments of this package, sorted.

    Example:
        >>> import puffer_jax
        >>> "cartpole" in puffer_jax.environments.names()
        True
    """
    return tuple(sorted(CLASSES))


def family(name: str) -> tuple[str, str]:
    """The family of the environment `name`, and its id there.

    | name | family |
    |---|---|
    | cartpole, memory, squared, ... (`names()`) | native |
    | gymnax:Breakout-MinAtar | gymnax |
    | brax:ant, craftax:..., jaxmarl:..., jumanji:..., navix:..., pgx:..., playground:... | those |
    | ALE/Breakout-v5 | atari |
    | MiniGrid-Empty-5x5-v0, BabyAI-GoToRedBall-v0 | minigrid |
    | pettingzoo:butterfly/cooperative_pong_v6 | pettingzoo |
    | CartPole-v1, gymnasium:CartPole-v1, module:Id-v0 | gymnasium |
    """
    found, known = registry.find(name)
    return found.name, known


def make(
    name: str,
    *,
    buf: Any = None,
    seed: int | None = 0,
    action_mask: str | None = None,
    **kwargs: object,
) -> Env:
    """Make an environment by its name; see `family`.

    Args:
        name: name of the environment.
        buf: the buffers that an environment on the host writes to
            (`puffer_jax.emulation.set_buffers`); None: its own.
        seed: seed of the first reset of an environment on the host, if that reset gets none.
        action_mask: the key of a mask of legal actions that gymnasium's environment has in its
            info, if not in its observations: it becomes a part of them, see `ActionMask`.
        kwargs: arguments of the environment's constructor; for Atari games, see
            `puffer_jax.environments.families.atari.atari`.

    Returns:
        A `puffer_jax.jaxenv.JaxEnv` (those in JAX), a `GymnasiumPufferEnv` or a
        `PettingZooPufferEnv`.

    Raises:
        ValueError: there is no environment of that name; the message names the nearest.
        TypeError: the constructor takes no such argument.
        ImportError: something is not installed; the message has the line that installs it.

    Example:
        >>> import jax, puffer_jax
        >>> env = puffer_jax.environments.make("cartpole")
        >>> obs, state = env.reset(jax.random.key(0))
        >>> obs.shape
        (4,)
    """
    source, _ = registry.find(name)
    env = registry.create(name, **kwargs)
    if source.in_jax:
        return env
    from puffer_jax.environments import emulation

    if source.multi_agent:
        return emulation.PettingZooPufferEnv(env=env, buf=buf, seed=seed)
    if action_mask is not None:
        from puffer_jax.environments.wrappers import with_mask

        env = with_mask(env, action_mask)
    return emulation.GymnasiumPufferEnv(env=env, buf=buf, seed=seed)


def env_creator(name: str) -> Callable[..., Env]:
    """`make` for one name: a function to give to `puffer_jax.vector.make`; it can be pickled.

    It takes what `make` takes besides the name, and raises the same errors.

    Example:
        >>> import puffer_jax
        >>> creator = puffer_jax.environments.env_creator("CartPole-v1")
        >>> with puffer_jax.vector.make(creator, num_envs=2) as vecenv:
        ...     vecenv.reset(seed=0)[0].shape
        (2, 4)
    """
    return functools.partial(make, name)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'puffer_jax.environments' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
