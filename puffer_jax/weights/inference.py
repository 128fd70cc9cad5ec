"""Which policy a bare state_dict is of, by its keys and shapes."""

from collections.abc import Mapping
from typing import Any


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
    if recurrent is None:
        return _infer_feed_forward(shapes, env, nvec, image_shape, image_options)
    below = {
        name.removeprefix("policy."): shape
        for name, shape in shapes.items()
        if name.startswith("policy.")
    }
    inner = _infer_feed_forward(below, env, nvec, image_shape, image_options)
    rows, inputs = _shape(shapes, recurrent, 2)
    sizes = {"input_size": inputs, "hidden_size": rows // 4}
    spec = {key: inner[key] for key in ("observation", "action")}
    return {"class": "LSTMWrapper", "sizes": sizes, "policy": inner, **spec}


def _infer_feed_forward(
    shapes: Mapping[str, tuple[int, ...]],
    env: Any,
    nvec: tuple[int, ...] | int | None,
    image_shape: tuple[int, ...] | None,
    image_options: dict[str, Any],
) -> dict[str, Any]:
    if {"encoder.0.weight", "value.weight"} <= shapes.keys():
        hidden, features = _shape(shapes, "encoder.0.weight", 2)
        return {
            "class": "Default",
            "sizes": {"hidden_size": hidden},
            "observation": _array(image_shape or (features,)),
            "action": _infer_action(shapes, env, nvec),
        }
    if {"network.0.weight", "network.7.weight", "actor.weight"} <= shapes.keys():
        hidden, flat_size = _shape(shapes, "network.7.weight", 2)
        return {
            "class": "Convolutional",
            "sizes": {
                "framestack": _shape(shapes, "network.0.weight", 4)[1],
                "flat_size": flat_size,
                "input_size": hidden,
                "hidden_size": hidden,
                "output_size": hidden,
                **image_options,
            },
            "observation": _array(image_shape),
            "action": {"class": "Discrete", "n": _shape(shapes, "actor.weight", 2)[0]},
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
                "cnn_width": _shape(shapes, "network.0.conv.weight", 4)[0],
                "mlp_width": _shape(shapes, "network.5.weight", 2)[0],
            },
            "observation": _array(image_shape),
            "action": {"class": "Discrete", "n": _shape(shapes, "actor.weight", 2)[0]},
        }
    raise ValueError(
        "the keys are those of none of Default, Convolutional, ProcgenResnet or an LSTMWrapper "
        f"around one; build your policy and use load_weights. Found: {', '.join(sorted(shapes))}"
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, dimensions: int) -> tuple[int, ...]:
    shape = shapes[name]
    if len(shape) != dimensions:
        raise ValueError(f"{name} has shape {shape}; expected {dimensions} dimensions")
    return shape


def _array(shape: tuple[int, ...] | None) -> dict[str, Any]:
    return {"shape": shape, "structured": None, "sample_dtype": None}


def _infer_action(
    shapes: Mapping[str, tuple[int, ...]], env: Any, nvec: tuple[int, ...] | int | None
) -> dict[str, Any]:
    if "decoder_mean.weight" in shapes:
        return {"class": "Continuous", "shape": _shape(shapes, "decoder_mean.weight", 2)[:1]}
    if "decoder.weight" not in shapes:
        raise ValueError("the state_dict has neither decoder.weight nor decoder_mean.weight")
    rows = _shape(shapes, "decoder.weight", 2)[0]
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
