"""Atari games of ALE, with the usual preprocessing."""

from collections.abc import Iterable

from puffer_jax.base.spaces import Env
from puffer_jax.environments.families import Arguments, Family, gymnasium

_OPTIONS = ("framestack", "noop_max", "terminal_on_life_loss", "clip_rewards")


def atari(
    name: str,
    framestack: int = 4,
    frameskip: int = 4,
    noop_max: int = 30,
    terminal_on_life_loss: bool = False,
    clip_rewards: bool = False,
    **kwargs: object,
) -> Env:
    """An Atari game, preprocessed by gymnasium's wrappers.

    Observations are (framestack, 84, 84) uint8. The info of an episode's last step has its
    `episode_return`, unclipped, and its `episode_length`; all other infos are empty.

    Args:
        name: such as "ALE/Breakout-v5".
        framestack: number of grey images in an observation, those of the last steps.
        frameskip: frames that an action lasts; the last two are merged.
        noop_max: an episode begins with at least 1 and at most this many frames without action.
        terminal_on_life_loss: whether losing a life ends the episode.
        clip_rewards: whether only the sign of a reward counts.
        kwargs: arguments of ALE's own environment: repeat_action_probability (0.25 by default),
            full_action_space, render_mode, ...

    Raises:
        ImportError: ale-py or OpenCV is not installed.
        TypeError: there is an argument that neither this function nor ALE's environment takes.
        ValueError: there is no such game; the message names the nearest.
    """
    env = gymnasium.create(name, name, kwargs | {"frameskip": 1}, _OPTIONS)
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TransformReward

    from puffer_jax.environments.wrappers import EpisodeStats, sign

    with gymnasium.errors(name):
        env = AtariPreprocessing(
            env, noop_max, frameskip, terminal_on_life_loss=terminal_on_life_loss
        )
    env = EpisodeStats(env)
    if clip_rewards:
        env = TransformReward(env, sign)
    return FrameStackObservation(env, framestack)


def _create(name: str, known: str, arguments: Arguments) -> Env:
    return atari(known, **arguments)


def _names() -> Iterable[str]:
    return [name for name in gymnasium.FAMILY.names() if name.startswith("ALE/")]


FAMILY = Family(
    name="atari",
    create=_create,
    names=_names,
    prefixes=("ALE/",),
    package="ale_py",
    install="'puffer_jax[atari]'",
)
