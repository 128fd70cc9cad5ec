"""PufferLib 4's policies: an encoder, a network with or without memory, a decoder.

Their parameters have the names and initial distributions of its Python policies, those of its
fallback trainer.
"""

from puffer_jax.policies.v4.decoder import DefaultDecoder as DefaultDecoder
from puffer_jax.policies.v4.decoder import NativeDecoder as NativeDecoder
from puffer_jax.policies.v4.encoders import DefaultEncoder as DefaultEncoder
from puffer_jax.policies.v4.encoders import ImpalaEncoder as ImpalaEncoder
from puffer_jax.policies.v4.encoders import NatureEncoder as NatureEncoder
from puffer_jax.policies.v4.native import NativeEncoder as NativeEncoder
from puffer_jax.policies.v4.networks import GRU as GRU
from puffer_jax.policies.v4.networks import LSTM as LSTM
from puffer_jax.policies.v4.networks import MLP as MLP
from puffer_jax.policies.v4.networks import MinGRU as MinGRU
from puffer_jax.policies.v4.policy import Policy as Policy
