"""The policies that checkpoints, the command line and comparisons know by name."""

from puffer_jax.policies.base import FeedForward
from puffer_jax.policies.convolutional import Convolutional
from puffer_jax.policies.default import Default
from puffer_jax.policies.mlp import MLP
from puffer_jax.policies.procgen import ProcgenResnet
from puffer_jax.policies.recurrent import LSTMWrapper, Recurrent
from puffer_jax.policies.v4.policy import Policy

FEED_FORWARD: dict[str, type[FeedForward]] = {
    cls.__name__: cls for cls in (Default, Convolutional, ProcgenResnet, MLP)
}

# PufferLib's come first: if several fit a checkpoint, the first is taken.
RECURRENT: dict[str, type[Recurrent]] = {cls.__name__: cls for cls in (LSTMWrapper, Recurrent)}

# PufferLib 4's, a whole that is wrapped by nothing.
WHOLE: dict[str, type[Policy]] = {Policy.__name__: Policy}

POLICIES: dict[str, type[FeedForward] | type[Recurrent] | type[Policy]] = {
    **FEED_FORWARD,
    **RECURRENT,
    **WHOLE,
}
