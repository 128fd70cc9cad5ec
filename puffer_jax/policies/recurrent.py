"""`LSTMWrapper`: an LSTM between a policy's encoder and its heads."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from puffer_jax.base import spaces
from puffer_jax.nn.initializers import reset_orthogonal
from puffer_jax.nn.lstm import LSTM
from puffer_jax.policies.base import Logits, State, _Policy
from puffer_jax.policies.default import _is_flat


class LSTMWrapper(nnx.Module):
    """Puts an LSTM between a policy's encoder and its heads.

    `forward_eval` is one step for acting, `forward` a scan over time for training; both use
    one cell and return the new state where the reference writes into the given one. A state
    is a dict of "lstm_h" and "lstm_c" (batch, hidden_size) and "hidden", the LSTM's output.
    `initial_state` and `forward_eval` have the same structure, so a state can be the carry of
    `jax.lax.scan` and never causes a retrace; "hidden" is ignored on the way in.

    Quirk kept: building the wrapper re-initialises the wrapped policy, its heads included:
    every weight orthogonal with gain 1 and every bias zero (the gains sqrt(2) and 0.01 are
    lost), while the LSTM keeps torch's uniform initialisation with non-zero biases.

    Args:
        env: gives the observation space.
        policy: any module with `encode_observations`, `decode_actions`, `is_continuous`.
        input_size: width of the policy's encoding.
        hidden_size: width of the LSTM and of what the policy's heads read.
        rngs: stream `params`.
        dtype: of the LSTM's matmuls.
        param_dtype: of the LSTM's parameters and states.

    Raises:
        ValueError: `input_size` or `hidden_size` is not the wrapped policy's `hidden_size`.

    Reference: `pufferlib.models.LSTMWrapper`.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.Default(env, rngs=nnx.Rngs(0))
        >>> policy = puffer_jax.LSTMWrapper(env, policy, rngs=nnx.Rngs(1))
        >>> state = policy.initial_state(3)
        >>> logits, values, state = policy.forward_eval(jax.numpy.ones((3, 4)), state)
        >>> segments = jax.numpy.ones((3, 16, 4))  # (batch, time, *obs)
        >>> logits, values, _ = policy.forward(segments)
        >>> logits.shape, values.shape
        ((48, 2), (3, 16))
    """

    torch_names: ClassVar = {"policy": "policy", "lstm": "lstm"}
    torch_aliases: ClassVar = {
        f"cell.{name}": f"lstm.{name}_l0"
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }

    def __init__(
        self,
        env: Any,
        policy: Any,
        input_size: int = 128,
        hidden_size: int = 128,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            # A custom policy may encode to one width and decode from another.
            if isinstance(policy, _Policy) and policy.hidden_size != size:
                raise ValueError(
                    f"LSTMWrapper's {name} is {size} but {type(policy).__name__}'s hidden_size is "
                    f"{policy.hidden_size}; pass {name}={policy.hidden_size}"
                )
        reset_orthogonal(policy, rngs=rngs)
        self.env_spec = spaces.env_spec(env)
        self.policy = policy
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.is_continuous = policy.is_continuous
        self.is_multidiscrete = getattr(policy, "is_multidiscrete", False)
        self.is_dict_obs = getattr(policy, "is_dict_obs", False)
        self.lstm = LSTM(input_size, hidden_size, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def initial_state(self, batch_size: int) -> State:
        """The zero state of a new episode for `batch_size` agents."""
        shape, dtype = (batch_size, self.hidden_size), self.lstm.param_dtype
        # Three arrays: donating one buffer twice is an error.
        return {name: jnp.zeros(shape, dtype) for name in ("hidden", "lstm_c", "lstm_h")}

    def forward_eval(
        self, observations: Any, state: State | None = None
    ) -> tuple[Logits, Array, State]:
        """One step.

        Args:
            observations: (batch, *obs).
            state: of the step before; None is the zero state.

        Returns:
            logits, values (batch, 1), the new state.

        Raises:
            ValueError: a state of another batch size or width.
        """
        encoded = self._encode(observations, state)
        h, c = self._carry(state, encoded.shape[0])
        h, c = self.lstm.step(encoded, h, c)
        logits, values = self.policy.decode_actions(h)
        return logits, values, {"hidden": h, "lstm_c": c, "lstm_h": h}

    def forward(
        self, observations: Any, state: State | None = None, done: ArrayLike | None = None
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
            ValueError: observations, state or done of another shape.
        """
        batch, time, flat = self._fold_time(observations)
        encoded = self._encode(flat, state)
        if done is not None:
            if jnp.shape(done) not in ((batch, time), (batch,) if time == 1 else (batch, time)):
                raise ValueError(
                    f"done has shape {jnp.shape(done)}; expected (batch, time) = {(batch, time)}"
                )
            done = jnp.asarray(done).reshape(batch, time).astype(bool)
        h, c = self._carry(state, batch)
        hidden, h, c = self.lstm.scan(encoded.reshape(batch, time, -1), h, c, done)
        logits, values = self.policy.decode_actions(hidden.reshape(batch * time, -1))
        state = {"hidden": hidden, "lstm_c": c, "lstm_h": h}
        return logits, values.reshape(batch, time), state

    def __call__(
        self, observations: Any, state: State | None = None, done: ArrayLike | None = None
    ) -> tuple[Logits, Array, State]:
        """`forward`."""
        return self.forward(observations, state, done)

    def _encode(self, observations: Any, state: State | None) -> Float[Array, "batch input"]:
        encoded = self.policy.encode_observations(observations, state=state)
        if encoded.ndim != 2 or encoded.shape[1] != self.input_size:
            raise ValueError(
                f"{type(self.policy).__name__} encodes to shape {encoded.shape}, but LSTMWrapper's "
                f"input_size is {self.input_size}; build it with input_size={encoded.shape[-1]}"
            )
        return encoded

    def _carry(self, state: State | None, batch: int) -> tuple[Array, Array]:
        if state is None:
            state = self.initial_state(batch)
        for name in ("lstm_h", "lstm_c"):
            if jnp.shape(state[name]) != (batch, self.hidden_size):
                raise ValueError(
                    f"state[{name!r}] has shape {jnp.shape(state[name])}; expected (batch, "
                    f"hidden_size) = {(batch, self.hidden_size)}"
                )
        dtype = self.lstm.weight_hh_l0.dtype
        return jnp.asarray(state["lstm_h"], dtype), jnp.asarray(state["lstm_c"], dtype)

    def _fold_time(self, observations: Any) -> tuple[int, int, Any]:
        layout = self.env_spec.single_observation_space
        if isinstance(observations, dict | tuple):
            leaf, shape = _first_leaf(observations, layout.structured)
        else:
            leaf = observations
            is_flat = layout.structured is not None and _is_flat(leaf, layout)
            # Only an image policy built without an environment does not know its shape.
            shape = np.shape(leaf)[-3:] if layout.shape is None else layout.shape
            shape = (layout.features,) if is_flat else shape
        extra = np.ndim(leaf) - len(shape)
        if extra not in (1, 2) or np.shape(leaf)[extra:] != shape:
            raise ValueError(
                f"observations of shape {np.shape(leaf)}; expected (batch, time, *obs) or (batch, "
                f"*obs) with obs = {shape}"
            )
        batch, time = (*np.shape(leaf), 1)[:2] if extra == 2 else (np.shape(leaf)[0], 1)
        fold = lambda x: jnp.reshape(x, (batch * time, *np.shape(x)[extra:]))  # noqa: E731
        return batch, time, jax.tree.map(fold, observations)


def _first_leaf(tree: Any, structured: np.dtype | None) -> tuple[Any, tuple[int, ...]]:
    if structured is None:
        raise ValueError("dict or tuple observations, but the observation space is neither")
    while structured.names is not None:
        name = structured.names[0]
        tree = tree[int(name[1:])] if isinstance(tree, tuple) else tree[name]
        structured = structured[name]
    return tree, structured.shape
