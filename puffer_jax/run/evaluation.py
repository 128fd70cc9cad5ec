"""Whole episodes of one environment, by themselves and in the course of a training."""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from puffer_jax.base.actions import playable
from puffer_jax.base.spaces import Space
from puffer_jax.nn.params import GraphDef, merge, split
from puffer_jax.nn.sampling import sample_logits
from puffer_jax.policies.protocol import is_recurrent
from puffer_jax.ppo.experience import Params, RecurrentState
from puffer_jax.run.trainer import PuffeRL
from puffer_jax.weights.files import save_weights


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


@functools.cache
def _act(graphdef: GraphDef, recurrent: bool, deterministic: bool) -> Callable[..., Any]:
    """One step of a policy: (params, observations, state, key) -> (action, state, key)."""

    @jax.jit
    def act(
        params: Params, obs: PyTree, state: RecurrentState | None, key: PRNGKeyArray
    ) -> tuple[Array, RecurrentState | None, PRNGKeyArray]:
        key, sample_key = jax.random.split(key)
        outputs = merge(graphdef, params).forward_eval(obs, state)
        way: dict[str, Any] = {"deterministic": True} if deterministic else {"key": sample_key}
        action = sample_logits(outputs[0], **way)[0]
        return action[0], outputs[2] if recurrent else None, key

    return act


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
    act = _act(graphdef, recurrent, deterministic)
    key = jax.random.key(seed)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    for episode in range(episodes):
        obs, done = game.reset(), False
        state = policy.initial_state(1) if recurrent else None
        show(episode)
        while not done:
            batch = jax.tree.map(lambda x: np.asarray(x)[None], obs)
            action, state, key = act(params, batch, state, key)
            obs, reward, done = game.step(playable(action, game))
            returns[episode] += reward
            lengths[episode] += 1
            show(episode)
    return returns, lengths


class Evaluation:
    """Plays with the trained policy from time to time, and keeps the best model.

    To be called after each epoch, see `PuffeRL.run`. The best model is `best` with the suffix of
    the checkpoints, in the run's folder.

    Args:
        game: an environment of its own; `close` closes it.
        every: agent steps from one evaluation to the next; the last one is at the end.
        episodes: episodes of each.
        deterministic: whether the most likely actions are taken, not sampled ones.
        report: what is done with a line of text about each evaluation.

    Attributes:
        best: the highest mean return so far.
    """

    def __init__(
        self,
        game: Game,
        every: int,
        episodes: int,
        deterministic: bool = False,
        report: Callable[[str], object] = print,
    ):
        self._game, self._every, self._episodes = game, every, episodes
        self._deterministic, self._report = deterministic, report
        self._next: int | None = None
        self.best = -math.inf

    def __call__(self, trainer: PuffeRL) -> None:
        """Evaluate if it is time to."""
        step = trainer.global_step
        if self._next is None:  # after a resume it need not begin at once
            self._next = step // self._every * self._every + self._every
        if step < self._next and not trainer.done:
            return
        self._next = step // self._every * self._every + self._every
        policy = trainer.policy
        returns, lengths = play(
            policy, self._game, self._episodes, seed=step, deterministic=self._deterministic
        )
        mean = float(returns.mean())
        numbers = {"episode_return": mean, "episode_length": float(lengths.mean())}
        trainer.logger.log({f"eval/{name}": value for name, value in numbers.items()}, step)
        is_best = mean > self.best
        if is_best:
            self.best = mean
            self._save(trainer)
        how = "most likely" if self._deterministic else "sampled"
        self._report(
            f"step {step:,}: return {mean:.2f} +- {returns.std():.2f}, {self._episodes} episodes, "
            f"{how} actions{', the best so far' if is_best else ''}"
        )

    def _save(self, trainer: PuffeRL) -> None:
        trainer.run_folder.mkdir(parents=True, exist_ok=True)
        path = trainer.run_folder / "best.pt"
        try:
            save_weights(trainer.policy, path)
        except ImportError:  # no torch
            save_weights(trainer.policy, path.with_suffix(".safetensors"))

    def close(self) -> None:
        """Close the environment."""
        self._game.close()
