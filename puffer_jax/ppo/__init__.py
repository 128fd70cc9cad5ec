"""PufferLib's PPO update as pure functions of arrays.

Arrays are (segments, time). As in the reference, `rewards[:, t]` and `terminals[:, t]` are what
came *with* observation t: the outcome of action t - 1. Schulman et al. 2017 (PPO) with the
advantage of `puff_advantage` and segments drawn by priority.
"""

from puffer_jax.policies.protocol import is_recurrent as is_recurrent
from puffer_jax.ppo.advantage import advantage_of as advantage_of
from puffer_jax.ppo.advantage import priorities as priorities
from puffer_jax.ppo.advantage import puff_advantage as puff_advantage
from puffer_jax.ppo.experience import Details as Details
from puffer_jax.ppo.experience import Experience as Experience
from puffer_jax.ppo.experience import Hypers as Hypers
from puffer_jax.ppo.experience import Last as Last
from puffer_jax.ppo.experience import Params as Params
from puffer_jax.ppo.experience import TrainState as TrainState
from puffer_jax.ppo.objective import evaluate_segments as evaluate_segments
from puffer_jax.ppo.objective import loss as loss
from puffer_jax.ppo.update import Learner as Learner
from puffer_jax.ppo.update import make_learner as make_learner
