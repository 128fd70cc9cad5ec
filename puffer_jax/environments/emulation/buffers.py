"""The arrays that agents read and write."""

from collections.abc import Mapping

import numpy as np

from puffer_jax.base.spaces import Env, kind_of

Buffers = Mapping[str, np.ndarray]


def set_buffers(env: Env, buf: Buffers | None = None) -> None:
    """Give `env` the arrays that it and its vecenv share (`pufferlib.set_buffers`).

    Args:
        env: has `single_observation_space`, `single_action_space`, `num_agents`; gets
            `observations` (agents, *shape), `rewards` float32, `terminals`, `truncations`, `masks`
            bool (agents,), `actions` and `teacher_actions` (agents, *shape), int32 unless a Box.
        buf: these by name, "teacher_actions" optional; None: new ones, zeros, all masks True.
    """
    agents, space = env.num_agents, env.single_action_space
    if buf is None:
        observation = env.single_observation_space
        dtype = space.dtype if kind_of(space) == "box" else np.int32
        buf = {
            "observations": np.zeros((agents, *observation.shape), observation.dtype),
            "rewards": np.zeros(agents, np.float32),
            "terminals": np.zeros(agents, bool),
            "truncations": np.zeros(agents, bool),
            "masks": np.ones(agents, bool),
            "actions": np.zeros((agents, *space.shape), dtype),
        }
    for name in ("observations", "rewards", "terminals", "truncations", "masks", "actions"):
        setattr(env, name, buf[name])
    teacher = buf.get("teacher_actions")
    env.teacher_actions = np.zeros_like(env.actions) if teacher is None else teacher
