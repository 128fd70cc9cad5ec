"""What gymnasium's own wrappers lack."""

from typing import Any

import gymnasium
import numpy as np

from puffer_jax.base.spaces import kind_of


class ActionMask(gymnasium.Wrapper):
    """Moves the mask of legal actions from the info into the observation.

    Observations become {"observation": ..., key: ...}; a Dict gets the key besides its own. What
    ends an episode may have no mask: all actions are legal then.

    Args:
        env: an environment with Discrete or MultiDiscrete actions. The mask is an array, or, of
            MultiDiscrete actions, a tuple of arrays.
        key: the key of the info, and then of the observation.

    Raises:
        ValueError: the actions are others, or the observations have such a key already.

    Example:
        >>> import puffer_jax
        >>> from gymnasium.envs.toy_text.taxi import TaxiEnv
        >>> env = puffer_jax.environments.ActionMask(TaxiEnv())
        >>> observation, info = env.reset(seed=0)
        >>> observation["action_mask"].shape
        (6,)
    """

    def __init__(self, env: gymnasium.Env[Any, Any], key: str = "action_mask"):
        super().__init__(env)
        kind = kind_of(env.action_space)
        if kind not in ("discrete", "multidiscrete"):
            raise ValueError(
                f"ActionMask needs Discrete or MultiDiscrete actions; got {env.action_space}"
            )
        space, action = env.observation_space, env.action_space
        parts = {"observation": space}
        if isinstance(space, gymnasium.spaces.Dict):
            parts = dict(space.spaces)
        if key in parts:
            raise ValueError(f"ActionMask: the observations have the key {key!r} already")
        self._key, self._is_dict = key, isinstance(space, gymnasium.spaces.Dict)
        self._size = int(np.sum(action.n if kind == "discrete" else action.nvec))  # type: ignore[reportAttributeAccessIssue]
        mask = gymnasium.spaces.Box(0, 1, (self._size,), np.int8)
        self.observation_space = gymnasium.spaces.Dict({**parts, key: mask})

    def reset(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode.

        Raises:
            ValueError: the info has no mask, or one of another size.
        """
        observation, info = self.env.reset(**kwargs)
        return self._with_mask(observation, info, False), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act; raises what `reset` does."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        over = bool(terminated or truncated)
        observation = self._with_mask(observation, info, over)
        return observation, reward, terminated, truncated, info

    def _with_mask(self, observation: Any, info: dict[str, Any], over: bool) -> dict[str, Any]:
        mask = info.get(self._key)
        if mask is None and over:
            mask = np.ones(self._size, np.int8)
        if mask is None:
            raise ValueError(
                f"{self.env}: no mask {self._key!r} in the info, which has: {', '.join(info)}"
            )
        parts = mask if isinstance(mask, tuple | list) else (mask,)
        flat = np.concatenate([np.ravel(part) for part in parts])
        if flat.shape != (self._size,) or flat.dtype.kind not in "biu":
            raise ValueError(
                f"{self.env}: the mask {self._key!r} must be of bool or integers and have "
                f"{self._size} of them, for {self.action_space}; got {flat.dtype} {flat.shape}"
            )
        parts = observation if self._is_dict else {"observation": observation}
        return {**parts, self._key: (flat != 0).astype(np.int8)}


def with_mask(env: gymnasium.Env[Any, Any], key: str | None) -> gymnasium.Env[Any, Any]:
    """The environment with the mask `key` in its observations, taken from the info if need be."""
    if key is None or key in getattr(env.observation_space, "spaces", ()):
        return env
    return ActionMask(env, key)


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
