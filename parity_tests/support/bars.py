"""The numerical bars, and what comparing needs; imports neither torch nor the reference."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

# The design's table: largest error relative to the largest magnitude of the compared array.
BARS = {
    "forward": {"float64": 1e-14, "float32": 5e-6},
    "gradient": {"float64": 1e-13, "float32": 2e-5},
    # New parameters after optimizer steps on the same batch.
    "update": {"float64": 1e-12, "float32": 1e-5},
}
# Our float32 error against the float64 result, in units of torch's own.
FLOAT32_RATIO = 2
# One bfloat16 rounding is 4e-3; a policy makes a handful.
BFLOAT16 = 3e-2

Outputs = dict[str, Any]


def stub_env(observation_space: Any, action_space: Any, **more: Any) -> SimpleNamespace:
    """All of a vectorised environment that a policy of either side may look at."""
    return SimpleNamespace(
        single_observation_space=observation_space,
        single_action_space=action_space,
        observation_space=observation_space,
        action_space=action_space,
        **more,
    )


def named(logits: Any, values: Any, state: Mapping[str, Any] | None = None) -> Outputs:
    """What a policy of either side returns, as a flat dict."""
    if hasattr(logits, "loc"):
        outputs = {"loc": logits.loc, "scale": logits.scale}
    elif isinstance(logits, tuple):
        outputs = {f"logits.{i}": component for i, component in enumerate(logits)}
    else:
        outputs = {"logits": logits}
    state = {} if state is None else {f"state.{name}": state[name] for name in sorted(state)}
    return {**outputs, "values": values, **state}


def prefixed(prefix: str, outputs: Outputs) -> Outputs:
    return {f"{prefix}.{name}": value for name, value in outputs.items()}


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the largest magnitude of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert np.isfinite(ours).all() and np.isfinite(theirs).all()
    difference, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
    if scale == 0:
        return 0.0 if difference == 0 else np.inf
    return float(difference / scale)


# The worst errors of this session: (policy, kind, dtype) -> error.
worst: dict[tuple[str, str, str], float] = {}


def record(policy: str, kind: str, dtype: str, error: float) -> None:
    key = (policy, kind, dtype)
    worst[key] = max(worst.get(key, 0.0), error)


def assert_arrays_close(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], kind: str, dtype: str, policy: str = ""
) -> None:
    """Same names in the same order, same shapes, and every array within the bar."""
    assert list(ours) == list(theirs)
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    outside = {name: error for name, error in errors.items() if error > BARS[kind][dtype]}
    assert not outside, f"{kind} in {dtype}, bar {BARS[kind][dtype]}: {outside}"
    record(policy, kind, dtype, max(errors.values()))
