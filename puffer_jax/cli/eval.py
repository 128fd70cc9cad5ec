"""`puffer-jax eval`."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from flax import nnx

from puffer_jax.base.files import write_atomically
from puffer_jax.base.packages import require
from puffer_jax.cli.envs import make_policy
from puffer_jax.cli.games import make_game
from puffer_jax.cli.model import find_model
from puffer_jax.cli.train import SETTINGS, Train, parse_arguments
from puffer_jax.policies.masks import mask_of
from puffer_jax.run.evaluation import Game, play
from puffer_jax.weights.files import load_weights, policy_from_checkpoint


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
    action_mask: str | None = None
    """As in `puffer-jax train --policy.action-mask`; by default, the run's."""
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
        path, settings = find_model(self.model)
        env = self.env or (settings and settings.env)
        if env is None:
            raise ValueError(f"give --env; {path} has no {SETTINGS} beside it")
        inherited = settings.env_arg if settings is not None and self.env is None else ()
        frames: list[Any] = []
        image = require("PIL.Image", "a GIF", "pillow") if self.render == "gif" else None
        arguments = parse_arguments((*inherited, *self.env_arg))
        mask = self.action_mask or (settings and settings.policy.action_mask)
        game = make_game(env, arguments, self.render, self.seed, mask)
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
            mask = mask_of(game, self.action_mask)
            options: dict[str, Any] = {"channels_last": self.channels_last, "action_mask": mask}
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


def _print_text(text: object, fps: float) -> None:
    if sys.stdout.isatty():
        print(f"\033[H\033[J{text}", flush=True)
        time.sleep(1 / fps)
    else:
        print(f"{text}\n")
