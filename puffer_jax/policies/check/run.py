"""A policy under test: its observations, and its outputs on them."""

import textwrap
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from puffer_jax.base import spaces
from puffer_jax.nn.distributions import Normal
from puffer_jax.nn.params import merge, split
from puffer_jax.policies.drawing import draw, draw_packed
from puffer_jax.policies.protocol import is_recurrent, masked_by

_RANDOM = ("random", "random 2", "random 3")

_KINDS = ("zero", "lowest", "highest", *_RANDOM)

_TIME = 3

# Relative to the largest magnitude. Other batch sizes, or jit, round differently, in bfloat16 by a
# percent; the same program on the same row does not.
_CLOSE, _SAME = 2e-2, 1e-5

_Outputs = Mapping[str, Any]  # arrays by name, or whatever a faulty policy gives


class _Broken(Exception):
    """A rule is broken: how, and what to do about it."""


def _require(condition: object, otherwise: str) -> None:
    if not condition:
        raise _Broken(otherwise)


def _describe(error: Exception) -> str:
    if isinstance(error, _Broken):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 300)}"


class _Run:
    """A policy under test, its observations, and its outputs on them."""

    def __init__(self, policy: Any, env: spaces.Env, batch: int, seed: int):
        spec = spaces.env_spec(env)
        self.layout, self.action = spec.single_observation_space, spec.single_action_space
        self.space = getattr(env, "single_observation_space", None)
        self.space = env.observation_space if self.space is None else self.space
        self.policy, self.batch, self.rng = policy, batch, np.random.default_rng(seed)
        self.recurrent = is_recurrent(policy)
        self.observations = {kind: self.draw(kind, batch) for kind in _KINDS}
        self.outputs: dict[str, dict[str, np.ndarray]] = {}
        self.traces = 0

    def draw(self, kind: str, count: int) -> PyTree:
        structured, sample = self.layout.structured, self.layout.sample_dtype
        if sample is None or structured is None:
            return jax.tree.map(jnp.asarray, draw(self.space, kind, count, self.rng))
        return jnp.asarray(draw_packed(structured, sample, kind, count, self.rng))

    def sequences(self, kind: str) -> PyTree:
        """(batch, time, *obs)."""
        fold = lambda x: x.reshape(self.batch, _TIME, *x.shape[1:])  # noqa: E731
        return jax.tree.map(fold, self.draw(kind, self.batch * _TIME))

    def fresh(self, batch: int) -> PyTree:
        return self.policy.initial_state(batch) if self.recurrent else None

    def act(self, observations: PyTree) -> dict[str, np.ndarray]:
        """Named outputs, eagerly."""
        return _arrays(_step(self.policy, observations, self.fresh(self.batch))[0])

    @cached_property
    def compiled(self) -> Callable[[PyTree, PyTree], tuple[_Outputs, PyTree]]:
        """`_step`, jitted, as a function of observations and state."""
        graphdef, params = split(self.policy)

        @jax.jit
        def step(params: PyTree, observations: PyTree, state: PyTree) -> tuple[_Outputs, PyTree]:
            self.traces += 1
            return _step(merge(graphdef, params), observations, state)

        return partial(step, params)


def _step(policy: Any, observations: PyTree, state: PyTree) -> tuple[_Outputs, PyTree]:
    """Named outputs and the new state; the state of a policy without memory is None."""
    if state is not None:
        logits, values, state = policy.forward_eval(observations, state)
    else:
        # Recurrent passes the state by keyword.
        hidden = policy.encode_observations(observations, state=None)
        logits, values = policy.decode_actions(hidden)
        logits = masked_by(policy, logits, observations)
    return _named(logits, values), state


def _arrays(outputs: _Outputs) -> dict[str, np.ndarray]:
    return {name: np.asarray(y) for name, y in outputs.items()}


def _named(logits: object, values: object) -> _Outputs:
    if isinstance(logits, Normal):
        scale = jnp.broadcast_to(logits.scale, jnp.shape(logits.loc))
        named = {"loc": logits.loc, "scale": scale, "values": values}
    elif isinstance(logits, tuple):
        named = {**{f"logits[{i}]": x for i, x in enumerate(logits)}, "values": values}
    else:
        named = {"logits": logits, "values": values}
    for name, y in named.items():
        if not hasattr(y, "shape"):
            raise TypeError(
                f"{name.split('[')[0]} is a {type(y).__name__}; return (logits, values), logits "
                "being an array, a tuple of arrays or a puffer_jax.Normal"
            )
    return named


def _differing(a: _Outputs, b: _Outputs, tolerance: float) -> str:
    """Names of the outputs that differ by more than `tolerance` of their largest magnitude."""
    return ", ".join(name for name in b if name not in a or not _near(a[name], b[name], tolerance))


def _near(a: ArrayLike, b: ArrayLike, tolerance: float) -> bool:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = np.abs(b[np.isfinite(b)]).max(initial=0)
    return a.shape == b.shape and np.allclose(a, b, 0, tolerance * scale, equal_nan=True)


def _unusable(outputs: Mapping[str, np.ndarray]) -> list[str]:
    """Outputs that make no distribution; -inf beside finite logits is a mask."""
    bad = []
    for name, y in outputs.items():
        largest = y.max(-1) if name.startswith("logits") and y.ndim > 1 else y
        if not np.isfinite(largest).all() or (name == "scale" and not (y > 0).all()):
            bad.append(name)
    return bad
