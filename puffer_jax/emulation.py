"""Any environment behind flat arrays."""

from puffer_jax.environments.emulation.buffers import Buffers as Buffers
from puffer_jax.environments.emulation.buffers import set_buffers as set_buffers
from puffer_jax.environments.emulation.spaces import emulate_action_space as emulate_action_space
from puffer_jax.environments.emulation.spaces import (
    emulate_observation_space as emulate_observation_space,
)
from puffer_jax.environments.emulation.spaces import joint_space as joint_space
from puffer_jax.environments.emulation.wrappers import GymnasiumPufferEnv as GymnasiumPufferEnv
from puffer_jax.environments.emulation.wrappers import PettingZooPufferEnv as PettingZooPufferEnv
