"""Environments by name.

`make` knows the small JAX-native environments of this package, each a
`puffer_jax.jaxenv.JaxEnv`. Names are imported when first used, as in `puffer_jax`.
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

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
_HOME = {name: module for module, name in _NATIVE.values()}
__all__ = sorted([*_HOME, "make", "names"])  # type: ignore[reportUnsupportedDunderAll]


def names() -> tuple[str, ...]:
    """The names `make` knows, sorted."""
    return tuple(sorted(_NATIVE))


def make(name: str, **kwargs: Any) -> Any:
    """Make an environment by its name.

    Args:
        name: one of `names()`.
        kwargs: passed to the environment's constructor.

    Raises:
        ValueError: there is no environment of that name; the nearest is named.
        TypeError: the constructor takes no such argument.
    """
    if name in _NATIVE:
        return __getattr__(_NATIVE[name][1])(**kwargs)
    near = difflib.get_close_matches(name.lower(), _NATIVE, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no environment {name!r}; {hint}There are: {', '.join(names())}")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"puffer_jax.environments.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'puffer_jax.environments' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
