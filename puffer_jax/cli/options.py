"""Options that commands share."""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import tyro

from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.vector.options import MultiprocessingOptions, SerialOptions

T = TypeVar("T")
_NoFlag = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]


@dataclass(frozen=True)
class TrainOptions(PuffeRLConfig):
    """What to train with. Names, meaning and defaults are those of PufferLib 3.0's `[train]`.

    The last group is ours. Its defaults are what the reference does; --recommended has the values
    we would use.
    """

    # The rest of the command line settles these.
    env: _NoFlag[str] = ""
    use_rnn: _NoFlag[bool | None] = None
    num_envs: _NoFlag[int | None] = None

    def __post_init__(self) -> None:
        """Leave checking the values to `PuffeRLConfig`, since tyro would rewrap its messages."""


@dataclass(frozen=True, kw_only=True)
class VecOptions(SerialOptions, MultiprocessingOptions):
    """Copies of the environment. JAX-native ones need no mode: they are one compiled program."""

    num_envs: int | None = None
    """Number of copies. None: 64, but 8 with the modes async, puffer_jax and puffer."""
    mode: Literal["auto", "sync", "async", "vector", "puffer_jax", "puffer"] = "auto"
    """gymnasium's own: sync, one after another; async, a process each; vector, the environment's
    own vector form. puffer_jax: `puffer_jax.vector`; puffer: PufferLib's; both with the other
    options. auto: vector, failing that sync, for gymnasium's ids; puffer_jax for all others."""
    backend: Literal["Serial", "Multiprocessing"] = "Serial"
    """Backend for the modes puffer_jax and puffer."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """The policy; options left out have its defaults, or come from the environment."""

    name: str = "auto"
    """Default, MLP, Convolutional, ProcgenResnet, or v4, PufferLib 4's. auto: ProcgenResnet for
    uint8 images of (64, 64, 3), Convolutional for all others of at least 36x36, MLP for vectors
    with continuous actions, Default for everything else."""
    action_mask: str | None = "auto"
    """Key of Dict observations, or of gymnasium's infos, that says which actions are legal. auto:
    action_mask, if the observations have it. None: all actions are legal, and it is observed."""
    core: str | None = None
    """Put a recurrent core between the encoder and the heads: lstm (which is --rnn), gru or
    mingru."""
    num_layers: int | None = None
    """v4, or the core mingru: layers of the network."""
    network: str | None = None
    """v4: MinGRU, LSTM, GRU or MLP."""
    encoder: str | None = None
    """v4: DefaultEncoder, NatureEncoder, ImpalaEncoder or NativeEncoder."""
    decoder: str | None = None
    """v4: DefaultDecoder or NativeDecoder."""
    hidden_size: int | None = None
    """Width of the encoding, and of the core; of an MLP, of both hidden layers."""
    hidden_sizes: tuple[int, ...] | None = None
    """MLP: width of each hidden layer."""
    activation: Literal["tanh", "relu", "gelu", "silu", "elu"] | None = None
    """MLP: what follows each hidden layer."""
    separate: bool | None = None
    """MLP: whether actor and critic have hidden layers of their own."""
    cnn_width: int | None = None
    """ProcgenResnet: channels of the first convolutions."""
    framestack: int | None = None
    """Convolutional: channels of the image."""
    flat_size: int | None = None
    """Convolutional: length of the flattened output of the convolutions."""
    channels_last: bool | None = None
    """Convolutional: images are height, width, channels."""
    downsample: int | None = None
    """Convolutional: sees every n-th pixel."""
