"""What gymnasium's own wrappers lack."""

from typing import Any

import gymnasium
import numpy as np


class EpisodeStats(gymnasium.Wrapper):
    """Reports the return and the length of an episode with its last step, and nothing before.

    Infos are collected for every agent, and travel between processes: those that come with each
    step (a game's lives and frame numbers) cost more than they are worth.
    """

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        self._return, self._length = 0.0, 0
        return self.env.reset(**kwargs)[0], {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act."""
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self._return += float(reward)
        self._length += 1
        stats = {"episode_return": self._return, "episode_length": self._length}
        return obs, reward, terminated, truncated, stats if terminated or truncated else {}


def sign(reward: Any) -> float:
    """-1, 0 or 1."""
    return float(np.sign(reward))
