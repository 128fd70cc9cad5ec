"""What the policies for flat observations share: features, heads, and how both are recognised."""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from puffer_jax.base import spaces
from puffer_jax.nn.distributions import Normal
from puffer_jax.nn.params import Shape, shape_of
from puffer_jax.policies.base import Description, FeedForward, Hints
from puffer_jax.policies.nativize import (
    flatten_observations,
    is_flat,
    nativize_dtype,
    nativize_tensor,
)
from puffer_jax.policies.protocol import Logits


class Flat(FeedForward):
    """A policy that flattens its observations, with linear heads for every kind of action.

    Args:
        env: gives the spaces, see `Default`.
        dtype: of the matmuls.
        param_dtype: of parameters, logits and values.
        action_mask: see `FeedForward`.
    """

    # In the order of torch's parameters: a module's own before those of its layers.
    torch_names: ClassVar = {
        name: name
        for name in (
            *("decoder_logstd", "encoder", "actor", "critic"),
            *("decoder", "decoder_mean", "value"),
        )
    }

    def __init__(
        self,
        env: spaces.Env,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        action_mask: str | None = None,
    ):
        super().__init__(env, dtype, param_dtype, action_mask)
        action = self.env_spec.single_action_space
        observation = self.env_spec.single_observation_space
        self.is_continuous = isinstance(action, spaces.Continuous)
        self.is_multidiscrete = isinstance(action, spaces.MultiDiscrete)
        self.is_dict_obs = observation.structured is not None

    def _make_heads(self, width: int, rngs: nnx.Rngs) -> None:
        """Heads that read vectors of that width; the actor's have gain 0.01, the value's 1."""
        match self.env_spec.single_action_space:
            case spaces.MultiDiscrete(nvec):
                self.decoder = self._linear(width, sum(nvec), 0.01, rngs=rngs)
            case spaces.Discrete(n):
                self.decoder = self._linear(width, n, 0.01, rngs=rngs)
            case spaces.Continuous((size,)):
                self.decoder_mean = self._linear(width, size, 0.01, rngs=rngs)
                self.decoder_logstd = nnx.Param(jnp.zeros((1, size), self.param_dtype))
        self.value = self._linear(width, 1, 1.0, rngs=rngs)

    def input_features(
        self, observations: PyTree, dtype: DTypeLike | None = None
    ) -> Float[Array, "batch features"]:
        """What the first layers read, without the mask; in the dtype of the matmuls, or in `dtype`.

        Raises:
            ValueError: the observations do not fit the space the policy was built for.
        """
        layout, dtype = self.layout, self._compute_dtype if dtype is None else dtype
        observations = self._without_mask(observations)
        if layout.structured is not None:
            if isinstance(observations, dict | tuple):
                return flatten_observations(observations, layout.structured, dtype=dtype)
            if not is_flat(observations, layout):
                emulated = {
                    "observation_dtype": layout.sample_dtype,
                    "emulated_observation_dtype": layout.structured,
                }
                fields = nativize_tensor(observations, nativize_dtype(emulated))
                return flatten_observations(fields, layout.structured, dtype=dtype)
        observations = jnp.asarray(observations)
        flat = observations.reshape(observations.shape[0], -1)
        if flat.shape[1] != layout.features:
            raise ValueError(
                f"observations of shape {observations.shape} do not fit the policy, which was "
                f"built for {layout.features} numbers each (shape {layout.shape})"
            )
        return flat.astype(dtype)

    @property
    def _heads(self) -> tuple[nnx.Linear, nnx.Linear]:
        return self.decoder_mean if self.is_continuous else self.decoder, self.value

    def _actions(self, outputs: Array) -> Logits:
        logstd = self.decoder_logstd[...] if self.is_continuous else None
        action = self.env_spec.single_action_space
        return logits_of(outputs.astype(self.param_dtype), action, logstd)


def logits_of(
    outputs: Float[Array, "batch outputs"], action: spaces.Action, logstd: Array | None
) -> Logits:
    """A linear layer's outputs, as the logits of a space; `logstd` (1, n) is a Box's."""
    match action:
        case spaces.Continuous():
            assert logstd is not None
            return Normal(outputs, jnp.broadcast_to(jnp.exp(logstd), outputs.shape))
        case spaces.MultiDiscrete(nvec):
            return tuple(jnp.split(outputs, np.cumsum(nvec)[:-1], axis=-1))
        case _:
            return outputs


def action_from_keys(shapes: Mapping[str, Shape], hints: Hints) -> Description:
    """The description of the actions that the heads in a state_dict are for.

    Raises:
        ValueError: there are no heads, or they fit several spaces.
    """
    if "decoder_mean.weight" in shapes:
        return {"class": "Continuous", "shape": shape_of(shapes, "decoder_mean.weight", 2)[:1]}
    if "decoder.weight" not in shapes:
        raise ValueError("the state_dict has neither decoder.weight nor decoder_mean.weight")
    rows, nvec = shape_of(shapes, "decoder.weight", 2)[0], hints.nvec
    if nvec is None and hints.env is None and rows >= 4:
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
