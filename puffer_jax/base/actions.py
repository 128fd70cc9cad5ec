"""From what a policy chooses to what an environment accepts."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from puffer_jax.base.spaces import Env, Space, kind_of


def playable(actions: Any, env: Env | Space) -> Any:
    """A policy's actions as the environment accepts them.

    Those of a Box are clipped to its bounds (a Gaussian has none) and have its dtype; those of a
    Discrete or MultiDiscrete that does not start at 0 are moved to where it starts. The trainer
    does this with every action; what it learns from, and what `sample_logits` scores, is the
    policy's own.

    Args:
        actions: (..., *shape) of one action, as `sample_logits` returns them; NumPy's or JAX's.
        env: an environment, single or a vector, or the action space of one agent.

    Returns:
        A new NumPy array, which the environment may write to; of JAX's within a `jax.jit`.

    Raises:
        ValueError: the space is a Box of integers; or it has parts, which emulation takes apart.

    Example:
        >>> import numpy as np, puffer_jax
        >>> from puffer_jax.spaces import Box
        >>> puffer_jax.playable(np.array([[0.5], [3.0]], np.float32), Box(-2, 2, (1,)))
        array([[0.5],
               [2. ]], dtype=float32)
    """
    return way_into(action_space_of(env))(actions)


def way_into(space: Space) -> Callable[[Any], Any]:
    """`playable` for one action space, worked out once.

    Raises:
        ValueError: as in `playable`.
    """
    check_playable(space)
    is_box, dtype = kind_of(space) == "box", getattr(space, "dtype", None)
    start = np.asarray(getattr(space, "start", 0))
    starts_at_0 = not start.any()
    low = high = start
    if is_box:
        low, high = (np.asarray(bound, dtype) for bound in (space.low, space.high))

    def play(actions: Any) -> Any:
        jax = sys.modules.get("jax")
        if jax is not None and isinstance(actions, jax.core.Tracer):
            return _traced(actions, space, jax)
        actions = np.asarray(actions)
        if is_box:
            # In the wider dtype of the two, so that no bound is rounded. (np.clip takes 8 us.)
            return np.minimum(np.maximum(actions, low), high).astype(dtype)
        if not starts_at_0:
            return (actions + start).astype(actions.dtype if dtype is None else dtype)
        if dtype is not None and not np.can_cast(actions.dtype, dtype):
            return actions.astype(dtype)
        return np.array(actions)

    return play


def action_space_of(env: Env | Space) -> Space:
    """The action space of one agent of an environment, or `env` itself if it is a space."""
    for name in ("single_action_space", "action_space"):
        space = getattr(env, name, None)
        if space is not None:
            return space
    return env


def check_playable(space: Space) -> None:
    """Check that a policy can act in the space.

    Raises:
        ValueError: it cannot.
    """
    kind = kind_of(space)
    if kind == "box" and np.dtype(space.dtype).kind in "biu":
        raise ValueError(
            f"{space} is a Box of integers ({np.dtype(space.dtype)}), and a policy's actions in a "
            "Box are real numbers: use MultiDiscrete, one component for each of its numbers (with "
            "`start`, if they do not begin at 0), or a Box of floats that the environment rounds"
        )
    if kind not in ("box", "discrete", "multidiscrete"):
        raise ValueError(
            f"policies act in Discrete, MultiDiscrete and Box; got {space}: the environment must "
            "be emulated (puffer_jax.emulation, puffer_jax.vector.make)"
        )


def _traced(actions: Any, space: Space, jax: Any) -> Any:
    if kind_of(space) == "box":
        dtype = jax.dtypes.canonicalize_dtype(space.dtype)
        low, high = (np.asarray(bound, space.dtype) for bound in (space.low, space.high))
        return actions.clip(*_within(low, high, actions.dtype)).astype(dtype)
    start = np.asarray(getattr(space, "start", 0))
    last = start + np.asarray(getattr(space, "nvec", getattr(space, "n", None))) - 1
    if np.any(last > np.iinfo(actions.dtype).max):
        raise ValueError(f"{space} goes beyond {actions.dtype}, the dtype of the actions")
    return actions + start.astype(actions.dtype) if start.any() else actions


def _within(low: np.ndarray, high: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The bounds in a dtype that may not have them: rounded into the space."""
    with np.errstate(over="ignore"):  # a bound that is too large for it is none
        lowest, highest = low.astype(dtype), high.astype(dtype)
    return (
        np.where(lowest < low, np.nextafter(lowest, highest), lowest).astype(dtype),
        np.where(highest > high, np.nextafter(highest, lowest), highest).astype(dtype),
    )
