"""RLlib's episodes as the experience that our update learns from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from ray.rllib.core.columns import Columns

from puffer_jax.ppo.experience import Experience, Last

Episode = Any
"""A `SingleAgentEpisode`, whole or a part of one, as an env runner returns it."""


class Ends(NamedTuple):
    """What episodes ended with.

    Attributes:
        observations: the last observation of each, (episodes, *obs), a tree of arrays.
        state: the state before it, (episodes, ...) by name; {} without memory.
    """

    observations: PyTree
    state: dict[str, np.ndarray]


def ends_of(episodes: Sequence[Episode], zeros: dict[str, np.ndarray]) -> Ends:
    """What is needed for the values of the episodes' last observations."""
    observations = _stacked([episode.get_observations(-1) for episode in episodes])
    states = [_states(episode, zeros) for episode in episodes]
    return Ends(observations, {name: np.stack([s[name][-1] for s in states]) for name in zeros})


def experience_of(
    episodes: Sequence[Episode],
    final_values: np.ndarray,
    *,
    horizon: int,
    unit: int,
    start: np.ndarray,
    zeros: dict[str, np.ndarray],
) -> Experience:
    """Episodes one after another, cut into rows of `horizon` steps.

    Each is followed by one step that was not played, its last observation, so that the value and
    the reward of what its last action led to are where the advantage looks for them. An episode
    that goes on from an earlier batch begins a row if the policy has a state, which is its row's;
    what rows lack at the end was not played either.

    Args:
        episodes: with "action_logp" and "vf_preds" of each step and, of a policy with a state,
            "state_out".
        final_values: the values of their last observations, (episodes,).
        horizon: steps in a row.
        unit: the rows are a multiple of it.
        start: what the environment's actions begin with.
        zeros: the state before an episode, by name, without a batch axis; {} without memory.

    Raises:
        ValueError: the steps lack what the policy's module adds to them.
    """
    parts, length = [], 0
    for episode, value in zip(episodes, final_values, strict=True):
        if zeros and episode.t_started > 0 and length % horizon:
            missing = horizon - length % horizon
            parts.append(_unplayed(parts[-1], missing))
            length += missing
        parts.append(_entries(episode, float(value), start, zeros))
        length += len(episode) + 1
    if missing := -length % (horizon * unit):
        parts.append(_unplayed(parts[-1], missing))
    rows = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    rows = jax.tree.map(lambda x: x.reshape(-1, horizon, *x.shape[1:]), rows)
    following = {
        name: np.append(rows[name][1:, 0], np.zeros(1, rows[name].dtype))
        for name in ("rewards", "terminals", "values")
    }
    last = Last(**following, final_values=None)  # type: ignore[arg-type]
    state = {name: x[:, 0] for name, x in rows.pop("state").items()}
    return Experience(**rows, state=state or None, last=last)


def _entries(
    episode: Episode, value: float, start: np.ndarray, zeros: dict[str, np.ndarray]
) -> dict[str, PyTree]:
    """The steps of one episode and its last observation, (steps + 1, ...)."""
    extra, steps = episode.extra_model_outputs, len(episode)
    lacking = [name for name in (Columns.ACTION_LOGP, Columns.VF_PREDS) if name not in extra]
    if lacking:
        raise ValueError(
            f"the episodes lack {', '.join(lacking)}: they must be sampled by the policy itself, "
            "with explore=True"
        )
    actions = _stacked(list(episode.get_actions())) - start
    logprobs, values = (
        np.asarray(episode.get_extra_model_outputs(name), np.float32)
        for name in (Columns.ACTION_LOGP, Columns.VF_PREDS)
    )
    rewards = np.asarray(episode.get_rewards(), np.float32)
    playing = np.arange(steps + 1) < steps
    states = _states(episode, zeros)
    return {
        "observations": _stacked(_listed(episode.get_observations(), steps + 1)),
        "actions": np.concatenate([actions, actions[-1:]]),
        "logprobs": np.append(logprobs, logprobs[-1:]),
        "values": np.append(values, np.float32(value)),
        "rewards": np.append(np.zeros(1, np.float32), rewards),
        "terminals": np.where(playing, 0, float(episode.is_terminated)).astype(np.float32),
        "starts": (np.arange(steps + 1) == 0) & (episode.t_started == 0),
        "mask": playing,
        "state": states,
    }


def _unplayed(part: dict[str, PyTree], count: int) -> dict[str, PyTree]:
    """The last entry of a part, again and again, not to be learned from."""
    last = jax.tree.map(lambda x: np.repeat(x[-1:], count, axis=0), part)
    return last | {name: np.zeros_like(last[name]) for name in ("mask", "starts")}


def _states(episode: Episode, zeros: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state before each observation, the last one included, (steps + 1, ...) by name."""
    if not zeros:
        return {}
    name = Columns.STATE_OUT
    after = episode.get_extra_model_outputs(name)
    if isinstance(after, list):
        after = _stacked(after)
    first = zeros
    if episode.t_started > 0:
        first = episode.get_extra_model_outputs(name, -1, neg_index_as_lookback=True)
    return {name: np.concatenate([np.asarray(first[name])[None], after[name]]) for name in zeros}


def _listed(observations: Any, count: int) -> list[PyTree]:
    if isinstance(observations, list):
        return observations
    return [jax.tree.map(lambda x: x[i], observations) for i in range(count)]  # noqa: B023


def _stacked(items: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *xs: np.stack(xs), *items)
