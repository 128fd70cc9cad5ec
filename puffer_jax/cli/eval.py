"""`puffer-jax eval`."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
import tyro
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray, PyTree

from puffer_jax.base import spaces
from puffer_jax.base.files import write_atomically
from puffer_jax.base.packages import require
from puffer_jax.base.spaces import Space
from puffer_jax.cli.envs import make_jax_env, make_policy, naming_the_flag
from puffer_jax.cli.train import SETTINGS, Train, parse_arguments, read_settings
from puffer_jax.environments import registry
from puffer_jax.environments.families import Arguments
from puffer_jax.environments.families.gymnasium import errors
from puffer_jax.environments.jax_native import AdaptedEnv
from puffer_jax.nn.params import merge, split
from puffer_jax.nn.sampling import sample_logits
from puffer_jax.policies.protocol import is_recurrent
from puffer_jax.ppo.experience import Params, RecurrentState
from puffer_jax.run import checkpoint
from puffer_jax.weights.files import load_weights, policy_from_checkpoint


@runtime_checkable
class Game(Protocol):
    """One environment to play; it also serves as the `env` of a policy.

    Attributes:
        observation_space: space of the observations.
        action_space: space of the actions.
        fps: frames per second.
    """

    observation_space: Space
    action_space: Space
    fps: float

    def reset(self) -> PyTree:
        """Begin an episode; returns its first observation."""
        ...

    def step(self, action: np.ndarray) -> tuple[PyTree, float, bool]:
        """Act; returns the observation, the reward and whether the episode is over."""
        ...

    def render(self) -> object:
        """Draw; returns text or an image."""
        ...

    def close(self) -> None:
        """Close the environment."""
        ...


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Play a checkpoint of PufferLib or puffer_jax, one whole episode after another."""

    model: tyro.conf.Positional[Path]
    """.pt, .safetensors or .bin; or the folder of a run, for its latest checkpoint."""
    env: str | None = None
    """As in `puffer-jax train`; by default, the run's."""
    env_arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE for the environment's constructor; may be given several times."""
    episodes: int = 10
    """Number of episodes."""
    deterministic: bool = False
    """Take the most likely action instead of a sampled one."""
    seed: int = 0
    """Seed of the environment and of the actions."""
    render: Literal["ansi", "gif"] | None = None
    """ansi: print every episode as text. gif: write the first episode."""
    out: Path = Path("eval.gif")
    """The GIF to write."""
    fps: float | None = None
    """Frames per second; None: the environment's own, or 30."""
    channels_last: bool = False
    """A Convolutional policy's images are height, width, channels."""
    downsample: int = 1
    """A Convolutional policy sees every n-th pixel."""

    def run(self) -> int:
        """Play, print, and return the exit code."""
        if self.episodes < 1 or (self.fps is not None and self.fps <= 0):
            raise ValueError(f"episodes is {self.episodes}, fps {self.fps}; must be positive")
        path, settings = _find_model(self.model)
        env = self.env or (settings and settings.env)
        if env is None:
            raise ValueError(f"give --env; {path} has no {SETTINGS} beside it")
        inherited = settings.env_arg if settings is not None and self.env is None else ()
        frames: list[Any] = []
        image = require("PIL.Image", "a GIF", "pillow") if self.render == "gif" else None
        game = make_game(env, parse_arguments((*inherited, *self.env_arg)), self.render, self.seed)
        try:
            policy = self._load(path, game, settings)
            fps = self.fps or game.fps

            def show(episode: int) -> None:
                if image is not None and episode == 0:
                    frame = image.fromarray(np.asarray(game.render(), np.uint8))
                    # With 256 colours a frame takes a third of the memory.
                    frames.append(frame.quantize(method=image.Quantize.FASTOCTREE))
                elif image is not None and episode == 1 and frames:
                    self._write_gif(frames, fps)
                elif self.render == "ansi":
                    _print_text(game.render(), fps)

            returns, lengths = play(
                policy, game, self.episodes, self.seed, self.deterministic, show
            )
        finally:
            game.close()
        if frames:
            self._write_gif(frames, fps)
        print(f"{env}, {path}, episodes: {self.episodes}")
        print(f"{'':8}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}")
        for name, x in (("return", returns), ("length", lengths)):
            print(f"{name:8}{x.mean():12.2f}{x.std():12.2f}{x.min():12.2f}{x.max():12.2f}")
        return 0

    def _load(self, path: Path, game: Game, settings: Train | None) -> nnx.Module:
        if settings is None:
            options: dict[str, Any] = {"channels_last": self.channels_last}
            return policy_from_checkpoint(path, game, downsample=self.downsample, **options)
        policy = make_policy(game, settings.policy, settings.rnn, settings.train.precision)
        load_weights(policy, path)
        return policy

    def _write_gif(self, frames: list[Any], fps: float) -> None:
        first, *rest = frames
        options: dict[str, Any] = {"duration": round(1000 / fps), "loop": 0}
        write_atomically(
            self.out,
            lambda file: first.save(file, "GIF", save_all=True, append_images=rest, **options),
        )
        frames.clear()
        print(f"the first episode: {self.out}")


def _find_model(path: Path) -> tuple[Path, Train | None]:
    """The weights, and the options of the run they belong to, if there is one."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        epoch = checkpoint.latest(path)
        found = [] if epoch is None else list(path.glob(f"model_{epoch:06d}.*"))
        if not found:
            raise FileNotFoundError(f"no complete checkpoint in the folder {path}")
        path = found[0]
    return path, read_settings(folder) if (folder / SETTINGS).exists() else None


def play(
    policy: Any,
    game: Game,
    episodes: int,
    seed: int = 0,
    deterministic: bool = False,
    show: Callable[[int], None] = lambda episode: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Play whole episodes, one after another, so that short ones count no more than long ones.

    Args:
        policy: if recurrent, it starts each episode from the zero state.
        game: the environment.
        episodes: number of episodes.
        seed: seed of the actions.
        deterministic: whether to take the most likely action.
        show: called with the number of the episode, at its start and after each step.

    Returns:
        Returns and lengths, (episodes,), float64 and int64.
    """
    graphdef, params = split(policy)
    recurrent = is_recurrent(policy)

    @jax.jit
    def act(
        params: Params, obs: PyTree, state: RecurrentState | None, key: PRNGKeyArray
    ) -> tuple[Array, RecurrentState | None, PRNGKeyArray]:
        key, sample_key = jax.random.split(key)
        outputs = merge(graphdef, params).forward_eval(obs, state)
        way: dict[str, Any] = {"deterministic": True} if deterministic else {"key": sample_key}
        action = sample_logits(outputs[0], **way)[0]
        return action[0], outputs[2] if recurrent else None, key

    key = jax.random.key(seed)
    space = game.action_space
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    for episode in range(episodes):
        obs, done = game.reset(), False
        state = policy.initial_state(1) if recurrent else None
        show(episode)
        while not done:
            batch = jax.tree.map(lambda x: np.asarray(x)[None], obs)
            action, state, key = act(params, batch, state, key)
            action = np.asarray(action)
            if spaces.kind_of(space) == "box":
                action = np.clip(action, space.low, space.high).astype(space.dtype)
            obs, reward, done = game.step(action)
            returns[episode] += reward
            lengths[episode] += 1
            show(episode)
    return returns, lengths


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

    def __init__(self, name: str, arguments: Arguments, render: str | None, seed: int):
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


def make_game(name: str, arguments: Arguments, render: str | None, seed: int) -> Game:
    """One environment to play, by its name.

    Args:
        name: the environment's name.
        arguments: the arguments of its constructor.
        render: "ansi", "gif" or None.
        seed: the seed of its first reset.

    Raises:
        ValueError: it cannot be made or drawn that way, or has several agents.
    """
    env = make_jax_env(name, arguments)
    if env is not None:
        return _NativeGame(name, env, render, seed)
    if registry.find(name)[0].multi_agent:
        raise ValueError(f"--env {name} has several agents; only single-agent games can be played")
    return _HostGame(name, arguments, render, seed)


def _print_text(text: object, fps: float) -> None:
    if sys.stdout.isatty():
        print(f"\033[H\033[J{text}", flush=True)
        time.sleep(1 / fps)
    else:
        print(f"{text}\n")
