"""From hidden vectors to logits and values."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from puffer_jax.base import spaces
from puffer_jax.nn.initializers import torch_init, uniform
from puffer_jax.nn.linear import linear
from puffer_jax.nn.params import Shape, shape_of
from puffer_jax.policies.base import Description, Dtypes, Hints, zeros
from puffer_jax.policies.flat import action_from_keys, logits_of
from puffer_jax.policies.protocol import Logits


class Decoder(nnx.Module):
    """What the decoders share.

    Args:
        nvec: see `DefaultDecoder`.
        hidden_size: width of the vectors.
        dtype: of the matmuls; None: that of the parameters.
        param_dtype: of parameters, logits and values.

    Raises:
        ValueError: `nvec` is empty or has a number below 1.
    """

    sizes: ClassVar[Mapping[str, type]] = {"nvec": tuple, "hidden_size": int}

    def __init__(
        self,
        nvec: Sequence[int],
        hidden_size: int,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
    ):
        nvec = tuple(int(n) for n in nvec)
        if not nvec or min(nvec) < 1:
            raise ValueError(f"nvec is {nvec}; expected one or more numbers of at least 1")
        self.nvec = nvec
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.is_continuous = max(nvec) == 1
        self.is_multidiscrete = not self.is_continuous and len(nvec) > 1
        if self.is_continuous:
            self.action: spaces.Action = spaces.Continuous((len(nvec),))
        elif self.is_multidiscrete:
            self.action = spaces.MultiDiscrete(nvec)
        else:
            self.action = spaces.Discrete(sum(nvec))

    def _logits(self, outputs: Array, logstd: Array | None) -> Logits:
        return logits_of(outputs.astype(self.param_dtype), self.action, logstd)


def nvec_of(action: spaces.Action) -> tuple[int, ...]:
    """The `nvec` of a decoder for these actions."""
    match action:
        case spaces.Continuous((size,)):
            return (1,) * size
        case spaces.MultiDiscrete(nvec):
            return tuple(nvec)
        case spaces.Discrete(n):
            return (n,)
    raise ValueError(f"no decoder is for {action}")


def _described(action: Description, hidden_size: int) -> Description:
    """What `from_keys` returns for these actions."""
    if action["class"] == "Continuous":
        nvec = (1,) * action["shape"][0]
    elif action["class"] == "Discrete":
        nvec = (action["n"],)
    else:
        nvec = action["nvec"]
    return {"sizes": {"nvec": nvec, "hidden_size": hidden_size}, "action": action}


class DefaultDecoder(Decoder):
    """Linear heads for actions and value.

    Args:
        nvec: how many choices each component of an action has. One number is a Discrete space,
            several are a MultiDiscrete one; if all are 1, it is a Box of so many numbers, with a
            learned log-std that does not depend on the state.
        hidden_size: width of the vectors.
        rngs: stream `params`; the weights are torch's default, the log-std is zero.
        dtype: of the matmuls; None: that of the parameters.
        param_dtype: of parameters, logits and values.

    Raises:
        ValueError: `nvec` is empty or has a number below 1.

    Reference: `DefaultDecoder` in PufferLib 4's `pufferlib/models.py`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from puffer_jax import v4
        >>> decoder = v4.DefaultDecoder((2, 3), hidden_size=16, rngs=nnx.Rngs(0))
        >>> logits, values = decoder(jax.numpy.ones((5, 16)))
        >>> [part.shape for part in logits], values.shape
        ([(5, 2), (5, 3)], (5, 1))
    """

    torch_names: ClassVar = {
        name: name for name in ("decoder_logstd", "decoder", "decoder_mean", "value_function")
    }

    def __init__(
        self,
        nvec: Sequence[int],
        hidden_size: int = 128,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(nvec, hidden_size, dtype, param_dtype)
        nvec = self.nvec
        dtypes = Dtypes(dtype=dtype, param_dtype=param_dtype)

        def head(outputs: int) -> nnx.Linear:
            layer = nnx.Linear(hidden_size, outputs, kernel_init=zeros, rngs=rngs, **dtypes)
            return torch_init(layer, rngs=rngs)

        if self.is_continuous:
            self.decoder_mean = head(len(nvec))
            self.decoder_logstd = nnx.Param(jnp.zeros((1, len(nvec)), param_dtype))
        else:
            self.decoder = head(sum(nvec))
        self.value_function = head(1)

    def __call__(self, hidden: Float[Array, "batch hidden"]) -> tuple[Logits, Array]:
        """Logits, and values (batch, 1)."""
        first = self.decoder_mean if self.is_continuous else self.decoder
        outputs, values = linear(hidden, (first, self.value_function))
        logstd = self.decoder_logstd[...] if self.is_continuous else None
        return self._logits(outputs, logstd), values.astype(self.param_dtype)

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """Sizes and actions of the decoder with these keys; None if they are not its.

        Raises:
            ValueError: the heads fit several spaces.
        """
        if "value_function.weight" not in shapes:
            return None
        hidden = shape_of(shapes, "value_function.weight", 2)[1]
        return _described(action_from_keys(shapes, hints), hidden)


class NativeDecoder(Decoder):
    """The decoder of PufferLib 4's native trainer: one matrix without bias for actions and value.

    The last row of `weight` (A + 1, hidden) is the value's. If the actions are continuous,
    `logstd` (1, A) does not depend on the state.

    Args:
        nvec: see `DefaultDecoder`.
        hidden_size: width of the vectors.
        rngs: stream `params`; the weights are U(-1/sqrt(hidden), +), the log-std is zero.
        dtype: of the matmul; None: that of the parameters.
        param_dtype: of parameters, logits and values.

    Raises:
        ValueError: `nvec` is empty or has a number below 1.

    Reference: the decoder in PufferLib 4's `src/models.cu`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from puffer_jax import v4
        >>> decoder = v4.NativeDecoder((1, 1), hidden_size=16, rngs=nnx.Rngs(0))
        >>> logits, values = decoder(jax.numpy.ones((5, 16)))
        >>> decoder.weight.shape, logits.loc.shape, values.shape
        ((3, 16), (5, 2), (5, 1))
    """

    # The order of the native file.
    torch_names: ClassVar = {name: name for name in ("weight", "logstd")}

    def __init__(
        self,
        nvec: Sequence[int],
        hidden_size: int = 128,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(nvec, hidden_size, dtype, param_dtype)
        shape, bound = (sum(self.nvec) + 1, hidden_size), 1 / math.sqrt(hidden_size)
        self.weight = nnx.Param(uniform(rngs, shape, bound, param_dtype))
        if self.is_continuous:
            self.logstd = nnx.Param(jnp.zeros((1, len(self.nvec)), param_dtype))

    def __call__(self, hidden: Float[Array, "batch hidden"]) -> tuple[Logits, Array]:
        """Logits, and values (batch, 1)."""
        outputs = product(hidden, self.weight[...], self.dtype)
        logstd = self.logstd[...] if self.is_continuous else None
        return self._logits(outputs[:, :-1], logstd), outputs[:, -1:].astype(self.param_dtype)

    @classmethod
    def from_keys(cls, shapes: Mapping[str, Shape], hints: Hints) -> Description | None:
        """See `DefaultDecoder.from_keys`.

        Raises:
            ValueError: the matrix fits several spaces.
        """
        if "weight" not in shapes:
            return None
        rows, hidden = shape_of(shapes, "weight", 2)
        name = "decoder_mean.weight" if "logstd" in shapes else "decoder.weight"
        return _described(action_from_keys({name: (rows - 1, hidden)}, hints), hidden)


def product(
    x: Float[Array, "batch inputs"], weight: Float[Array, "outputs inputs"], dtype: DTypeLike | None
) -> Float[Array, "batch outputs"]:
    """The product x W^T in `dtype`; None: that of the weight."""
    dtype = weight.dtype if dtype is None else dtype
    return x.astype(dtype) @ weight.astype(dtype).T
