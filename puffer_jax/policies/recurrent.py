"""`Recurrent`: a recurrent core between a policy's encoder and its heads."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from puffer_jax.base import spaces
from puffer_jax.base.text import near
from puffer_jax.nn.cores import CORES, Core
from puffer_jax.nn.cores.lstm import LSTM
from puffer_jax.nn.initializers import reset_orthogonal
from puffer_jax.nn.params import Shape
from puffer_jax.nn.widths import check_widths
from puffer_jax.policies.base import (
    Description,
    Dtypes,
    FeedForward,
    Hints,
    read_sizes,
    reference_of,
)
from puffer_jax.policies.protocol import Logits, Policy, State, masked_by
from puffer_jax.policies.stateful import Stateful


class Recurrent(Stateful):
    """Puts a recurrent core between a policy's encoder and its heads.

    `forward_eval` is one step for acting, `forward` a scan over time for training; both use
    one core and return the new state where the reference writes into the given one. A state
    is a dict of the core's arrays (batch, ...) and "hidden", the core's output.
    `initial_state` and `forward_eval` have the same structure, so a state can be the carry of
    `jax.lax.scan` and never causes a retrace; "hidden" is ignored on the way in.

    The core is the attribute of its own name, `policy.lstm` or `policy.gru`, as in torch's keys.

    Quirk kept: building it re-initialises the wrapped policy, its heads included: every weight
    orthogonal with gain 1 and every bias zero (the gains sqrt(2) and 0.01 are lost), while the
    core keeps its own initialisation.

    Args:
        env: gives the observation space.
        policy: any module with `encode_observations`, `decode_actions`, `is_continuous`.
        core: a `puffer_jax.GRU`, say; see `puffer_jax.nn.cores.Core`. Its `input_size` is the
            width of the policy's encoding, its `hidden_size` that of what the policy's heads read.
        rngs: stream `params`, for the policy's new weights; None keeps those it has.

    Raises:
        ValueError: the core's `input_size` or `hidden_size` is not the policy's `hidden_size`.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.Default(env, hidden_size=16, rngs=nnx.Rngs(0))
        >>> core = puffer_jax.GRU(16, 16, rngs=nnx.Rngs(1))
        >>> policy = puffer_jax.Recurrent(env, policy, core, rngs=nnx.Rngs(2))
        >>> state = policy.initial_state(3)
        >>> logits, values, state = policy.forward_eval(jax.numpy.ones((3, 4)), state)
        >>> logits.shape
        (3, 2)
    """

    torch_names: ClassVar = {"policy": "policy"}

    def __init__(self, env: spaces.Env, policy: Any, core: Core, *, rngs: nnx.Rngs | None):
        self._check_sizes(policy, core.input_size, core.hidden_size)
        if rngs is not None:
            reset_orthogonal(policy, rngs=rngs)  # type: ignore[arg-type]
        self.env_spec = spaces.env_spec(env)
        check_widths(env)
        self.policy = policy
        self.input_size = core.input_size
        self.hidden_size = core.hidden_size
        self.is_continuous = policy.is_continuous
        self.is_multidiscrete = getattr(policy, "is_multidiscrete", False)
        self.is_dict_obs = getattr(policy, "is_dict_obs", False)
        self.core_name = core.name
        setattr(self, core.name, core)

    @property
    def core(self) -> Core:
        """The core, which is stored under its own name."""
        return getattr(self, self.core_name)

    @property
    def torch_aliases(self) -> dict[str, str]:
        """PufferLib's wrapper lists the core's parameters twice: for segments and for steps."""
        names = getattr(self.core, "cell_names", {}).items()
        return {f"cell.{alias}": f"{self.core_name}.{name}" for alias, name in names}

    @classmethod
    def _check_sizes(cls, policy: Any, input_size: int, hidden_size: int) -> None:
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            # A custom policy may encode to one width and decode from another.
            if isinstance(policy, FeedForward) and policy.hidden_size != size:
                raise ValueError(
                    f"{cls.__name__}'s {name} is {size} but {type(policy).__name__}'s hidden_size "
                    f"is {policy.hidden_size}; pass {name}={policy.hidden_size}"
                )

    def _encode(self, observations: PyTree, state: State | None) -> Float[Array, "batch input"]:
        encoded = self.policy.encode_observations(observations, state=state)
        if encoded.ndim != 2 or encoded.shape[1] != self.input_size:
            raise ValueError(
                f"{type(self.policy).__name__} encodes to shape {encoded.shape}, but "
                f"{type(self).__name__}'s input_size is {self.input_size}; build it with "
                f"input_size={encoded.shape[-1]}"
            )
        return encoded

    def _decode(
        self, hidden: Float[Array, "batch hidden"], observations: PyTree
    ) -> tuple[Logits, Array]:
        logits, values = self.policy.decode_actions(hidden)
        return masked_by(self.policy, logits, observations), values

    def described(self) -> Description:
        """The core and its sizes; a custom core gives its full name only."""
        cls = type(self.core)
        if CORES.get(self.core_name) is not cls:
            return {"core": f"{cls.__module__}.{cls.__qualname__}"}
        sizes = {name: getattr(self.core, name) for name in CORES[self.core_name].sizes}
        return {"core": self.core_name, "sizes": sizes}

    @classmethod
    def rebuild(
        cls,
        env: spaces.Env,
        description: Description,
        policy: Any,
        *,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ) -> "Recurrent":
        """The described core around `policy`.

        Raises:
            ValueError: the core is a custom one, or a size cannot be a size.
        """
        core = CORES.get(description["core"])
        if core is None:
            raise ValueError(
                f"the checkpoint is of a custom core, {description['core']}; build it yourself "
                "and use load_weights"
            )
        sizes = read_sizes(description, core.sizes)
        return cls(env, policy, core(**sizes, rngs=rngs, **dtypes), rngs=None)

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """The core in a checkpoint and its sizes; None if it has no known core."""
        for name, core in CORES.items():
            sizes = core.from_keys(shapes)
            if sizes is not None:
                return {"class": cls.__name__, "core": name, "sizes": sizes}
        return None

    def example_shape(self) -> tuple[int, int, int] | None:
        """See `FeedForward.example_shape`."""
        return self.policy.example_shape()  # type: ignore[attr-defined]

    def reference(self, models: ModuleType, env: spaces.Env) -> object:
        """PufferLib has no such policy."""
        raise ValueError(f"PufferLib has no policy with the core {self.core_name}")


class LSTMWrapper(Recurrent):
    """`Recurrent` with torch's LSTM, whose states are "lstm_h" and "lstm_c" (batch, hidden_size).

    Quirk kept: while every bias of the wrapped policy is zeroed, the LSTM keeps torch's uniform
    initialisation with non-zero biases.

    Args:
        env: gives the observation space.
        policy: see `Recurrent`.
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

    lstm: LSTM

    def __init__(
        self,
        env: spaces.Env,
        policy: Any,
        input_size: int = 128,
        hidden_size: int = 128,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self._check_sizes(policy, input_size, hidden_size)
        # Before the LSTM draws its weights, so that a seed gives what it always gave.
        reset_orthogonal(policy, rngs=rngs)  # type: ignore[arg-type]
        lstm = LSTM(input_size, hidden_size, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        super().__init__(env, policy, lstm, rngs=None)

    def described(self) -> Description:
        """The sizes."""
        return {"sizes": {name: getattr(self, name) for name in LSTM.sizes}}

    @classmethod
    def rebuild(
        cls,
        env: spaces.Env,
        description: Description,
        policy: Any,
        *,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ) -> "LSTMWrapper":
        """An LSTM of the described sizes around `policy`; a ValueError if they cannot be sizes."""
        return cls(env, policy, **read_sizes(description, LSTM.sizes), rngs=rngs, **dtypes)

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """The sizes of the LSTM in a checkpoint; None if it has no LSTM."""
        sizes = LSTM.from_keys(shapes)
        return None if sizes is None else {"class": cls.__name__, "sizes": sizes}

    def reference(self, models: ModuleType, env: spaces.Env) -> object:
        """PufferLib's, around its twin of the wrapped policy."""
        inner = reference_of(self.policy, models, env)
        return models.LSTMWrapper(env, inner, self.input_size, self.hidden_size)


def with_core(
    name: str,
    env: spaces.Env,
    policy: Policy,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **sizes: int,
) -> Recurrent:
    """`policy` with the core of that name in `puffer_jax.nn.cores.CORES`, as wide as itself.

    Args:
        name: "lstm", say.
        env: gives the observation space.
        policy: see `Recurrent`.
        rngs: stream `params`.
        dtype: of the core's matmuls.
        param_dtype: of its parameters and states.
        sizes: others of the core's sizes, `num_layers` say.

    Raises:
        ValueError: there is no such core, or it has no such size.
    """
    if name not in CORES:
        raise ValueError(f"no such core: {near([name], CORES)[0]}; there are {', '.join(CORES)}")
    if unknown := [size for size in sizes if size not in CORES[name].sizes]:
        raise ValueError(f"the core {name} has no {', '.join(unknown)}")
    widths = [size for size in CORES[name].sizes if size in ("input_size", "hidden_size")]
    sizes |= dict.fromkeys(widths, policy.hidden_size)
    dtypes = Dtypes(dtype=dtype, param_dtype=param_dtype)
    if name == "lstm":
        return LSTMWrapper(env, policy, **sizes, rngs=rngs, **dtypes)
    return Recurrent(env, policy, CORES[name](**sizes, rngs=rngs, **dtypes), rngs=rngs)
