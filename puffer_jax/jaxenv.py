"""JAX-native environments: the protocol, adapters to it, and resets."""

from puffer_jax.base.spaces import Box as Box
from puffer_jax.base.spaces import Dict as Dict
from puffer_jax.environments.jax_native import AdaptedEnv as AdaptedEnv
from puffer_jax.environments.jax_native import JaxEnv as JaxEnv
from puffer_jax.environments.jax_native import Step as Step
from puffer_jax.environments.jax_native import TimeLimited as TimeLimited
from puffer_jax.environments.jax_native import as_jax_env as as_jax_env
from puffer_jax.environments.jax_native import autoreset as autoreset
