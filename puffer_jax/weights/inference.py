"""Which policy a bare state_dict belongs to, by its keys and shapes."""

from collections.abc import Mapping

from puffer_jax.nn.cores import CORES
from puffer_jax.nn.params import Shape
from puffer_jax.policies.base import Description, Hints
from puffer_jax.policies.registry import FEED_FORWARD, RECURRENT, WHOLE


def infer(shapes: Mapping[str, Shape], hints: Hints) -> Description:
    """The description of a policy from the keys and shapes of its state_dict.

    Raises:
        ValueError: the keys are not those of a known policy, or the shapes do not tell enough.
    """
    for cls in WHOLE.values():
        found = cls.from_keys(shapes, hints)
        if found is not None:
            return found
    for cls in RECURRENT.values():
        found = cls.from_keys(shapes, hints)
        if found is not None:
            below = {
                name.removeprefix("policy."): shape
                for name, shape in shapes.items()
                if name.startswith("policy.")
            }
            inner = _infer_feed_forward(below, hints)
            return {**found, "policy": inner, **{n: inner[n] for n in ("observation", "action")}}
    return _infer_feed_forward(shapes, hints)


def _infer_feed_forward(shapes: Mapping[str, Shape], hints: Hints) -> Description:
    for cls in FEED_FORWARD.values():
        found = cls.from_keys(shapes, hints)
        if found is not None:
            return (
                found if hints.action_mask is None else found | {"action_mask": hints.action_mask}
            )
    raise ValueError(
        f"the keys belong to none of {', '.join(FEED_FORWARD)}, alone or around a recurrent core "
        f"({', '.join(CORES)}), nor to PufferLib 4's Policy; build your policy and use "
        f"load_weights. Found: {', '.join(sorted(shapes))}"
    )
