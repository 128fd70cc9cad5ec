"""PufferLib 4's policies (encoder, network, decoder), and its `.ini` files."""

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
from puffer_jax.ppo.v4_ini import V4Ini as V4Ini
from puffer_jax.ppo.v4_ini import load_ini as load_ini
