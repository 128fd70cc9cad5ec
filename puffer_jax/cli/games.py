"""One environment to play, by its name."""

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray, PyTree

from puffer_jax.cli.envs import info_mask, make_jax_env, naming_the_flag
from puffer_jax.environments import registry
from puffer_jax.environments.families import Arguments
from puffer_jax.environments.families.gymnasium import errors
from puffer_jax.environments.jax_native import AdaptedEnv
from puffer_jax.run.evaluation import Game


class _NativeGame:
    """A JAX-native environment as a `Game`."""

    fps = 4.0

    def __init__(self, name: str, env: AdaptedEnv, render: str | None, seed: int):
        self._draw = getattr(env.unwrapped, "render", None)
        if render == "gif" or (render and self._draw is None):
            raise ValueError(
                f"--env {name} cannot be drawn as {render}"
                + ("; --render ansi" if self._draw is not None else "")
            )
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._key, self._state = jax.random.key(seed), None

        def reset(key: PRNGKeyArray) -> tuple[PyTree, ...]:
            key, reset_key = jax.random.split(key)
            return key, *env.reset(reset_key)

        def step(key: PRNGKeyArray, state: PyTree, action: ArrayLike) -> tuple[PyTree, ...]:
            key, step_key = jax.random.split(key)
            obs, state, reward, terminated, truncated, _ = env.step(step_key, state, action)
            return key, obs, state, reward, terminated | truncated

        self._reset, self._step = jax.jit(reset), jax.jit(step)

    def reset(self) -> PyTree:
        self._key, obs, self._state = self._reset(self._key)
        return obs

    def step(self, action: np.ndarray) -> tuple[PyTree, float, bool]:
        self._key, obs, self._state, reward, done = self._step(self._key, self._state, action)
        return obs, float(reward), bool(done)

    def render(self) -> object:
        assert self._draw is not None
        return self._draw(self._state)

    def close(self) -> None:
        pass


class _HostGame:
    """An environment on the host as a `Game`."""

    def __init__(
        self, name: str, arguments: Arguments, render: str | None, seed: int, mask: str | None
    ):
        self._name, self._seed = name, seed
        mode = {"gif": "rgb_array"}.get(render or "", render)
        with naming_the_flag():
            self._env = registry.create(name, **arguments)
            modes = self._env.metadata.get("render_modes", ())
            if mode is not None and mode not in modes:
                raise ValueError(f"{name} cannot be drawn as {mode}; it has: {', '.join(modes)}")
            if mode is not None:
                self._env.close()
                self._env = registry.create(name, render_mode=mode, **arguments)
        if mask is not None:
            from puffer_jax.environments.wrappers import with_mask

            self._env = with_mask(self._env, mask)
        self.observation_space = self._env.observation_space
        self.action_space = self._env.action_space
        self.fps = float(self._env.metadata.get("render_fps") or 30)

    def reset(self) -> PyTree:
        with naming_the_flag(), errors(self._name):
            obs, _ = self._env.reset(seed=self._seed)
        # Only the first episode is seeded; later ones continue from there.
        self._seed = None
        return obs

    def step(self, action: np.ndarray) -> tuple[PyTree, float, bool]:
        play = int(action) if action.ndim == 0 else action
        obs, reward, terminated, truncated, _ = self._env.step(play)
        return obs, float(reward), bool(terminated or truncated)

    def render(self) -> object:
        with naming_the_flag(), errors(self._name):
            return self._env.render()

    def close(self) -> None:
        self._env.close()


def make_game(
    name: str,
    arguments: Arguments,
    render: str | None,
    seed: int,
    action_mask: str | None = None,
) -> Game:
    """One environment to play, by its name.

    Args:
        name: the environment's name.
        arguments: the arguments of its constructor.
        render: "ansi", "gif" or None.
        seed: the seed of its first reset.
        action_mask: see `PolicyOptions`.

    Raises:
        ValueError: it cannot be made or drawn that way, or has several agents.
    """
    env = make_jax_env(name, arguments)
    if env is not None and env.num_agents is None:
        return _NativeGame(name, env, render, seed)
    if env is not None or registry.find(name)[0].multi_agent:
        raise ValueError(f"--env {name} has several agents; only single-agent games can be played")
    return _HostGame(name, arguments, render, seed, info_mask(action_mask))
