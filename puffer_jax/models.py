"""PufferLib's policies as Flax NNX modules."""

from puffer_jax.policies.convolutional import Convolutional as Convolutional
from puffer_jax.policies.default import Default as Default
from puffer_jax.policies.mlp import MLP as MLP
from puffer_jax.policies.procgen import ConvSequence as ConvSequence
from puffer_jax.policies.procgen import ProcgenResnet as ProcgenResnet
from puffer_jax.policies.procgen import ResidualBlock as ResidualBlock
from puffer_jax.policies.protocol import Logits as Logits
from puffer_jax.policies.protocol import State as State
from puffer_jax.policies.recurrent import LSTMWrapper as LSTMWrapper
