"""`Policy`: encoder, network and decoder as one policy."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from puffer_jax.base import spaces
from puffer_jax.base.text import near
from puffer_jax.nn.cores import Core
from puffer_jax.nn.params import Shape
from puffer_jax.nn.widths import check_widths
from puffer_jax.policies.base import Description, Hints, read_sizes
from puffer_jax.policies.protocol import Logits, State
from puffer_jax.policies.stateful import Stateful
from puffer_jax.policies.v4.decoder import DefaultDecoder, NativeDecoder, nvec_of
from puffer_jax.policies.v4.encoders import (
    DefaultEncoder,
    FlatEncoder,
    ImpalaEncoder,
    NatureEncoder,
)
from puffer_jax.policies.v4.native import PADDING, NativeEncoder
from puffer_jax.policies.v4.networks import GRU, LSTM, MLP, MinGRU

_ENCODERS = {
    cls.__name__: cls for cls in (DefaultEncoder, NatureEncoder, ImpalaEncoder, NativeEncoder)
}
_DECODERS = {cls.__name__: cls for cls in (DefaultDecoder, NativeDecoder)}
_NETWORKS = {cls.__name__: cls for cls in (MinGRU, MLP, LSTM, GRU)}
_PARTS: dict[str, Mapping[str, type]] = {
    "encoder": _ENCODERS,
    "decoder": _DECODERS,
    "network": _NETWORKS,
}


class Policy(Stateful):
    """An encoder, a network and a decoder.

    `forward_eval` is one step for acting, `forward` takes segments for training; both return the
    new state, and `done` resets within a segment, as in `LSTMWrapper`. The original trains from
    the zero state and resets nowhere in a segment.

    Parts of your own work as well. An encoder maps observations (batch, *obs) to vectors, a decoder
    vectors to logits and values, and a network is a `puffer_jax.nn.cores.Core`; an encoder and a
    decoder have `hidden_size`, a decoder `is_continuous`.

    Args:
        encoder: a `DefaultEncoder`, say.
        decoder: a `DefaultDecoder`, say.
        network: `MinGRU`, `LSTM`, `GRU`, `MLP` or another core.
        env: gives the spaces; None: those of the parts, for which observations are flat unless the
            encoder takes images.

    Raises:
        ValueError: the widths of the parts differ, the environment has other spaces than the parts,
            or parts of your own do not tell the spaces and there is no `env`.

    Reference: `Policy` in PufferLib 4's `pufferlib/models.py`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from puffer_jax import v4
        >>> rngs = nnx.Rngs(0)
        >>> encoder = v4.DefaultEncoder(4, hidden_size=16, rngs=rngs)
        >>> decoder = v4.DefaultDecoder((2,), hidden_size=16, rngs=rngs)
        >>> policy = v4.Policy(encoder, decoder, v4.MinGRU(16, num_layers=4, rngs=rngs))
        >>> logits, values, state = policy.forward(jax.numpy.ones((3, 8, 4)))
        >>> logits.shape, values.shape
        ((24, 2), (3, 8))
    """

    torch_names: ClassVar = {name: name for name in _PARTS}

    def __init__(self, encoder: Any, decoder: Any, network: Core, *, env: spaces.Env = None):
        widths = {
            "encoder.hidden_size": encoder.hidden_size,
            "network.input_size": network.input_size,
            "network.hidden_size": network.hidden_size,
            "decoder.hidden_size": decoder.hidden_size,
        }
        inside = widths["encoder.hidden_size"] == widths["network.input_size"]
        if not inside or network.hidden_size != decoder.hidden_size:
            told = ", ".join(f"{name} is {width}" for name, width in widths.items())
            raise ValueError(f"the parts of the policy do not fit together: {told}")
        self.env_spec = _spec_of(encoder, decoder, env)
        self.hidden_size = network.hidden_size
        self.is_continuous = decoder.is_continuous
        self.is_multidiscrete = getattr(decoder, "is_multidiscrete", False)
        self.is_dict_obs = False
        self.dtype: DTypeLike | None = getattr(encoder, "dtype", None)
        self.encoder = encoder
        self.decoder = decoder
        self.network = network

    @classmethod
    def for_env(
        cls,
        env: spaces.Env,
        hidden_size: int = 128,
        num_layers: int = 4,
        *,
        network: str = "MinGRU",
        encoder: str = "DefaultEncoder",
        decoder: str = "DefaultDecoder",
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ) -> "Policy":
        """The policy that PufferLib 4's configuration asks for: parts by name, of one width.

        With `encoder="NativeEncoder", decoder="NativeDecoder"` it is that of the native trainer,
        whose `.bin` files `save_weights` and `load_weights` then write and read.

        Args:
            env: gives the spaces.
            hidden_size: width of all parts.
            num_layers: of the network.
            network: MinGRU, MLP, LSTM or GRU.
            encoder: DefaultEncoder, NatureEncoder, ImpalaEncoder or NativeEncoder.
            decoder: DefaultDecoder or NativeDecoder.
            rngs: stream `params`.
            dtype: of matmuls and convolutions; None: that of the parameters.
            param_dtype: of parameters, states, logits and values.

        Raises:
            ValueError: there is no such part, or it does not fit the environment.

        Example:
            >>> import puffer_jax
            >>> from flax import nnx
            >>> from puffer_jax import v4
            >>> env = puffer_jax.environments.make("cartpole")
            >>> policy = v4.Policy.for_env(env, hidden_size=32, num_layers=2, rngs=nnx.Rngs(0))
            >>> type(policy.network).__name__, policy.network.num_layers
            ('MinGRU', 2)
        """
        for part, name in (("encoder", encoder), ("decoder", decoder), ("network", network)):
            if name not in _PARTS[part]:
                known = ", ".join(_PARTS[part])
                raise ValueError(f"no such {part}: {near([name], _PARTS[part])[0]}; known: {known}")
        options: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        nvec = nvec_of(spaces.env_spec(env).single_action_space)
        return cls(
            _ENCODERS[encoder].for_env(env, hidden_size, **options),
            _DECODERS[decoder](nvec, hidden_size, **options),
            _NETWORKS[network](hidden_size, num_layers, **options),
            env=env,
        )

    @property
    def core(self) -> Core:
        """The network."""
        return self.network

    @property
    def bin_padding(self) -> int:
        """To what multiple of floats a `.bin` file moves the start of each of its tensors."""
        return PADDING if isinstance(self.decoder, NativeDecoder) else 1

    def encode_observations(
        self, observations: PyTree, state: State | None = None
    ) -> Float[Array, "batch hidden"]:
        """Hidden vectors (batch, hidden_size); no time axis."""
        return self.encoder(jnp.asarray(observations))

    def decode_actions(self, hidden: Float[Array, "batch hidden"]) -> tuple[Logits, Array]:
        """Logits and values (batch, 1)."""
        return self.decoder(hidden)

    def _encode(self, observations: PyTree, state: State | None) -> Float[Array, "batch input"]:
        return self.encode_observations(observations)

    def _decode(
        self, hidden: Float[Array, "batch hidden"], observations: PyTree
    ) -> tuple[Logits, Array]:
        return self.decode_actions(hidden)

    def input_layers(self) -> tuple[nnx.Linear, ...]:
        """The layer that reads observations as flat vectors, if there is one."""
        return (self.encoder.encoder,) if isinstance(self.encoder, DefaultEncoder) else ()

    def described(self) -> Description:
        """Class and sizes of each part; one of your own gives its full name only."""
        return {name: _described(getattr(self, name), known) for name, known in _PARTS.items()}

    @classmethod
    def rebuild(cls, env: spaces.Env, description: Description, **options: Any) -> "Policy":
        """The described policy.

        Raises:
            ValueError: a part is a custom one, or a size cannot be a size.
        """
        parts = {}
        for name, known in _PARTS.items():
            part = known.get(description[name]["class"])
            if part is None:
                raise ValueError(
                    f"the checkpoint has a custom {name}, {description[name]['class']}; build it "
                    "yourself and use load_weights"
                )
            sizes = read_sizes(description[name], part.sizes)  # type: ignore[reportAttributeAccessIssue]
            if name == "encoder":
                parts[name] = part.rebuild(env, sizes, **options)  # type: ignore[reportAttributeAccessIssue]
            else:
                parts[name] = part(**sizes, **options)
        return cls(**parts, env=env)

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """The description of a policy from its state_dict; None if the keys are not this class's.

        Raises:
            ValueError: the shapes do not tell enough.
        """
        below = {
            name: {
                k.removeprefix(f"{name}."): v for k, v in shapes.items() if k.startswith(f"{name}.")
            }
            for name in _PARTS
        }
        network = _first(_NETWORKS, lambda part: _network_sizes(part, below["network"]))
        # Their keys are another policy's without a network, and what they ask for beside the point.
        if network is None:
            return None
        encoder = _first(_ENCODERS, lambda part: part.from_keys(below["encoder"], hints))
        decoder = _first(_DECODERS, lambda part: part.from_keys(below["decoder"], hints))
        if encoder is None or decoder is None:
            return None
        return {
            "class": cls.__name__,
            "observation": encoder.pop("observation"),
            "action": decoder.pop("action"),
            "encoder": encoder,
            "decoder": decoder,
            "network": network,
        }

    def reference(self, models: ModuleType, env: spaces.Env) -> object:
        """PufferLib 3 has no such policy."""
        raise ValueError("PufferLib 3 has no policies of PufferLib 4")


def _spec_of(encoder: Any, decoder: Any, env: spaces.Env) -> spaces.EnvSpec:
    observation, action = getattr(encoder, "observation", None), getattr(decoder, "action", None)
    if env is None:
        if observation is None or action is None:
            raise ValueError("the parts of the policy do not tell their spaces; pass env")
        return spaces.EnvSpec(observation, action)
    spec = spaces.env_spec(env)
    check_widths(env)
    layout = spec.single_observation_space
    if layout.structured is not None:
        raise ValueError(
            f"{type(encoder).__name__} reads arrays; got a Dict or Tuple of "
            f"{', '.join(layout.structured.names or ())}. Flatten them in the environment"
        )
    if isinstance(encoder, FlatEncoder) and layout.features != encoder.obs_size:
        raise ValueError(
            f"obs_size is {encoder.obs_size}, but the observations of shape {layout.shape} have "
            f"{layout.features} numbers"
        )
    if action is not None and action != spec.single_action_space:
        raise ValueError(
            f"nvec={decoder.nvec} is for {action}, but the actions are {spec.single_action_space}"
        )
    return spec


def _described(part: Any, known: Mapping[str, type]) -> Description:
    cls = type(part)
    if known.get(cls.__name__) is not cls:
        return {"class": f"{cls.__module__}.{cls.__qualname__}"}
    return {"class": cls.__name__, "sizes": {name: getattr(part, name) for name in cls.sizes}}


def _network_sizes(network: Any, shapes: Mapping[str, Shape]) -> Description | None:
    # Alone it has no name before its keys.
    find = network.from_keys if network is not MinGRU else lambda keys: MinGRU.sizes_under("", keys)
    sizes = find(shapes)
    return None if sizes is None else {"sizes": sizes}


def _first(parts: Mapping[str, Any], look: Any) -> Description | None:
    """The description of the first part that knows its keys."""
    for name, part in parts.items():
        found = look(part)
        if found is not None:
            return {"class": name, **found}
    return None
