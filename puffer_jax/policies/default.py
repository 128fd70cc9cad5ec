"""`Default`: one linear layer and GELU for flat observations."""

from collections.abc import Mapping
from types import ModuleType
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from puffer_jax.base import spaces
from puffer_jax.kernels.perceptron import gelu
from puffer_jax.nn.distributions import Normal
from puffer_jax.nn.linear import linear, perceptron
from puffer_jax.nn.params import Shape, shape_of
from puffer_jax.policies.base import Description, FeedForward, Hints, described_array, is_flat
from puffer_jax.policies.nativize import flatten_observations, nativize_dtype, nativize_tensor
from puffer_jax.policies.protocol import Logits, State


class Default(FeedForward):
    """Flattens the observation, one Linear + GELU encoder, linear actor and value heads.

    Observations are arrays (batch, *shape). Dict and Tuple observations come as the flat
    array (batch, bytes) an emulated environment hands out, as a dict or tuple of arrays
    (batch, *leaf), or as the leaves already concatenated to a float array
    (batch, features).

    Quirk kept: the raw bytes of an *emulated* Tuple space are read as numbers, as in the
    reference, since the sizes in its checkpoints follow from that. Discrete observations
    enter as one number, not as a one-hot vector.

    Args:
        env: gives the spaces, see `puffer_jax.spaces.env_spec`. Actions may be Discrete
            (logits (batch, n)), MultiDiscrete (a tuple of them) or a one-dimensional Box
            (`Normal` with a learned, state-independent log-std).
        hidden_size: width of the encoder.
        rngs: stream `params`.
        dtype: of the matmuls.
        param_dtype: of parameters, logits and values.

    Raises:
        ValueError: an action space no policy supports.

    Reference: `pufferlib.models.Default`.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.Default(env, hidden_size=32, rngs=nnx.Rngs(0))
        >>> logits, values = policy.forward(jax.numpy.ones((3, 4)))
        >>> logits.shape, values.shape
        ((3, 2), (3, 1))
    """

    sizes: ClassVar = {"hidden_size": int}
    torch_names: ClassVar = {
        name: name for name in ("decoder_logstd", "encoder", "decoder", "decoder_mean", "value")
    }

    def __init__(
        self,
        env: spaces.Env,
        hidden_size: int = 128,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(env, dtype, param_dtype)
        action = self.env_spec.single_action_space
        observation = self.env_spec.single_observation_space
        self.hidden_size = hidden_size
        self.is_continuous = isinstance(action, spaces.Continuous)
        self.is_multidiscrete = isinstance(action, spaces.MultiDiscrete)
        self.is_dict_obs = observation.structured is not None

        self.encoder = nnx.Sequential(
            self._linear(observation.features, hidden_size, rngs=rngs), gelu
        )
        match action:
            case spaces.MultiDiscrete(nvec):
                self.decoder = self._linear(hidden_size, sum(nvec), 0.01, rngs=rngs)
            case spaces.Discrete(n):
                self.decoder = self._linear(hidden_size, n, 0.01, rngs=rngs)
            case spaces.Continuous((size,)):
                self.decoder_mean = self._linear(hidden_size, size, 0.01, rngs=rngs)
                self.decoder_logstd = nnx.Param(jnp.zeros((1, size), param_dtype))
        self.value = self._linear(hidden_size, 1, 1.0, rngs=rngs)

    def encode_observations(
        self, observations: PyTree, state: State | None = None
    ) -> Float[Array, "batch hidden"]:
        """Hidden vectors (batch, hidden_size); no time axis.

        Raises:
            ValueError: the observations do not fit the space the policy was built for.
        """
        return perceptron(self._features(observations), self.encoder)[0]

    def forward_eval(
        self, observations: PyTree, state: State | None = None
    ) -> tuple[Logits, Array]:
        """Logits and values (batch, 1) for a batch of observations; `state` is not used."""
        if self._is_overridden():
            return super().forward_eval(observations, state)
        outputs, values = perceptron(self._features(observations), self.encoder, self._heads)
        return self._actions(outputs), values.astype(self.param_dtype)

    def _is_overridden(self) -> bool:
        """Whether a subclass, or the instance, replaces half of `forward_eval`."""
        return any(
            getattr(getattr(self, name), "__func__", None) is not getattr(Default, name)
            for name in ("encode_observations", "decode_actions")
        )

    def _features(self, observations: PyTree) -> Float[Array, "batch features"]:
        layout = self.env_spec.single_observation_space
        dtype = self._compute_dtype
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

    def decode_actions(self, hidden: Float[Array, "batch hidden"]) -> tuple[Logits, Array]:
        """Logits, see the class, and values (batch, 1)."""
        outputs, values = linear(hidden, self._heads)
        return self._actions(outputs), values.astype(self.param_dtype)

    @property
    def _heads(self) -> tuple[nnx.Linear, nnx.Linear]:
        return self.decoder_mean if self.is_continuous else self.decoder, self.value

    def _actions(self, outputs: Array) -> Logits:
        outputs = outputs.astype(self.param_dtype)
        match self.env_spec.single_action_space:
            case spaces.Continuous():
                scale = jnp.broadcast_to(jnp.exp(self.decoder_logstd[...]), outputs.shape)
                return Normal(outputs, scale)
            case spaces.MultiDiscrete(nvec):
                return tuple(jnp.split(outputs, np.cumsum(nvec)[:-1], axis=-1))
            case _:
                return outputs

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """See `FeedForward.from_keys`."""
        if not {"encoder.0.weight", "value.weight"} <= shapes.keys():
            return None
        hidden, features = shape_of(shapes, "encoder.0.weight", 2)
        return {
            "class": cls.__name__,
            "sizes": {"hidden_size": hidden},
            "observation": described_array(hints.image_shape or (features,)),
            "action": _action_from_keys(shapes, hints),
        }

    def reference(self, models: ModuleType, env: spaces.Env) -> object:
        """PufferLib's `Default`."""
        return models.Default(env, self.hidden_size)


def _action_from_keys(shapes: Mapping[str, Shape], hints: Hints) -> Description:
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
