"""What a policy needs to know of an environment's spaces."""

from puffer_jax.base.spaces import Action as Action
from puffer_jax.base.spaces import Box as Box
from puffer_jax.base.spaces import Continuous as Continuous
from puffer_jax.base.spaces import Dict as Dict
from puffer_jax.base.spaces import Discrete as Discrete
from puffer_jax.base.spaces import EnvSpec as EnvSpec
from puffer_jax.base.spaces import Kind as Kind
from puffer_jax.base.spaces import MultiDiscrete as MultiDiscrete
from puffer_jax.base.spaces import Observation as Observation
from puffer_jax.base.spaces import children_of as children_of
from puffer_jax.base.spaces import emulated_dtypes as emulated_dtypes
from puffer_jax.base.spaces import env_spec as env_spec
from puffer_jax.base.spaces import kind_of as kind_of
from puffer_jax.base.spaces import leaf_shapes as leaf_shapes
from puffer_jax.base.spaces import structured_dtype as structured_dtype
