"""`MLP`: perceptrons of several layers for flat observations."""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from puffer_jax.base import spaces
from puffer_jax.base.packages import require
from puffer_jax.base.text import near
from puffer_jax.kernels.perceptron import gelu
from puffer_jax.nn.linear import linear
from puffer_jax.nn.params import Shape, shape_of
from puffer_jax.policies.base import Description, Hints, described_array
from puffer_jax.policies.flat import Flat, action_from_keys
from puffer_jax.policies.protocol import Logits, State

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": gelu,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
}

# Of the two trunks that do not share weights.
_TRUNKS = ("actor", "critic")


class MLP(Flat):
    """Hidden layers between a flat observation and the heads, the usual policy for control.

    Takes the observations and the actions that `Default` takes. With `separate`, the actor and
    the critic have hidden layers of their own, and the encoding is the vectors of both, one
    behind the other; so it works inside `LSTMWrapper`, too.

    Args:
        env: gives the spaces, see `puffer_jax.spaces.env_spec`.
        hidden_sizes: width of each hidden layer.
        activation: after each of them: "tanh", "relu", "gelu", "silu" or "elu".
        separate: whether actor and critic have a trunk each.
        rngs: stream `params`; hidden layers are orthogonal with gain sqrt(2), the actor's head
            with 0.01, the critic's with 1.
        dtype: of the matmuls.
        param_dtype: of parameters, logits and values.
        action_mask: see `FeedForward`.

    Raises:
        ValueError: no hidden layer or one without a positive width, an unknown activation, or an
            action space no policy supports.

    Reference: the networks of Andrychowicz et al. 2021, "What Matters In On-Policy RL"; the layers
    are named as in torch's Sequential, `actor.0`, `actor.2`, ... (`encoder.0`, ... if shared).

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.MLP(env, hidden_sizes=(64, 64), rngs=nnx.Rngs(0))
        >>> logits, values = policy.forward(jax.numpy.ones((3, 4)))
        >>> logits.shape, values.shape
        ((3, 2), (3, 1))
    """

    sizes: ClassVar = {"hidden_sizes": tuple, "activation": str, "separate": bool}

    def __init__(
        self,
        env: spaces.Env,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        separate: bool = True,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        action_mask: str | None = None,
    ):
        super().__init__(env, dtype, param_dtype, action_mask)
        if not hidden_sizes or min(hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes must be one or more widths; got {hidden_sizes}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"no such activation: {near([activation], ACTIVATIONS)[0]}")
        self.hidden_sizes = tuple(int(size) for size in hidden_sizes)
        self.activation = activation
        self.separate = separate
        width = self.hidden_sizes[-1]
        self.hidden_size = 2 * width if separate else width
        for trunk in self._trunks:
            setattr(self, trunk, self._hidden_layers(rngs))
        self._make_heads(width, rngs)

    @property
    def _trunks(self) -> tuple[str, ...]:
        return _TRUNKS if self.separate else ("encoder",)

    def _hidden_layers(self, rngs: nnx.Rngs) -> nnx.Sequential:
        layers: list[Callable[..., Any]] = []
        inputs = self.layout.features
        for size in self.hidden_sizes:
            layers += [self._linear(inputs, size, rngs=rngs), ACTIVATIONS[self.activation]]
            inputs = size
        return nnx.Sequential(*layers)

    def encode_observations(
        self, observations: PyTree, state: State | None = None
    ) -> Float[Array, "batch hidden"]:
        """Hidden vectors (batch, hidden_size), the actor's before the critic's; no time axis.

        Raises:
            ValueError: the observations do not fit the space the policy was built for.
        """
        features = self.input_features(observations)
        return jnp.concatenate([getattr(self, trunk)(features) for trunk in self._trunks], axis=-1)

    def decode_actions(self, hidden: Float[Array, "batch hidden"]) -> tuple[Logits, Array]:
        """Logits, see `Default`, and values (batch, 1)."""
        if not self.separate:
            outputs, values = linear(hidden, self._heads)
        else:
            actor, critic = jnp.split(hidden, 2, axis=-1)
            head, value = self._heads
            outputs, values = *linear(actor, [head]), *linear(critic, [value])
        return self._actions(outputs), values.astype(self.param_dtype)

    def input_layers(self) -> tuple[nnx.Linear, ...]:
        """The first layer of each trunk."""
        return tuple(getattr(self, trunk).layers[0] for trunk in self._trunks)

    @classmethod
    def _sizes_for(
        cls, image: tuple[int, ...] | None, hidden_size: int | None, options: Mapping[str, object]
    ) -> dict[str, Any]:
        return {} if hidden_size is None else {"hidden_sizes": (hidden_size, hidden_size)}

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """See `FeedForward.from_keys`."""
        separate = {"actor.0.weight", "critic.0.weight"} <= shapes.keys()
        trunk = _TRUNKS[0] if separate else "encoder"
        if "value.weight" not in shapes or not (separate or "encoder.2.weight" in shapes):
            return None
        count = sum(1 for key in shapes if key.startswith(f"{trunk}.") and key.endswith(".weight"))
        layers = [shape_of(shapes, f"{trunk}.{2 * i}.weight", 2) for i in range(count)]
        if hints.activation is None:
            raise ValueError(
                "these are the keys of an MLP, whose weights do not tell the activation; pass "
                f"activation={' or '.join(map(repr, ACTIVATIONS))}"
            )
        return {
            "class": cls.__name__,
            "sizes": {
                "hidden_sizes": [rows for rows, _ in layers],
                "activation": hints.activation,
                "separate": separate,
            },
            "observation": described_array(hints.image_shape or layers[0][1:]),
            "action": action_from_keys(shapes, hints),
        }

    def reference(self, models: ModuleType, env: spaces.Env) -> Any:
        """The same layers in torch, as a policy that PufferLib's trainer and LSTMWrapper take."""
        torch = require("torch", "the comparison", "torch==2.13.0")
        nn = torch.nn
        ours = self
        torch_activation = {
            "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "elu": nn.ELU
        }[self.activation]  # fmt: skip

        class MLP(models.Default):  # which decodes what the encoder gives
            def __init__(self) -> None:
                super().__init__(env, ours.hidden_sizes[-1])
                del self.encoder
                self.hidden_size = ours.hidden_size
                for trunk in ours._trunks:
                    layers, inputs = [], ours.layout.features
                    for size in ours.hidden_sizes:
                        layers += [nn.Linear(inputs, size), torch_activation()]
                        inputs = size
                    setattr(self, trunk, nn.Sequential(*layers))

            def encode_observations(self, observations: Any, state: Any = None) -> Any:
                flat = observations.view(observations.shape[0], -1).float()
                trunks = [getattr(self, trunk)(flat) for trunk in ours._trunks]
                return torch.cat(trunks, dim=-1)

            def decode_actions(self, hidden: Any) -> Any:
                if not ours.separate:
                    return super().decode_actions(hidden)
                actor, critic = hidden.chunk(2, dim=-1)
                values = self.value(critic)
                if self.is_continuous:
                    mean = self.decoder_mean(actor)
                    scale = self.decoder_logstd.exp().expand_as(mean)
                    return torch.distributions.Normal(mean, scale), values
                logits = self.decoder(actor)
                if self.is_multidiscrete:
                    return logits.split(self.action_nvec, dim=1), values
                return logits, values

        return MLP()
