"""Any environment behind flat arrays, so that vecenvs and policies see one kind of environment.

It does what `pufferlib.emulation` does, with its names, layouts and protocol, so that environments
of either work in the vecenvs of both. A nested observation becomes a row of numbers, which
`puffer_jax.nativize` reads; a nested action is made from a MultiDiscrete. The way from one to the
other is worked out once, when the environment is made. After an episode's end, the caller must call
`reset`: a vecenv does so in the next step.

Every observation must have the shape and the dtype of its space; otherwise, NumPy would broadcast
and cast it silently. Bounds are checked for each agent's first observation only, and likewise for
actions.

Neither JAX nor torch is imported here: workers run this.
"""

from puffer_jax.environments.emulation.buffers import Buffers as Buffers
from puffer_jax.environments.emulation.buffers import set_buffers as set_buffers
from puffer_jax.environments.emulation.spaces import emulate_action_space as emulate_action_space
from puffer_jax.environments.emulation.spaces import (
    emulate_observation_space as emulate_observation_space,
)
from puffer_jax.environments.emulation.spaces import joint_space as joint_space
from puffer_jax.environments.emulation.wrappers import GymnasiumPufferEnv as GymnasiumPufferEnv
from puffer_jax.environments.emulation.wrappers import PettingZooPufferEnv as PettingZooPufferEnv
