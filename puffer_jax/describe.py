"""Which policy a checkpoint holds: its class, sizes and spaces as JSON values.

Our own files carry such a description; for a bare state_dict `infer` reads one off the keys
and shapes; `build` makes the policy.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from flax import nnx

from puffer_jax import models, spaces

_SIZES: dict[type, tuple[str, ...]] = {
    models.Default: ("hidden_size",),
    models.Convolutional: (
        "framestack",
        "flat_size",
        "input_size",
        "hidden_size",
        "output_size",
        "channels_last",
        "downsample",
    ),
    models.ProcgenResnet: ("cnn_width", "mlp_width"),
    models.LSTMWrapper: ("input_size", "hidden_size"),
}
_CLASSES = {cls.__name__: cls for cls in _SIZES}
_ACTIONS = {cls.__name__: cls for cls in (spaces.Discrete, spaces.MultiDiscrete, spaces.Continuous)}


def describe(policy: nnx.Module) -> dict[str, Any]:
    """Class, sizes and spaces as JSON values; a custom class gives its name only."""
    sizes = _SIZES.get(type(policy))
    description: dict[str, Any] = {"class": type(policy).__name__}
    if sizes is None:
        return description
    description["sizes"] = {name: getattr(policy, name) for name in sizes}
    spec = policy.env_spec
    observation, action = spec.single_observation_space, spec.single_action_space
    description["observation"] = {
        "shape": observation.shape,
        "structured": None if observation.structured is None else _fields(observation.structured),
        "sample_dtype": observation.sample_dtype and observation.sample_dtype.str,
    }
    description["action"] = {"class": type(action).__name__, **asdict(action)}
    if isinstance(policy, models.LSTMWrapper):
        description["policy"] = describe(policy.policy)
    return description


def build(description: dict[str, Any], env: Any, dtypes: dict[str, Any]) -> Any:
    """The described policy, freshly initialised; the spaces of `env`, if given, win.

    Raises:
        ValueError: a custom class, or a description that lacks something.
    """
    try:
        cls = _CLASSES.get(description["class"])
        if cls is None:
            raise ValueError(
                f"the checkpoint is of a custom policy, {description['class']}; build it yourself "
                "and use load_weights"
            )
        sizes = {name: description["sizes"][name] for name in _SIZES[cls]}
        spec = _spec_from(description) if env is None else spaces.env_spec(env)
        inner = description.get("policy")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the description in the checkpoint is damaged: {error!r}") from error
    rngs = nnx.Rngs(0)
    if cls is models.LSTMWrapper:
        return cls(spec, build(inner, env, dtypes), **sizes, rngs=rngs, **dtypes)
    return cls(spec, **sizes, rngs=rngs, **dtypes)


def _spec_from(description: dict[str, Any]) -> spaces.EnvSpec:
    observation = dict(description["observation"])
    action = dict(description["action"])
    shape = observation["shape"]
    structured = observation["structured"]
    sample_dtype = observation["sample_dtype"]
    cls = _ACTIONS[action.pop("class")]
    return spaces.EnvSpec(
        spaces.Observation(
            None if shape is None else tuple(shape),
            None if structured is None else _dtype_of(structured),
            None if sample_dtype is None else np.dtype(sample_dtype),
        ),
        cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in action.items()}),
    )


def _fields(dtype: np.dtype) -> dict[str, Any]:
    """A structured dtype as JSON; alignment is implied, see `spaces.structured_dtype`."""
    if dtype.names is None:
        return {"dtype": dtype.base.str, "shape": list(dtype.shape)}
    return {"fields": [[name, _fields(dtype[name])] for name in dtype.names]}


def _dtype_of(fields: dict[str, Any]) -> np.dtype:
    if "fields" in fields:
        return np.dtype([(name, _dtype_of(field)) for name, field in fields["fields"]], align=True)
    return np.dtype((fields["dtype"], tuple(fields["shape"])))


def infer(
    shapes: Mapping[str, tuple[int, ...]],
    env: Any,
    nvec: tuple[int, ...] | int | None,
    image_shape: tuple[int, ...] | None,
    image_options: dict[str, Any],
) -> dict[str, Any]:
    """The description of a policy from the keys and shapes of its state_dict.

    Raises:
        ValueError: the keys are those of no known policy, or shapes cannot tell enough.
    """
    recurrent = next((n for n in ("lstm.weight_ih_l0", "cell.weight_ih") if n in shapes), None)
    if recurrent is not None:
        below = {
            name.removeprefix("policy."): shape
            for name, shape in shapes.items()
            if name.startswith("policy.")
        }
        inner = infer(below, env, nvec, image_shape, image_options)
        rows, inputs = shapes[recurrent]
        sizes = {"input_size": inputs, "hidden_size": rows // 4}
        spec = {key: inner[key] for key in ("observation", "action")}
        return {"class": "LSTMWrapper", "sizes": sizes, "policy": inner, **spec}
    if {"encoder.0.weight", "value.weight"} <= shapes.keys():
        hidden, features = shapes["encoder.0.weight"]
        return {
            "class": "Default",
            "sizes": {"hidden_size": hidden},
            "observation": _array(image_shape or (features,)),
            "action": _infer_action(shapes, env, nvec),
        }
    if {"network.0.weight", "network.7.weight", "actor.weight"} <= shapes.keys():
        hidden, flat_size = shapes["network.7.weight"]
        return {
            "class": "Convolutional",
            "sizes": {
                "framestack": shapes["network.0.weight"][1],
                "flat_size": flat_size,
                "input_size": hidden,
                "hidden_size": hidden,
                "output_size": hidden,
                **image_options,
            },
            "observation": _array(image_shape),
            "action": {"class": "Discrete", "n": shapes["actor.weight"][0]},
        }
    if {"network.0.conv.weight", "network.5.weight", "actor.weight"} <= shapes.keys():
        if env is None and image_shape is None:
            raise ValueError(
                "these are the keys of a ProcgenResnet, whose weights do not tell the image size; "
                "pass env or image_shape=(H, W, C)"
            )
        return {
            "class": "ProcgenResnet",
            "sizes": {
                "cnn_width": shapes["network.0.conv.weight"][0],
                "mlp_width": shapes["network.5.weight"][0],
            },
            "observation": _array(image_shape),
            "action": {"class": "Discrete", "n": shapes["actor.weight"][0]},
        }
    raise ValueError(
        "the keys are those of none of Default, Convolutional, ProcgenResnet or an LSTMWrapper "
        f"around one; build your policy and use load_weights. Found: {', '.join(sorted(shapes))}"
    )


def _array(shape: tuple[int, ...] | None) -> dict[str, Any]:
    return {"shape": shape, "structured": None, "sample_dtype": None}


def _infer_action(
    shapes: Mapping[str, tuple[int, ...]], env: Any, nvec: tuple[int, ...] | int | None
) -> dict[str, Any]:
    if "decoder_mean.weight" in shapes:
        return {"class": "Continuous", "shape": (shapes["decoder_mean.weight"][0],)}
    if "decoder.weight" not in shapes:
        raise ValueError("the state_dict has neither decoder.weight nor decoder_mean.weight")
    rows = shapes["decoder.weight"][0]
    if nvec is None and env is None and rows >= 4:
        raise ValueError(
            f"decoder.weight has {rows} rows: Discrete({rows}) or a MultiDiscrete split? Shapes "
            f"cannot tell; pass env, nvec={rows} or nvec=(...) with sum {rows}"
        )
    if isinstance(nvec, tuple | list):
        if sum(nvec) != rows:
            raise ValueError(
                f"nvec={tuple(nvec)} sums to {sum(nvec)}, decoder.weight has {rows} rows"
            )
        return {"class": "MultiDiscrete", "nvec": tuple(nvec)}
    if nvec not in (None, rows):
        raise ValueError(f"nvec={nvec}, but decoder.weight has {rows} rows")
    return {"class": "Discrete", "n": rows}
