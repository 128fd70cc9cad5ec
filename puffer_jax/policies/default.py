"""`Default`: one linear layer and GELU for flat observations."""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from puffer_jax.base import spaces
from puffer_jax.kernels.perceptron import gelu
from puffer_jax.nn.distributions import Normal
from puffer_jax.nn.linear import linear, perceptron
from puffer_jax.policies.base import Logits, State, _Policy
from puffer_jax.policies.nativize import flatten_observations, nativize_dtype, nativize_tensor


class Default(_Policy):
    """Flattens the observation, one Linear + GELU encoder, linear actor and value heads.

    Observations are arrays (batch, *shape). Dict and Tuple observations come as the flat
    array (batch, bytes) an emulated environment hands out, as a dict or tuple of arrays
    (batch, *leaf), or as the leaves already concatenated to a float array
    (batch, features).

    Quirk kept: from an *emulated* Tuple space the raw bytes are read as numbers, as the
    reference does, since the sizes in its checkpoints follow from it. Discrete observations
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

    torch_names: ClassVar = {
        name: name for name in ("decoder_logstd", "encoder", "decoder", "decoder_mean", "value")
    }

    def __init__(
        self,
        env: Any,
        hidden_size: int = 128,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
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
        self, observations: Any, state: State | None = None
    ) -> Float[Array, "batch hidden"]:
        """Hidden vectors (batch, hidden_size); no time axis.

        Raises:
            ValueError: the observations do not fit the space the policy was built for.
        """
        features = self._features(observations)
        if self._as_built():
            return perceptron(features, self.encoder.layers[0])[0]
        return self.encoder(features)

    def forward_eval(self, observations: Any, state: State | None = None) -> tuple[Logits, Array]:
        """Logits and values (batch, 1) for a batch of observations; `state` is not used."""
        heads = getattr(self, self._actor), self.value
        if type(self) is not Default or not self._as_built(*heads):
            return super().forward_eval(observations, state)
        outputs, values = perceptron(self._features(observations), self.encoder.layers[0], heads)
        return self._actions(outputs), values.astype(self.param_dtype)

    def _as_built(self, *heads: Any) -> bool:
        """Whether nobody has exchanged the layers, or listens to them: one function may do all."""
        layers: Any = self.encoder.layers if type(self.encoder) is nnx.Sequential else [None]
        first, *others = layers
        dtypes = self.dtype, self.param_dtype
        return others == [gelu] and all(
            type(layer) is nnx.Linear
            and layer.bias is not None
            and (layer.dtype, layer.param_dtype) == dtypes
            for layer in (first, *heads)
        )

    def _features(self, observations: Any) -> Float[Array, "batch features"]:
        layout = self.env_spec.single_observation_space
        dtype = self._compute_dtype
        if layout.structured is not None:
            if isinstance(observations, dict | tuple):
                return flatten_observations(observations, layout.structured, dtype=dtype)
            if not _is_flat(observations, layout):
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
        outputs, values = linear(hidden, (getattr(self, self._actor), self.value))
        return self._actions(outputs), values.astype(self.param_dtype)

    @property
    def _actor(self) -> str:
        return "decoder_mean" if self.is_continuous else "decoder"

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


def _is_flat(observations: Any, layout: spaces.Observation) -> bool:
    """Whether these are concatenated leaves, not the bytes of an emulated environment."""
    if layout.sample_dtype is None:
        return True
    fits = np.shape(observations)[-1:] == (layout.features,)
    return fits and jnp.issubdtype(observations.dtype, jnp.floating)
