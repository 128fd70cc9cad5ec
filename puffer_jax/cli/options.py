"""Options that commands share."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from puffer_jax.ppo.config import Auto, PuffeRLConfig

# What the rest of the command line says already.
_SETTLED = ("env", "use_rnn", "num_envs")

if TYPE_CHECKING:
    TrainOptions = PuffeRLConfig
else:
    # PuffeRLConfig checks its values when it is made, and tyro would wrap what it says.
    TrainOptions = dataclasses.make_dataclass(
        "TrainOptions",
        [
            (field.name, field.type, field.default)
            for field in dataclasses.fields(PuffeRLConfig)
            if field.name not in _SETTLED
        ],
        frozen=True,
        namespace={"__doc__": PuffeRLConfig.__doc__},
    )


def _train_options(config: PuffeRLConfig) -> Any:
    values = dataclasses.asdict(config)
    return TrainOptions(**{k: v for k, v in values.items() if k not in _SETTLED})


@dataclass(frozen=True, kw_only=True)
class VecOptions:
    """Copies of the environment. JAX-native ones need no mode: they are one compiled program."""

    num_envs: int | None = None
    """How many. None: 64, but 8 with the modes async, puffer_jax and puffer."""
    mode: Literal["auto", "sync", "async", "vector", "puffer_jax", "puffer"] = "auto"
    """sync: one after another; async: a process each; vector: the environment's own vector form.
    All of them gymnasium's. puffer_jax: `puffer_jax.vector`, puffer: PufferLib's, both with what
    follows. auto: for ids of gymnasium, vector or else sync; for all others, puffer_jax."""
    backend: Literal["Serial", "Multiprocessing"] = "Serial"
    """Of the modes puffer_jax and puffer."""
    num_workers: int | Auto | None = None
    """Processes of Multiprocessing; auto: one for each environment."""
    batch_size: int | Auto | None = None
    """Environments that Multiprocessing hands out at once; auto: half of them."""
    zero_copy: bool = True
    """Multiprocessing hands out only batches that lie in a row."""
    local_worker: bool = False
    """One of the workers of puffer_jax's Multiprocessing is the trainer's process."""
    num_buffers: int = 1
    """Groups in which the environments of puffer_jax's Serial take turns: while one steps, the
    policy acts for another. 2 is often faster."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """The policy; what is not given is its own default, or comes from the environment."""

    name: Literal["auto", "Default", "Convolutional", "ProcgenResnet"] = "auto"
    """auto: Convolutional for uint8 images of 84x84 with 1 or 4 channels, ProcgenResnet for
    those of (64, 64, 3), Default for all else."""
    core: str | None = None
    """Put a recurrent core between the encoder and the heads: lstm (which is --rnn) or gru."""
    hidden_size: int | None = None
    """Width of the encoding, and of the core."""
    cnn_width: int | None = None
    """Of ProcgenResnet: channels of the first convolutions."""
    framestack: int | None = None
    """Of Convolutional: channels of the image."""
    flat_size: int | None = None
    """Of Convolutional: numbers that leave the convolutions."""
    channels_last: bool | None = None
    """Of Convolutional: images are height, width, channels."""
    downsample: int | None = None
    """Of Convolutional: every n-th pixel is seen."""
