"""Environments so cheap that the overhead around them shows. Does not import JAX."""

import time

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

_IMAGE = Box(0, 255, (84, 84, 4), np.uint8)
_STRUCTURED = Dict(
    {
        "seen": Dict({"image": Box(0, 255, (16, 16, 3), np.uint8), "health": Box(0, 1, (1,))}),
        "held": Tuple((Discrete(5), MultiDiscrete([3, 4]), MultiBinary(6))),
        "place": Box(-1, 1, (2, 2), np.float64),
    }
)
_SPACES: dict[str, tuple[gymnasium.Space, gymnasium.Space]] = {
    "box": (Box(-1, 1, (4,)), Discrete(2)),
    "structured": (
        _STRUCTURED,
        Dict({"go": Discrete(3), "use": Tuple((Discrete(2), Discrete(4)))}),
    ),
    "image": (_IMAGE, Discrete(6)),
    "slow": (Box(-1, 1, (4,)), Discrete(2)),
}


class Cycle(gymnasium.Env):
    """Shows a few samples of its observation space over and over; never ends."""

    def __init__(self, kind: str):
        self.observation_space, self.action_space = _SPACES[kind]
        self.observation_space.seed(0)
        self.samples = [self.observation_space.sample() for _ in range(16)]
        self.pause, self.steps = 1e-3 if kind == "slow" else 0.0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[object, dict]:
        """The first sample."""
        return self.samples[0], {}

    def step(self, action: object) -> tuple[object, float, bool, bool, dict]:
        """The next sample."""
        if self.pause:
            time.sleep(self.pause)
        self.steps += 1
        return self.samples[self.steps % 16], 1.0, False, False, {}


def make(kind: str) -> gymnasium.Env:
    """A `Cycle` of a kind, or gymnasium's CartPole."""
    return gymnasium.make("CartPole-v1") if kind == "cartpole" else Cycle(kind)
