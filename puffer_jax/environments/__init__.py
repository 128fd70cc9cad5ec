"""Environments by name.

`make` knows the small JAX-native environments of this package, each a
`puffer_jax.jaxenv.JaxEnv`, and those of gymnasium, gymnax, ALE, minigrid and PettingZoo; the latter
four are optional. Whatever runs on the host is emulated (`puffer_jax.emulation`), and is made
without importing JAX. Names are imported when first used, as in `puffer_jax`.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from puffer_jax.base.text import near

if TYPE_CHECKING:  # what _NATIVE says, for type checkers
    from puffer_jax.environments.cartpole import CartPole as CartPole
    from puffer_jax.environments.ocean import Memory as Memory
    from puffer_jax.environments.ocean import Squared as Squared
    from puffer_jax.environments.probes import ProbeAction as ProbeAction
    from puffer_jax.environments.probes import ProbeDiscount as ProbeDiscount
    from puffer_jax.environments.probes import ProbeMemory as ProbeMemory
    from puffer_jax.environments.probes import ProbeObservationAction as ProbeObservationAction
    from puffer_jax.environments.probes import ProbeObservationValue as ProbeObservationValue
    from puffer_jax.environments.probes import ProbeValue as ProbeValue
    from puffer_jax.policies.choice import Policy as Policy

_NATIVE = {
    "cartpole": ("cartpole", "CartPole"),
    "memory": ("ocean", "Memory"),
    "probe_action": ("probes", "ProbeAction"),
    "probe_discount": ("probes", "ProbeDiscount"),
    "probe_memory": ("probes", "ProbeMemory"),
    "probe_observation_action": ("probes", "ProbeObservationAction"),
    "probe_observation_value": ("probes", "ProbeObservationValue"),
    "probe_value": ("probes", "ProbeValue"),
    "squared": ("ocean", "Squared"),
}
_HOME = {name: f"puffer_jax.environments.{module}" for module, name in _NATIVE.values()} | {
    "Policy": "puffer_jax.policies.choice"
}
__all__ = sorted([*_HOME, "env_creator", "family", "make", "names"])  # type: ignore[reportUnsupportedDunderAll]

Family = Literal["native", "gymnax", "gymnasium", "atari", "minigrid", "pettingzoo"]
_PREFIXES: dict[str, Family] = {"ALE/": "atari", "MiniGrid-": "minigrid", "BabyAI-": "minigrid"}


def names() -> tuple[str, ...]:
    """The names of the JAX-native environments, sorted.

    Example:
        >>> import puffer_jax
        >>> "cartpole" in puffer_jax.environments.names()
        True
    """
    return tuple(sorted(_NATIVE))


def family(name: str) -> tuple[Family, str]:
    """Whose environment `name` is, and what it is called there.

    | name | family |
    |---|---|
    | cartpole, memory, squared, ... (`names()`) | native |
    | gymnax:Breakout-MinAtar | gymnax |
    | ALE/Breakout-v5 | atari |
    | MiniGrid-Empty-5x5-v0, BabyAI-GoToRedBall-v0 | minigrid |
    | pettingzoo:butterfly/cooperative_pong_v6 | pettingzoo |
    | CartPole-v1, gymnasium:CartPole-v1, module:Id-v0 | gymnasium |
    """
    if name in _NATIVE:
        return "native", name
    prefix, _, rest = name.partition(":")
    match prefix:
        case "gymnasium" | "gymnax" | "pettingzoo":
            return prefix, rest
    for start, whose in _PREFIXES.items():
        if name.startswith(start):
            return whose, name
    return "gymnasium", name


def make(name: str, *, buf: Any = None, seed: int | None = 0, **kwargs: Any) -> Any:
    """Make an environment by its name, see `family`.

    Args:
        name: of the environment.
        buf: of environments on the host: the buffers they write to
            (`puffer_jax.emulation.set_buffers`).
        seed: of the first reset, if that gets none; on the host, too.
        kwargs: passed to the environment's constructor; of ALE's, see
            `puffer_jax.environments.host.atari`.

    Returns:
        A `puffer_jax.jaxenv.JaxEnv` (native, gymnax), a `GymnasiumPufferEnv` or a
        `PettingZooPufferEnv`.

    Raises:
        ValueError: there is no environment of that name; the nearest is named.
        TypeError: the constructor takes no such argument.
        ImportError: something is not installed; the line that installs it is named.

    Example:
        >>> import jax, puffer_jax
        >>> env = puffer_jax.environments.make("cartpole")
        >>> obs, state = env.reset(jax.random.key(0))
        >>> obs.shape
        (4,)
    """
    match family(name):
        case "native", _:
            constructor = __getattr__(_NATIVE[name][1])
            check_arguments(name, constructor, kwargs)
            return constructor(**kwargs)
        case "gymnax", known:
            return _gymnax(name, known, kwargs)
        case whose, _:
            from puffer_jax.environments import emulation, host

            several = whose == "pettingzoo"
            kind = emulation.PettingZooPufferEnv if several else emulation.GymnasiumPufferEnv
            return kind(env=host.create(name, **kwargs), buf=buf, seed=seed)


def env_creator(name: str) -> Callable[..., Any]:
    """`make` of one name: a function to give to `puffer_jax.vector.make`; it can be pickled.

    It takes what `make` takes beyond the name, and raises what that raises.

    Example:
        >>> import puffer_jax
        >>> creator = puffer_jax.environments.env_creator("CartPole-v1")
        >>> with puffer_jax.vector.make(creator, num_envs=2) as vecenv:
        ...     vecenv.reset(seed=0)[0].shape
        (2, 4)
    """
    return functools.partial(make, name)


def unknown(name: str, more: Iterable[str] = (), why: str = "") -> ValueError:
    """The error for a name that is none; names the nearest of ours and of `more`."""
    known = {other.lower(): other for other in (*more, *_NATIVE)}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {known[close[0]]!r}? " if close else ""
    return ValueError(f"no environment {name!r}; {hint}There are: {', '.join(names())}{why}")


def check_arguments(
    name: str, function: Callable[..., Any], given: Iterable[str], more: Iterable[str] = ()
) -> None:
    """Raise TypeError if `function` does not take all that is `given`, nor `more` has it."""
    known = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    wrong = [argument for argument in given if argument not in {*known, *more}]
    if wrong:
        raise TypeError(f"{name}: no such argument: {', '.join(near(wrong, [*known, *more]))}")


def _gymnax(name: str, known: str, arguments: dict[str, Any]) -> Any:
    try:
        import gymnax
    except ImportError as error:
        raise ImportError(f"{name} needs gymnax: pip install gymnax six") from error
    from puffer_jax.environments.jax_native import as_jax_env

    if known not in gymnax.registered_envs:
        raise ValueError(
            f"no such environment in gymnax: {near([known], gymnax.registered_envs)[0]}"
        )
    check_arguments(name, type(gymnax.make(known)[0]), arguments)
    return as_jax_env(gymnax.make(known, **arguments))


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'puffer_jax.environments' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
