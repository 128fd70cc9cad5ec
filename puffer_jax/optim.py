"""The optimizers of PufferLib's trainer."""

from puffer_jax.ppo.optimizers import OPTIMIZERS as OPTIMIZERS
from puffer_jax.ppo.optimizers import MuonState as MuonState
from puffer_jax.ppo.optimizers import adam as adam
from puffer_jax.ppo.optimizers import clip_by_global_norm as clip_by_global_norm
from puffer_jax.ppo.optimizers import cosine_schedule as cosine_schedule
from puffer_jax.ppo.optimizers import make as make
from puffer_jax.ppo.optimizers import make_step as make_step
from puffer_jax.ppo.optimizers import muon as muon
from puffer_jax.ppo.optimizers import muon_v4 as muon_v4
