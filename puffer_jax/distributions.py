"""Action distributions: sampling, log-probability and entropy of a policy's logits."""

from puffer_jax.nn.distributions import Logits as Logits
from puffer_jax.nn.distributions import Normal as Normal
from puffer_jax.nn.distributions import TanhNormal as TanhNormal
from puffer_jax.nn.distributions import entropy as entropy
from puffer_jax.nn.distributions import entropy_probs as entropy_probs
from puffer_jax.nn.distributions import log_prob as log_prob
from puffer_jax.nn.distributions import mask_logits as mask_logits
from puffer_jax.nn.sampling import sample_logits as sample_logits
