"""Environments on the host behind one interface: PufferLib's vecenvs and gymnasium's."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from puffer_jax.vector.serial import Serial


class Received(NamedTuple):
    """What a batch of agents receives; arrays (batch, ...), NumPy.

    They may be the environments' own, which their next step overwrites.

    Attributes:
        agent: number of the first agent; the others follow it.
        obs: an array or a tree of them.
        reward: float32.
        terminated: bool.
        truncated: bool.
        start: whether `obs` is the first of an episode.
        mask: False where the agent does not play, or its action on `obs` is ignored.
        final_obs: the last observations of the episodes that just ended, like `obs` (elsewhere
            anything); None: see `HostEnv.own_last`.
        stats: name -> values, of the episodes that ended and of the environment's infos.
    """

    agent: int
    obs: Any
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    start: np.ndarray
    mask: np.ndarray
    final_obs: Any
    stats: dict[str, list[Any]]


@runtime_checkable
class HostEnv(Protocol):
    """Environments on the host, as the trainer uses them.

    Attributes:
        num_agents: over all environments.
        agents_per_batch: that act at once.
        masked: whether `Received.mask` must always be honoured.
        own_last: whether the observation that comes with an episode's end is its last one.
        overlaps: whether `send` does not wait for actions that are still being computed.
        single_observation_space: of one agent.
        single_action_space: of one agent.
    """

    num_agents: int
    agents_per_batch: int
    masked: bool
    own_last: bool
    overlaps: bool
    single_observation_space: Any
    single_action_space: Any

    def async_reset(self, seed: int) -> None:
        """Start all episodes."""

    def recv(self) -> Received:
        """Wait for a batch."""
        ...

    def send(self, actions: Any) -> None:
        """Act on the batch received last; arrays, JAX's if it `overlaps`."""

    def close(self) -> None:
        """Close the environments."""


def as_host_env(env: Any) -> HostEnv | None:
    """The host environment behind the trainer's interface; None if it is none.

    Takes a PufferLib vecenv (`async_reset`, `recv`, `send`) or a `gymnasium.vector.VectorEnv`.

    Raises:
        TypeError: a single gymnasium environment.
    """
    if all(callable(getattr(env, name, None)) for name in ("async_reset", "recv", "send")):
        return PufferVecEnv(env)
    if hasattr(env, "single_action_space") and hasattr(env, "num_envs"):
        return GymnasiumVecEnv(env)
    if hasattr(env, "action_space") and not callable(env.action_space) and hasattr(env, "render"):
        if type(env).__module__.startswith("gymnasium") or hasattr(env, "unwrapped"):
            raise TypeError(
                f"{env} is a single environment; the trainer needs a vector of them, such as "
                "gymnasium.make_vec(id, num_envs=8)"
            )
    return None


class _Agents:
    """Agents that act together: what goes on from step to step.

    Attributes:
        first: number of the first.
        waiting: whether the next observation is the first of an episode.
    """

    def __init__(self, first: int, count: int):
        self.first, self.waiting = first, np.ones(count, bool)
        self._returns, self._lengths = np.zeros(count), np.zeros(count, int)

    def add(self, received: Received, done: np.ndarray) -> None:
        """Count a step, and put the episodes that ended with it into `received.stats`."""
        returns, lengths = self._returns, self._lengths
        returns += received.reward
        lengths += 1
        if np.count_nonzero(received.start):
            # The observation that starts an episode came with no reward of it, unless the episode
            # before it ended in the same step.
            fresh = received.start & ~done
            returns[fresh] = 0
            lengths[fresh] = 0
        if np.count_nonzero(done):
            if "episode_return" not in received.stats:
                received.stats["episode_return"] = returns[done].tolist()
                received.stats["episode_length"] = lengths[done].tolist()
            returns[done] = 0
            lengths[done] = 0


class PufferVecEnv:
    """A PufferLib vecenv: the 7- or the 8-tuple of `recv`, all agents at once or in batches.

    Its emulated environments reset themselves in the step after an episode's end, which they mark
    as played; its native ones in the same step, and hand out no last observation.
    """

    masked = False

    def __init__(self, vecenv: Any):
        self.vecenv = vecenv
        self.num_agents = int(vecenv.num_agents)
        self.agents_per_batch = int(getattr(vecenv, "agents_per_batch", self.num_agents))
        self.single_observation_space = vecenv.single_observation_space
        self.single_action_space = vecenv.single_action_space
        driver = getattr(vecenv, "driver_env", vecenv)
        self.own_last = bool(getattr(driver, "emulated", False))
        self.overlaps = isinstance(vecenv, Serial) and vecenv.num_buffers > 1
        self._batches: dict[bytes, _Agents] = {}  # by the agents' numbers

    def async_reset(self, seed: int) -> None:  # noqa: D102
        self.vecenv.async_reset(seed)
        for agents in self._batches.values():
            agents.waiting = np.ones_like(agents.waiting)

    def _agents(self, ids: np.ndarray) -> _Agents:
        agents = self._batches.get(ids.tobytes())
        if agents is None:
            first, count = int(ids.flat[0]), ids.size
            if ids.ravel().tolist() != [*range(first, first + count)]:
                raise ValueError(
                    f"the vecenv handed out agents {ids.tolist()}; batches must be of agents in a "
                    "row (Multiprocessing's zero_copy=True does so)"
                )
            if count != self.agents_per_batch or first % count:
                raise ValueError(
                    f"the vecenv handed out {count} agents from agent {first} on; it must hand out "
                    f"always the same {self.agents_per_batch}"
                )
            agents = self._batches[ids.tobytes()] = _Agents(first, count)
        return agents

    def recv(self) -> Received:  # noqa: D102
        obs, reward, terminated, truncated, *_, infos, ids, mask = self.vecenv.recv()
        agents = self._agents(np.asarray(ids))
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        mask = np.asarray(mask, bool)
        waiting, done = agents.waiting, terminated | truncated
        all_play = np.count_nonzero(mask) == mask.size
        if self.own_last:
            start = waiting if all_play else waiting & mask
            agents.waiting = done if all_play else done | (waiting & ~mask)
            played = ~done if all_play else mask & ~done
        else:
            start, played = done | waiting, mask
            agents.waiting = np.zeros_like(waiting)
        received = Received(
            agents.first,
            np.asarray(obs),
            np.asarray(reward, np.float32),
            terminated,
            truncated,
            start,
            played,
            None,
            _collect(infos) if infos else {},
        )
        agents.add(received, done)
        return received

    def send(self, actions: Any) -> None:  # noqa: D102
        self.vecenv.send(actions)

    def close(self) -> None:  # noqa: D102
        self.vecenv.close()


class GymnasiumVecEnv:
    """A `gymnasium.vector.VectorEnv` (1.x) in any `autoreset_mode`.

    NEXT_STEP: the observation that comes with an episode's end is its last, and the action on it
    is ignored: it is masked. SAME_STEP and DISABLED: it is the first of the next episode (with
    DISABLED, we reset), and the last one is handed out beside it.
    """

    masked = True
    overlaps = False

    def __init__(self, envs: Any):
        self.envs = envs
        self.num_agents = self.agents_per_batch = int(envs.num_envs)
        self.single_observation_space = envs.single_observation_space
        self.single_action_space = envs.single_action_space
        mode = (envs.metadata or {}).get("autoreset_mode", "NextStep")
        self._mode = str(getattr(mode, "value", mode)).replace("_", "").lower()
        if self._mode not in ("nextstep", "samestep", "disabled"):
            raise ValueError(f"{envs}: unknown autoreset_mode {mode!r}")
        self.own_last = self._mode == "nextstep"
        self._agents = _Agents(0, self.num_agents)
        self._received: Received | None = None
        self._done = np.zeros(self.num_agents, bool)

    def async_reset(self, seed: int) -> None:  # noqa: D102
        obs, infos = self.envs.reset(seed=seed)
        no = np.zeros(self.num_agents, bool)
        self._done = no
        self._keep(obs, np.zeros(self.num_agents), no, no, ~no, None, infos)

    def send(self, actions: np.ndarray) -> None:  # noqa: D102
        obs, reward, terminated, truncated, infos = self.envs.step(actions)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        done, final = terminated | truncated, None
        start = done
        match self._mode:
            case "nextstep":
                start = self._done
            case "samestep" if done.any():
                final = _fill(obs, infos["final_obs"], done)
            case "disabled" if done.any():
                final = _copy(obs)
                obs, _ = self.envs.reset(options={"reset_mask": done})
        self._done = done
        self._keep(obs, reward, terminated, truncated, start, final, infos)

    def _keep(
        self,
        obs: Any,
        reward: Any,
        terminated: np.ndarray,
        truncated: np.ndarray,
        start: np.ndarray,
        final: Any,
        infos: Mapping[str, Any],
    ) -> None:
        mask = ~self._done if self._mode == "nextstep" else np.ones(self.num_agents, bool)
        stats: dict[str, list[Any]] = {}
        episode = infos.get("episode")
        if isinstance(episode, Mapping) and "r" in episode:  # RecordEpisodeStatistics
            ended = np.asarray(infos.get("_episode", terminated | truncated), bool)
            stats["episode_return"] = np.asarray(episode["r"])[ended].tolist()
            stats["episode_length"] = np.asarray(episode["l"])[ended].tolist()
        reward = np.asarray(reward, np.float32)
        # The environment may write the next observation into the same array.
        self._received = Received(
            0, _copy(obs), reward, terminated, truncated, start, mask, final, stats
        )
        self._agents.add(self._received, terminated | truncated)

    def recv(self) -> Received:  # noqa: D102
        if self._received is None:
            raise RuntimeError("call async_reset before recv")
        return self._received

    def close(self) -> None:  # noqa: D102
        self.envs.close()


def _copy(obs: Any) -> Any:
    if isinstance(obs, Mapping):
        return {name: _copy(value) for name, value in obs.items()}
    if isinstance(obs, tuple):
        return tuple(_copy(value) for value in obs)
    return np.array(obs)


def _fill(obs: Any, final: Any, done: np.ndarray) -> Any:
    """`obs` with the rows of `done` taken from gymnasium's `final_obs`, in whichever form."""
    if isinstance(obs, Mapping):
        if isinstance(final, Mapping):
            return {name: _fill(obs[name], final[name], done) for name in obs}
        parts = {n: [None if f is None else f[n] for f in final] for n in obs}
        return {name: _fill(obs[name], parts[name], done) for name in obs}
    if isinstance(obs, tuple):
        if isinstance(final, tuple):
            return tuple(_fill(o, f, done) for o, f in zip(obs, final, strict=True))
        columns = [[None if f is None else f[i] for f in final] for i in range(len(obs))]
        return tuple(_fill(o, c, done) for o, c in zip(obs, columns, strict=True))
    filled = np.array(obs)
    for i in np.flatnonzero(done):
        filled[i] = final[i]
    return filled


def _collect(infos: Any) -> dict[str, list[Any]]:
    """The numbers in a list of nested infos, by path, as the reference's `evaluate` keeps them."""
    stats: dict[str, list[Any]] = {}
    for info in infos:
        for name, value in _leaves(info):
            if isinstance(value, np.ndarray | list | tuple):
                stats.setdefault(name, []).extend(np.asarray(value).ravel().tolist())
            else:
                stats.setdefault(name, []).append(value)
    return stats


def _leaves(info: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in info.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
