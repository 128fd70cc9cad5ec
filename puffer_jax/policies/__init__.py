"""PufferLib's policies as Flax NNX modules: same names, same numbers, same checkpoints.

Every policy turns observations into a hidden vector (`encode_observations`) and that into
logits and a value (`decode_actions`); `Recurrent` puts a recurrent core between the two,
`LSTMWrapper` PufferLib's LSTM. Parameters carry torch's names along attribute paths, so the weight
exchange needs no tables.

Matmuls and convolutions run in `dtype` (None: that of the parameters); logits, values and
states always come out in `param_dtype`.
"""

from puffer_jax.policies.convolutional import Convolutional as Convolutional
from puffer_jax.policies.default import Default as Default
from puffer_jax.policies.mlp import MLP as MLP
from puffer_jax.policies.procgen import ConvSequence as ConvSequence
from puffer_jax.policies.procgen import ProcgenResnet as ProcgenResnet
from puffer_jax.policies.procgen import ResidualBlock as ResidualBlock
from puffer_jax.policies.protocol import Logits as Logits
from puffer_jax.policies.protocol import Policy as Policy
from puffer_jax.policies.protocol import RecurrentPolicy as RecurrentPolicy
from puffer_jax.policies.protocol import State as State
from puffer_jax.policies.protocol import is_recurrent as is_recurrent
from puffer_jax.policies.recurrent import LSTMWrapper as LSTMWrapper
from puffer_jax.policies.recurrent import Recurrent as Recurrent
from puffer_jax.policies.registry import POLICIES as POLICIES
