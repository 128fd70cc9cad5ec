"""`Stateful`: acting step by step and training on segments, with one core."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from puffer_jax.base import spaces
from puffer_jax.nn.cores import Core
from puffer_jax.nn.cores.core import Rows
from puffer_jax.policies.nativize import is_flat
from puffer_jax.policies.protocol import Logits, State


class Stateful(nnx.Module):
    """What the policies with a core share; see `Recurrent`.

    A subclass says what stands before and behind the core.

    Attributes:
        env_spec: the spaces that the policy was built for.
        hidden_size: width of the core's outputs.
    """

    env_spec: spaces.EnvSpec
    hidden_size: int

    @property
    def core(self) -> Core:
        """The core."""
        raise NotImplementedError

    def example_shape(self) -> tuple[int, int, int] | None:
        """See `FeedForward.example_shape`."""
        return None

    def initial_state(self, batch_size: Rows) -> State:
        """The zero state of a new episode for `batch_size` agents."""
        hidden = jnp.zeros((batch_size, self.hidden_size), self.core.param_dtype)
        return {"hidden": hidden, **self.core.initial_state(batch_size)}

    def forward_eval(
        self, observations: PyTree, state: State | None = None
    ) -> tuple[Logits, Array, State]:
        """One step.

        Args:
            observations: (batch, *obs).
            state: from the step before; None is the zero state.

        Returns:
            logits, values (batch, 1), the new state.

        Raises:
            ValueError: the state has another batch size or width.
        """
        encoded = self._encode(observations, state)
        hidden, state = self.core.step(encoded, self._carried(state, encoded.shape[0]))
        logits, values = self._decode(hidden, observations)
        return logits, values, {"hidden": hidden, **state}

    def forward(
        self, observations: PyTree, state: State | None = None, done: ArrayLike | None = None
    ) -> tuple[Logits, Array, State]:
        """All steps of a batch of segments.

        Args:
            observations: (batch, time, *obs), or (batch, *obs) for a single step.
            state: before the first step; None is the zero state.
            done: (batch, time), bool; where set, the observation starts a new episode and the
                state is zeroed before it. Ours: the reference never resets within a segment.

        Returns:
            logits flat, (batch * time, ...); values (batch, time); the state after the last
            step, with "hidden" (batch, time, hidden_size).

        Raises:
            ValueError: observations, state or done have another shape.
        """
        batch, time, flat = self._fold_time(observations)
        encoded = self._encode(flat, state)
        if done is not None:
            if np.shape(done) not in ((batch, time), (batch,) if time == 1 else (batch, time)):
                raise ValueError(
                    f"done has shape {np.shape(done)}; expected (batch, time) = {(batch, time)}"
                )
            done = jnp.asarray(done).reshape(batch, time).astype(bool)
        sequence = encoded.reshape(batch, time, -1)
        hidden, state = self.core.scan(sequence, self._carried(state, batch), done)
        logits, values = self._decode(hidden.reshape(batch * time, -1), flat)
        return logits, values.reshape(batch, time), {"hidden": hidden, **state}

    def __call__(
        self, observations: PyTree, state: State | None = None, done: ArrayLike | None = None
    ) -> tuple[Logits, Array, State]:
        """`forward`."""
        return self.forward(observations, state, done)

    def _encode(self, observations: PyTree, state: State | None) -> Float[Array, "batch input"]:
        """What the core reads; no time axis."""
        raise NotImplementedError

    def _decode(
        self, hidden: Float[Array, "batch hidden"], observations: PyTree
    ) -> tuple[Logits, Array]:
        """Logits and values (batch, 1) for the core's outputs; no time axis."""
        raise NotImplementedError

    def _carried(self, state: State | None, batch: Rows) -> State:
        """The core's part of a state, checked."""
        zero = self.core.initial_state(batch)
        if state is None:
            return zero
        for name, part in zero.items():
            if np.shape(state[name]) != part.shape:
                raise ValueError(
                    f"state[{name!r}] has shape {np.shape(state[name])}; expected (batch, ...) = "
                    f"{part.shape}"
                )
        # Not of whatever there is: an exporter's tracers are no arrays.
        parts = {name: state[name] for name in zero}
        return {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in parts.items()}

    def _fold_time(self, observations: PyTree) -> tuple[int, int, PyTree]:
        layout = self.env_spec.single_observation_space
        if isinstance(observations, dict | tuple):
            leaf, shape = _first_leaf(observations, layout.structured)
        else:
            leaf = observations
            flat = layout.structured is not None and is_flat(leaf, layout)
            # Only an image policy built without an environment does not know its shape.
            shape = np.shape(leaf)[-3:] if layout.shape is None else layout.shape
            shape = (layout.features,) if flat else shape
        extra = np.ndim(leaf) - len(shape)
        if extra not in (1, 2) or np.shape(leaf)[extra:] != shape:
            raise ValueError(
                f"observations of shape {np.shape(leaf)}; expected (batch, time, *obs) or (batch, "
                f"*obs) with obs = {shape}"
            )
        batch, time = (*np.shape(leaf), 1)[:2] if extra == 2 else (np.shape(leaf)[0], 1)
        fold = lambda x: jnp.reshape(x, (batch * time, *np.shape(x)[extra:]))  # noqa: E731
        return batch, time, jax.tree.map(fold, observations)


def reset_where(done: Bool[Array, "batch"] | np.ndarray, state: PyTree) -> PyTree:
    """The state, zero where an episode starts.

    For a loop of your own that acts; `forward` takes `done`. A core's state may have any number of
    axes behind the batch's: (batch, hidden), or (batch, layers, hidden).

    Args:
        done: where the next observation starts an episode.
        state: a tree of arrays (batch, ...); None has nothing to reset.

    Raises:
        ValueError: an array of the state is for another number of agents.

    Example:
        >>> import jax.numpy as jnp, puffer_jax
        >>> state = {"mingru_h": jnp.ones((2, 4, 16))}
        >>> puffer_jax.reset_where(jnp.array([True, False]), state)["mingru_h"].sum((1, 2))
        Array([ 0., 64.], dtype=float32)
    """

    def reset(part: Array) -> Array:
        if np.shape(part)[:1] != np.shape(done):
            raise ValueError(
                f"done has shape {np.shape(done)}, a part of the state {np.shape(part)}; both "
                "begin with the batch"
            )
        return jnp.where(jnp.reshape(done, (-1, *[1] * (np.ndim(part) - 1))), 0, part)

    return jax.tree.map(reset, state)


def _first_leaf(tree: PyTree, structured: np.dtype | None) -> tuple[PyTree, tuple[int, ...]]:
    if structured is None:
        raise ValueError("dict or tuple observations, but the observation space is neither")
    while structured.names is not None:
        name = structured.names[0]
        tree = tree[int(name[1:])] if isinstance(tree, tuple) else tree[name]
        structured = structured[name]
    return tree, structured.shape
