"""The small JAX-native environments of this package."""

import importlib

from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, check_arguments

CLASSES = {
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
"""Where each is: the module in `puffer_jax.environments`, and the class."""


def _create(name: str, known: str, arguments: Arguments) -> Env:
    module, kind = CLASSES[known]
    constructor = getattr(importlib.import_module(f"puffer_jax.environments.{module}"), kind)
    check_arguments(name, constructor, arguments)
    return constructor(**arguments)


FAMILY = Family(name="native", create=_create, names=lambda: CLASSES, in_jax=True)
