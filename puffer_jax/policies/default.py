"""`Default`: one linear layer and GELU for flat observations."""

from collections.abc import Mapping
from types import ModuleType
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from puffer_jax.base import spaces
from puffer_jax.kernels.perceptron import gelu
from puffer_jax.nn.linear import linear, perceptron
from puffer_jax.nn.params import Shape, shape_of
from puffer_jax.policies.base import Description, Hints, described_array
from puffer_jax.policies.flat import Flat, action_from_keys
from puffer_jax.policies.protocol import Logits, State


class Default(Flat):
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
        action_mask: see `FeedForward`.

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

    def __init__(
        self,
        env: spaces.Env,
        hidden_size: int = 128,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        action_mask: str | None = None,
    ):
        super().__init__(env, dtype, param_dtype, action_mask)
        self.hidden_size = hidden_size

        self.encoder = nnx.Sequential(
            self._linear(self.layout.features, hidden_size, rngs=rngs), gelu
        )
        self._make_heads(hidden_size, rngs)

    def encode_observations(
        self, observations: PyTree, state: State | None = None
    ) -> Float[Array, "batch hidden"]:
        """Hidden vectors (batch, hidden_size); no time axis.

        Raises:
            ValueError: the observations do not fit the space the policy was built for.
        """
        return perceptron(self.input_features(observations), self.encoder)[0]

    def forward_eval(
        self, observations: PyTree, state: State | None = None
    ) -> tuple[Logits, Array]:
        """Logits and values (batch, 1) for a batch of observations; `state` is not used."""
        if self._is_overridden():
            return super().forward_eval(observations, state)
        outputs, values = perceptron(self.input_features(observations), self.encoder, self._heads)
        logits = self.masked(self._actions(outputs), observations)
        return logits, values.astype(self.param_dtype)

    def _is_overridden(self) -> bool:
        """Whether a subclass, or the instance, replaces half of `forward_eval`."""
        return any(
            getattr(getattr(self, name), "__func__", None) is not getattr(Default, name)
            for name in ("encode_observations", "decode_actions")
        )

    def decode_actions(self, hidden: Float[Array, "batch hidden"]) -> tuple[Logits, Array]:
        """Logits, see the class, and values (batch, 1)."""
        outputs, values = linear(hidden, self._heads)
        return self._actions(outputs), values.astype(self.param_dtype)

    def input_layers(self) -> tuple[nnx.Linear, ...]:
        """The encoder's one layer."""
        return (self.encoder.layers[0],)  # type: ignore[reportReturnType]

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """See `FeedForward.from_keys`."""
        keys = {"encoder.0.weight", "value.weight"}
        if not keys <= shapes.keys() or "encoder.2.weight" in shapes:
            return None
        hidden, features = shape_of(shapes, "encoder.0.weight", 2)
        return {
            "class": cls.__name__,
            "sizes": {"hidden_size": hidden},
            "observation": described_array(hints.image_shape or (features,)),
            "action": action_from_keys(shapes, hints),
        }

    def reference(self, models: ModuleType, env: spaces.Env) -> object:
        """PufferLib's `Default`."""
        return models.Default(env, self.hidden_size)
