"""One step of a policy as a pure function of plain arrays, and what it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from puffer_jax.base import spaces
from puffer_jax.nn.distributions import Normal, TanhNormal
from puffer_jax.nn.params import merge, split
from puffer_jax.policies.drawing import draw, draw_packed, unbounded
from puffer_jax.policies.protocol import forward_of, is_recurrent
from puffer_jax.policies.stateful import Stateful

Function = Callable[[PyTree, PyTree], tuple[PyTree, PyTree, PyTree]]
"""(observations, state) -> (logits or action, values, state)."""

Observe = Callable[[int, np.random.Generator], PyTree]


@dataclass(frozen=True)
class Step:
    """A step to be written: the function, and the shapes and dtypes that it is traced with.

    Attributes:
        name: the policy's class.
        function: (observations, state) -> (logits or action, values, state).
        observations: a tree of `jax.ShapeDtypeStruct` (batch, *obs).
        state: a tree of them, (batch, ...); None for a policy without memory.
        output: what the first result is.
        batch: rows; None: any number.
        observe: (count, rng) -> random observations to run it on.
    """

    name: str
    function: Function
    observations: PyTree
    state: PyTree
    output: str
    batch: int | None
    observe: Observe

    def draw(self, count: int, rng: np.random.Generator) -> tuple[PyTree, PyTree]:
        """Random observations and states of `count` rows."""

        def state(x: jax.ShapeDtypeStruct) -> np.ndarray:
            return rng.uniform(-1, 1, (count, *x.shape[1:])).astype(x.dtype)

        observed = jax.tree.map(
            lambda x, like: np.asarray(x, like.dtype), self.observe(count, rng), self.observations
        )
        return observed, jax.tree.map(state, self.state)


def step_of(
    policy: nnx.Module,
    *,
    batch: int | None,
    output: str,
    env: spaces.Env,
    observations: PyTree,
) -> Step:
    """The step of a policy; see `puffer_jax.export.export_step` for the arguments.

    Raises:
        ValueError: an argument is none that `export_step` takes, or a recurrent policy starts from
            another state than zeros.
        TypeError: the policy holds other variables than parameters, or cannot be called.
    """
    if output not in ("logits", "action"):
        raise ValueError(f"output is {output!r}; expected 'logits' or 'action'")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}; expected a positive number, or None for any")
    if env is not None and observations is not None:
        raise ValueError("give env or observations, not both")
    graphdef, params = split(policy)
    (size,) = (batch,) if batch is not None else jax.export.symbolic_shape("batch")
    recurrent = is_recurrent(policy)
    state = _state_like(policy, size) if recurrent else None

    def step(observations: PyTree, state: PyTree = None) -> tuple[PyTree, PyTree, PyTree]:
        act = forward_of(merge(graphdef, params), "forward_eval")
        if recurrent:
            logits, values, new = act(observations, state)
            # Not "hidden", which `Stateful` adds for those who look, and nobody reads.
            state = {name: new[name] for name in state} if isinstance(policy, Stateful) else new
        else:
            logits, values = act(observations)
        first = plain(logits) if output == "logits" else most_likely(logits)
        return first, values, state

    like, observe = _observed(policy, env, observations)
    name = type(policy).__name__
    return Step(name, step, _batched(like, size), state, output, batch, observe)


def plain(logits: PyTree) -> PyTree:
    """Logits without classes of ours, which no file can hold.

    An array stays one, and so does a tuple of them; a `Normal` is {"loc": ..., "scale": ...}, both
    (batch, actions), and a `TanhNormal` is {"tanh": {"loc": ..., "scale": ...}}: its action is the
    tanh of such a Normal's.
    """
    if not isinstance(logits, Normal):
        return logits
    loc, scale = jnp.broadcast_arrays(logits.loc, logits.scale)
    both = {"loc": loc, "scale": scale}
    return {"tanh": both} if isinstance(logits, TanhNormal) else both


def most_likely(logits: PyTree) -> PyTree:
    """The action with the largest logit, int32 (batch,) or (batch, components), or the mode.

    (Of a `TanhNormal`, as in `puffer-jax eval --deterministic`, what its `mode` gives.)
    """
    if isinstance(logits, Normal):
        return logits.mode()
    if isinstance(logits, tuple):
        return jnp.stack([most_likely(part) for part in logits], axis=-1)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def named(tree: PyTree, name: str) -> dict[str, Any]:
    """The leaves of a tree by dotted names, "state.lstm_h" say; `name` alone for a lone leaf."""
    keys = partial(jax.tree_util.keystr, simple=True, separator=".")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join([name, keys(path)]) if path else name: leaf for path, leaf in leaves}


def _state_like(policy: Any, size: Any) -> PyTree:
    first = (
        policy.core.initial_state(1) if isinstance(policy, Stateful) else policy.initial_state(1)
    )
    wrong = [name for name, part in named(first, "state").items() if np.any(np.asarray(part))]
    if wrong:
        raise ValueError(
            f"{type(policy).__name__}.initial_state is not zero in {', '.join(wrong)}; episodes of "
            "an exported policy start from zeros, as those of the trainer do"
        )
    return _batched(jax.tree.map(_without_batch, first), size)


def _observed(policy: Any, env: spaces.Env, observations: PyTree) -> tuple[PyTree, Observe]:
    """Shapes (without batch) and dtypes of observations, and what draws random ones."""
    if observations is not None:
        return jax.tree.map(_without_batch, observations), partial(_repeated, observations)
    env = getattr(policy, "env_spec", None) if env is None else env
    if env is None:
        raise ValueError(
            f"{type(policy).__name__} does not tell its observations; give env=..., whose spaces "
            "do, or observations=..., a batch of them"
        )
    space = getattr(env, "single_observation_space", None)
    space = env.observation_space if space is None else space
    layout = spaces.env_spec(env).single_observation_space
    structured, sample = layout.structured, layout.sample_dtype
    if structured is not None and sample is not None:
        return _leaf(layout.shape or (), sample), partial(draw_packed, structured, sample, "random")
    if isinstance(space, spaces.Observation):
        space = _space_of(policy, layout)
    return _of_space(space), partial(draw, space, "random")


def _space_of(policy: Any, layout: spaces.Observation) -> spaces.Space:
    """A space like what the policy knows of the one that it was built for."""
    if layout.structured is not None:
        return _with_tuples(unbounded(layout.structured))
    if layout.shape is None:
        raise ValueError(
            f"{type(policy).__name__} was built without the shape of its observations; give "
            "env=..., whose spaces tell it, or observations=..., a batch of them"
        )
    is_image = len(layout.shape) == 3
    low, high = (0, 255) if is_image else (-np.inf, np.inf)
    return spaces.Box(low, high, layout.shape, np.uint8 if is_image else np.float32)


def _with_tuples(space: spaces.Space) -> spaces.Space:
    """Structs whose fields are f0, f1, ... are how a Tuple is stored."""
    if spaces.kind_of(space) != "dict":
        return space
    parts = {name: _with_tuples(part) for name, part in space.spaces.items()}
    is_tuple = [*parts] == [f"f{i}" for i in range(len(parts))]
    return SimpleNamespace(spaces=tuple(parts.values()) if is_tuple else parts)


def _of_space(space: spaces.Space) -> PyTree:
    match spaces.kind_of(space):
        case "dict":
            return {name: _of_space(part) for name, part in space.spaces.items()}
        case "tuple":
            return tuple(_of_space(part) for part in space.spaces)
        case _:
            struct = spaces.structured_dtype(space)
            return _leaf(struct.shape, struct.base)


def _repeated(observations: PyTree, count: int, rng: np.random.Generator) -> PyTree:
    """The rows of a batch, over and over."""
    return jax.tree.map(lambda x: np.resize(x, (count, *np.shape(x)[1:])), observations)


def _leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), jax.dtypes.canonicalize_dtype(dtype))


def _without_batch(x: Any) -> jax.ShapeDtypeStruct:
    if not np.shape(x):
        raise ValueError("observations have no batch axis: a leaf is a scalar")
    return _leaf(np.shape(x)[1:], x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype)


def _batched(tree: PyTree, size: Any) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), tree)
