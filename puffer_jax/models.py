"""PufferLib's policies as Flax NNX modules: same names, same numbers, same checkpoints.

Every policy turns observations into a hidden vector (`encode_observations`) and that into
logits and a value (`decode_actions`); `LSTMWrapper` puts an LSTM between the two. Parameters
carry torch's names along attribute paths, so the weight exchange needs no tables.

Matmuls and convolutions run in `dtype` (None: that of the parameters); logits, values and
states always come out in `param_dtype`.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from puffer_jax.base import spaces
from puffer_jax.kernels.perceptron import gelu
from puffer_jax.kernels.pooling import max_pool
from puffer_jax.nativize import flatten_observations, nativize_dtype, nativize_tensor
from puffer_jax.nn.distributions import Normal
from puffer_jax.nn.images import Conv2d, Deferred, flatten, flatten_channels_first
from puffer_jax.nn.initializers import layer_init, reset_orthogonal, torch_init
from puffer_jax.nn.linear import linear, perceptron
from puffer_jax.nn.lstm import LSTM

# Flax's own initial kernels would be drawn only to be overwritten.
_zeros = jax.nn.initializers.zeros

Logits = Array | tuple[Array, ...] | Normal

State = dict[str, Any]  # arrays


class _Policy(nnx.Module):
    """What the feed-forward policies share: the spaces they were built for, and forward."""

    hidden_size: int
    is_continuous = False
    is_multidiscrete = False
    is_dict_obs = False
    torch_names: ClassVar[dict[str, str]] = {}

    def __init__(self, env: Any, dtype: Any, param_dtype: Any):
        self.env_spec = spaces.env_spec(env)
        self.dtype = dtype
        self.param_dtype = param_dtype

    def encode_observations(self, observations: Any, state: State | None = None) -> Array:
        raise NotImplementedError

    def decode_actions(self, hidden: Array) -> tuple[Logits, Array]:
        raise NotImplementedError

    def forward_eval(self, observations: Any, state: State | None = None) -> tuple[Logits, Array]:
        """Logits and values (batch, 1) for a batch of observations; `state` is not used."""
        return self.decode_actions(self.encode_observations(observations, state=state))

    def forward(self, observations: Any, state: State | None = None) -> tuple[Logits, Array]:
        """The same as `forward_eval`."""
        return self.forward_eval(observations, state)

    def __call__(self, observations: Any, state: State | None = None) -> tuple[Logits, Array]:
        return self.forward(observations, state)

    @property
    def _compute_dtype(self) -> Any:
        return self.param_dtype if self.dtype is None else self.dtype

    def _dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _linear(
        self, inputs: int, outputs: int, std: float = math.sqrt(2), *, rngs: nnx.Rngs
    ) -> nnx.Linear:
        layer = nnx.Linear(inputs, outputs, kernel_init=_zeros, rngs=rngs, **self._dtypes())
        return layer_init(layer, std, rngs=rngs)

    def _discrete_actions(self) -> int:
        action = self.env_spec.single_action_space
        if not isinstance(action, spaces.Discrete):
            raise ValueError(
                f"{type(self).__name__} acts in Discrete spaces only, as in the reference; got "
                f"{action}. Default serves MultiDiscrete and Box"
            )
        return action.n

    def _image_shape(self) -> tuple[int, int, int] | None:
        shape = self.env_spec.single_observation_space.shape
        if shape is not None and len(shape) != 3:
            raise ValueError(
                f"{type(self).__name__} takes images, observations of three dimensions; got "
                f"shape {shape}"
            )
        return shape

    def _scaled_images(self, images: Any) -> Array:
        """Numbers 0..255 as 0..1, except for bytes, which `Conv2d` scales."""
        images = jnp.asarray(images)
        if images.dtype == jnp.uint8:
            return images
        return images.astype(self._compute_dtype) / 255.0


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


class Convolutional(_Policy):
    """NatureCNN: three convolutions and a Linear, for Atari-like images.

    Observations are (batch, framestack, H, W), or (batch, H, W, framestack) with
    `channels_last`, valued 0..255. Unlike the reference's it has `forward_eval`, so it
    runs bare in a trainer as well as inside `LSTMWrapper`.

    Args:
        env: gives the spaces; actions are Discrete.
        framestack: channels of the image; 4 without LSTM and 1 with it is customary.
        flat_size: numbers that leave the convolutions, 64 * h * w.
        input_size: not used, as in the reference.
        hidden_size: width of the encoding.
        output_size: width the value head reads; must be `hidden_size`.
        channels_last: where the channels are.
        downsample: keep every n-th pixel.
        rngs: stream `params`.
        dtype: of convolutions and matmuls.
        param_dtype: of parameters, logits and values.

    Raises:
        ValueError: `output_size` is not `hidden_size`; `framestack` or `flat_size` do not fit
            the image; the action space is not Discrete.

    Reference: `pufferlib.models.Convolutional`; Mnih et al. 2015.
    """

    torch_names: ClassVar = {name: name for name in ("network", "actor", "value_fn")}

    def __init__(
        self,
        env: Any,
        *,
        framestack: int,
        flat_size: int,
        input_size: int = 512,
        hidden_size: int = 512,
        output_size: int = 512,
        channels_last: bool = False,
        downsample: int = 1,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__(env, dtype, param_dtype)
        if hidden_size != output_size:
            raise ValueError(
                f"hidden_size is {hidden_size} and output_size {output_size}, but both heads read "
                f"the same encoding; pass output_size={hidden_size}"
            )
        self.framestack = framestack
        self.flat_size = flat_size
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = output_size
        self.channels_last = channels_last
        self.downsample = downsample
        self._check_image()

        self.network = nnx.Sequential(
            self._conv(framestack, 32, 8, 4, channels_first=not channels_last, rngs=rngs),
            Deferred(jax.nn.relu),
            self._conv(32, 64, 4, 2, rectify=True, rngs=rngs),
            Deferred(jax.nn.relu),
            self._conv(64, 64, 3, 1, rectify=True, out_channels_first=True, rngs=rngs),
            jax.nn.relu,
            flatten,
            self._linear(flat_size, hidden_size, rngs=rngs),
            jax.nn.relu,
        )
        self.actor = self._linear(hidden_size, self._discrete_actions(), 0.01, rngs=rngs)
        self.value_fn = self._linear(output_size, 1, 1.0, rngs=rngs)

    def _conv(self, *sizes: int, rngs: nnx.Rngs, **options: Any) -> Conv2d:
        return layer_init(Conv2d(*sizes, rngs=rngs, **options, **self._dtypes()), rngs=rngs)

    def _check_image(self) -> None:
        shape = self._image_shape()
        if shape is None:
            return
        height, width, channels = shape if self.channels_last else (*shape[1:], shape[0])
        if channels != self.framestack:
            order = "(H, W, C)" if self.channels_last else "(C, H, W)"
            raise ValueError(
                f"framestack is {self.framestack} but the observation space {shape} has {channels} "
                f"channels, read as {order}; pass framestack={channels} or another channels_last"
            )
        sides = [-(-side // self.downsample) for side in (height, width)]
        for window, stride in ((8, 4), (4, 2), (3, 1)):
            sides = [(side - window) // stride + 1 for side in sides]
        if min(sides) < 1:
            raise ValueError(
                f"images of {height}x{width} with downsample={self.downsample} are too small for "
                "three convolutions; at least 36x36 must remain"
            )
        if self.flat_size != 64 * sides[0] * sides[1]:
            raise ValueError(
                f"flat_size is {self.flat_size} but the convolutions of a {height}x{width} image "
                f"with downsample={self.downsample} give {64 * sides[0] * sides[1]}; pass "
                f"flat_size={64 * sides[0] * sides[1]}"
            )

    def encode_observations(
        self, observations: Any, state: State | None = None
    ) -> Float[Array, "batch hidden"]:
        """Hidden vectors (batch, hidden_size); no time axis."""
        images = self._scaled_images(observations)
        pixels = (..., *[slice(None, None, self.downsample)] * 2)
        return self.network(images[*pixels, :] if self.channels_last else images[pixels])

    def decode_actions(self, hidden: Float[Array, "batch hidden"]) -> tuple[Array, Array]:
        """Logits (batch, n) and values (batch, 1)."""
        logits, values = linear(hidden, (self.actor, self.value_fn))
        return logits.astype(self.param_dtype), values.astype(self.param_dtype)


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions around a skip connection, images (batch, H, W, channels).

    Quirk kept: torch's default uniform initialisation.

    Reference: `pufferlib.models.ResidualBlock`.
    """

    torch_names: ClassVar = {"conv0": "conv0", "conv1": "conv1"}

    def __init__(
        self, channels: int, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32
    ):
        self.conv0 = _conv3x3(channels, channels, rngs, dtype, param_dtype, rectify=True)
        self.conv1 = _conv3x3(channels, channels, rngs, dtype, param_dtype, rectify=True)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        """Images of the same shape."""
        return self.conv1(self.conv0(x)) + x


class ConvSequence(nnx.Module):
    """A 3x3 convolution, max-pooling to half the size and two residual blocks.

    Quirk kept: torch's default uniform initialisation.

    Args:
        input_shape: (H, W, C); the reference's is (C, H, W).
        out_channels: C'.
        rngs: stream `params`.
        dtype: of the convolutions.
        param_dtype: of the parameters.

    Reference: `pufferlib.models.ConvSequence`; Espeholt et al. 2018 (IMPALA).
    """

    torch_names: ClassVar = {name: name for name in ("conv", "res_block0", "res_block1")}

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        out_channels: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self._input_shape = tuple(input_shape)
        self._out_channels = out_channels
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.conv = _conv3x3(input_shape[2], out_channels, rngs, dtype, param_dtype)
        self.res_block0 = ResidualBlock(out_channels, rngs=rngs, **dtypes)
        self.res_block1 = ResidualBlock(out_channels, rngs=rngs, **dtypes)

    def __call__(self, x: Shaped[Array, "batch height width channels"]) -> Array:
        """Images (batch, H, W, C) -> (batch, H', W', C'); bytes are scaled to 0..1."""
        return self.res_block1(self.res_block0(max_pool(self.conv(x))))

    def get_output_shape(self) -> tuple[int, int, int]:
        """(H', W', C')."""
        height, width, _ = self._input_shape
        return (height + 1) // 2, (width + 1) // 2, self._out_channels


class ProcgenResnet(_Policy):
    """The IMPALA ResNet as used for Procgen: three `ConvSequence`s and a Linear.

    Observations are (batch, H, W, C), valued 0..255. Unlike the reference's it has
    `hidden_size`, `is_continuous` and `forward_eval`, so it runs bare in a trainer as well as
    inside `LSTMWrapper`.

    Quirk kept: all inner layers have torch's default uniform initialisation; only the heads
    are orthogonal.

    Args:
        env: gives the spaces; actions are Discrete.
        cnn_width: channels of the first sequence; the others have twice as many.
        mlp_width: width of the encoding.
        rngs: stream `params`.
        dtype: of convolutions and matmuls.
        param_dtype: of parameters, logits and values.

    Raises:
        ValueError: the observation is no image or the action space not Discrete.

    Reference: `pufferlib.models.ProcgenResnet`; Espeholt et al. 2018 (IMPALA).
    """

    torch_names: ClassVar = {name: name for name in ("network", "actor", "value")}

    def __init__(
        self,
        env: Any,
        cnn_width: int = 16,
        mlp_width: int = 256,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__(env, dtype, param_dtype)
        self.cnn_width = cnn_width
        self.mlp_width = mlp_width
        self.hidden_size = mlp_width
        shape = self._image_shape()
        if shape is None:
            raise ValueError("ProcgenResnet needs the image size: an env with an observation space")
        sequences = []
        for width in (cnn_width, 2 * cnn_width, 2 * cnn_width):
            sequences.append(ConvSequence(shape, width, rngs=rngs, **self._dtypes()))
            shape = sequences[-1].get_output_shape()

        linear = nnx.Linear(
            math.prod(shape), mlp_width, kernel_init=_zeros, rngs=rngs, **self._dtypes()
        )
        self.network = nnx.Sequential(
            *sequences,
            flatten_channels_first,
            jax.nn.relu,
            torch_init(linear, rngs=rngs),
            jax.nn.relu,
        )
        self.actor = self._linear(mlp_width, self._discrete_actions(), 0.01, rngs=rngs)
        self.value = self._linear(mlp_width, 1, 1.0, rngs=rngs)

    def encode_observations(
        self, observations: Any, state: State | None = None
    ) -> Float[Array, "batch hidden"]:
        """Hidden vectors (batch, mlp_width); no time axis."""
        return self.network(self._scaled_images(observations))

    def decode_actions(self, hidden: Float[Array, "batch hidden"]) -> tuple[Array, Array]:
        """Logits (batch, n) and values (batch, 1)."""
        logits, values = linear(hidden, (self.actor, self.value))
        return logits.astype(self.param_dtype), values.astype(self.param_dtype)


def _conv3x3(
    inputs: int, outputs: int, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, rectify: bool = False
) -> Conv2d:
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    return torch_init(
        Conv2d(inputs, outputs, 3, padding=1, rectify=rectify, rngs=rngs, **dtypes), rngs=rngs
    )
