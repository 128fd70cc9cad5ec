"""Which policy a checkpoint holds: its class, sizes and spaces as JSON values.

Our own files carry such a description; for a bare state_dict, `infer` reads it off the keys
and shapes; `build` makes the policy.
"""

from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from puffer_jax.base import spaces
from puffer_jax.base.text import Json
from puffer_jax.nn.params import merge, split
from puffer_jax.policies.base import Description, Dtypes
from puffer_jax.policies.registry import POLICIES, RECURRENT

_ACTIONS = {cls.__name__: cls for cls in (spaces.Discrete, spaces.MultiDiscrete, spaces.Continuous)}


def describe(policy: Any) -> Description:
    """Class, sizes and spaces as JSON values; a custom class gives its full name only."""
    cls = type(policy)
    if POLICIES.get(cls.__name__) is not cls:
        return {"class": f"{cls.__module__}.{cls.__qualname__}"}
    description = {"class": cls.__name__, **policy.described()}
    spec = policy.env_spec
    observation, action = spec.single_observation_space, spec.single_action_space
    description["observation"] = {
        "shape": observation.shape,
        "structured": None if observation.structured is None else _fields(observation.structured),
        "sample_dtype": observation.sample_dtype and observation.sample_dtype.str,
    }
    description["action"] = {"class": type(action).__name__, **asdict(action)}
    if cls.__name__ in RECURRENT:
        description["policy"] = describe(policy.policy)
    return description


def build(description: Json, env: spaces.Env, dtypes: Dtypes) -> Any:
    """The described policy with abstract parameters (`jax.ShapeDtypeStruct`), to be loaded.

    A description comes from a file and may say anything. Nothing is allocated for it: only loading
    the tensors shows whether its sizes are theirs.

    Args:
        description: from `describe`, as JSON gives it back, or from `infer`.
        env: gives the spaces; None: those that are described.
        dtypes: those of the policy.

    Raises:
        ValueError: the class is a custom one, or the description lacks something.
    """
    spec = None if env is None else spaces.env_spec(env)
    graphdefs = []

    def parameters() -> dict[str, PyTree]:
        graphdef, params = split(_construct(description, spec, dtypes))
        graphdefs.append(graphdef)
        return params

    try:
        params = jax.eval_shape(parameters)
    except ValueError:
        raise
    # Values of a wrong type or range fail wherever they are first used.
    except Exception as error:
        raise ValueError(f"the description of the policy is damaged: {error!r}") from error
    return merge(graphdefs[0], params)


def _construct(description: Json, spec: spaces.EnvSpec | None, dtypes: Dtypes) -> Any:
    cls = POLICIES.get(description["class"])
    if cls is None:
        raise ValueError(
            f"the checkpoint is of a custom policy, {description['class']}; build it yourself "
            "and use load_weights"
        )
    options: dict[str, Any] = {"rngs": nnx.Rngs(0), **dtypes}
    if "policy" in description:
        inner = description["policy"]
        if "policy" in inner:
            raise ValueError(
                "the description of the policy is damaged: recurrent policies are not nested"
            )
        options["policy"] = _construct(inner, spec, dtypes)
    env = _spec_from(description) if spec is None else spec
    return cls.rebuild(env, description, **options)


def _spec_from(description: Description) -> spaces.EnvSpec:
    observation = dict(description["observation"])
    action = dict(description["action"])
    shape = observation["shape"]
    structured = observation["structured"]
    sample_dtype = observation["sample_dtype"]
    cls: Any = _ACTIONS[action.pop("class")]
    return spaces.EnvSpec(
        spaces.Observation(
            None if shape is None else tuple(shape),
            None if structured is None else _dtype_of(structured),
            None if sample_dtype is None else np.dtype(sample_dtype),
        ),
        cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in action.items()}),
    )


def _fields(dtype: np.dtype) -> Description:
    """A structured dtype as JSON; alignment is implied, see `spaces.structured_dtype`."""
    if dtype.names is None:
        return {"dtype": dtype.base.str, "shape": list(dtype.shape)}
    return {"fields": [[name, _fields(dtype[name])] for name in dtype.names]}


def _dtype_of(fields: Description) -> np.dtype:
    if "fields" in fields:
        return np.dtype([(name, _dtype_of(field)) for name, field in fields["fields"]], align=True)
    return np.dtype((fields["dtype"], tuple(fields["shape"])))
