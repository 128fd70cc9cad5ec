"""Environments on the host behind one interface: PufferLib's vecenvs and gymnasium's."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import PyTree
from numpy.typing import ArrayLike

from puffer_jax.base.spaces import Space
from puffer_jax.nn.widths import check_widths
from puffer_jax.ppo.host.stats import Info, Recorders, collect, told
from puffer_jax.ppo.source import Stats
from puffer_jax.vector.serial import Serial


class HostBatch(NamedTuple):
    """What a batch of agents receives; NumPy arrays (batch, ...), named as in `ppo.host`.

    They may be the environments' own, which their next step overwrites.

    Attributes:
        agent: number of the first agent; the others follow it.
        obs: an array or a tree of them.
        reward: float32.
        terminated: bool.
        truncated: bool.
        start: bool.
        mask: bool.
        final_obs: like `obs`, but arbitrary where no episode just ended; None if none did, if the
            environment does not hand them out, or if `HostEnv.shows_final`.
        stats: statistics of the episodes that ended, and from the environments' infos.
    """

    agent: int
    obs: PyTree
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    start: np.ndarray
    mask: np.ndarray
    final_obs: PyTree
    stats: Stats


@runtime_checkable
class HostEnv(Protocol):
    """Environments on the host, as the trainer uses them.

    Attributes:
        num_agents: how many agents there are, over all environments.
        agents_per_batch: how many of them act at once.
        needs_mask: whether `HostBatch.mask` must be honoured, whatever the options say.
        shows_final: whether the observation that comes with an episode's end is the final one of
            that episode, and not the first of the next.
        overlaps: whether `send` takes JAX's arrays, and need not wait for them to be computed.
        single_observation_space: the space of one agent's observations.
        single_action_space: the space of one agent's actions.
    """

    num_agents: int
    agents_per_batch: int
    needs_mask: bool
    shows_final: bool
    overlaps: bool
    single_observation_space: Space
    single_action_space: Space

    def async_reset(self, seed: int) -> None:
        """Start all episodes."""

    def recv(self) -> HostBatch:
        """Wait for a batch."""
        ...

    def send(self, actions: Any) -> None:
        """Act on the batch that was received last."""

    def close(self) -> None:
        """Close the environments."""


def as_host_env(env: Any) -> HostEnv | None:
    """An environment on the host behind the trainer's interface; None if `env` is not one.

    Takes a PufferLib vecenv (`num_agents`, `async_reset`, `recv`, `send`) or what has the interface
    of a `gymnasium.vector.VectorEnv`, as EnvPool's for gymnasium do.

    Raises:
        TypeError: a single gymnasium environment, or a vector of another kind.
    """
    is_async = all(callable(getattr(env, name, None)) for name in ("async_reset", "recv", "send"))
    if is_async and hasattr(env, "num_agents"):
        return PufferVecEnv(env)
    if hasattr(env, "single_action_space") and hasattr(env, "num_envs"):
        return GymnasiumVecEnv(env)
    if is_async:
        raise TypeError(
            f"{type(env).__name__} has `async_reset`, `recv` and `send`, but neither the "
            "`num_agents` of PufferLib's vecenvs nor the `num_envs` and `single_action_space` of "
            "gymnasium.vector's. EnvPool's environments have the latter if they are made with "
            'envpool.make(id, env_type="gymnasium", num_envs=8) by one of its newer releases; '
            "otherwise wrap it in a gymnasium.vector.VectorEnv"
        )
    if hasattr(env, "action_space") and not callable(env.action_space) and hasattr(env, "render"):
        if type(env).__module__.startswith("gymnasium") or hasattr(env, "unwrapped"):
            raise TypeError(
                f"{env} is a single environment; the trainer needs a vector of them, such as "
                "gymnasium.make_vec(id, num_envs=8)"
            )
    return None


class _Agents:
    """Agents that act together, and what lasts from one of their steps to the next.

    Attributes:
        first: number of the first agent.
        waiting: for each agent, whether its next observation is the first of an episode.
    """

    def __init__(self, first: int, count: int):
        self.first, self.waiting = first, np.ones(count, bool)
        self._returns, self._lengths = np.zeros(count), np.zeros(count, int)
        self._told: set[str] = set()

    def add(self, batch: HostBatch, done: np.ndarray) -> None:
        """Count a step, and put the episodes that ended with it into `batch.stats`.

        What the environments tell themselves, once or always, is not counted: their episodes may
        be others (several lives), and their rewards (before a transformation).
        """
        self._told |= batch.stats.keys()
        returns, lengths = self._returns, self._lengths
        returns += batch.reward
        lengths += 1
        if np.count_nonzero(batch.start):
            # The reward that came with an episode's first observation is not part of that
            # episode, unless the previous one ended in the same step.
            fresh = batch.start & ~done
            returns[fresh] = 0
            lengths[fresh] = 0
        if np.count_nonzero(done):
            for name, counted in (("episode_return", returns), ("episode_length", lengths)):
                if name not in self._told:
                    batch.stats[name] = counted[done].tolist()
            returns[done] = 0
            lengths[done] = 0


class PufferVecEnv:
    """A PufferLib vecenv, whose `recv` gives 7 or 8 values, for all agents or a batch of them.

    Emulated environments reset themselves in the step after an episode's end, and report that step
    as played; native ones reset in the same step, and do not hand out the final observation.
    """

    needs_mask = False

    def __init__(self, vecenv: Any):
        self.vecenv = vecenv
        self.num_agents = int(vecenv.num_agents)
        self.agents_per_batch = int(getattr(vecenv, "agents_per_batch", self.num_agents))
        self.single_observation_space = vecenv.single_observation_space
        self.single_action_space = vecenv.single_action_space
        driver = getattr(vecenv, "driver_env", vecenv)
        check_widths(driver)
        self.shows_final = bool(getattr(driver, "emulated", False))
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
                    f"the vecenv handed out agents {ids.tolist()}; those of a batch must be "
                    "consecutive (as with Multiprocessing's zero_copy=True)"
                )
            if count != self.agents_per_batch or first % count:
                raise ValueError(
                    f"the vecenv handed out {count} agents from agent {first} on; it must always "
                    f"hand out the same {self.agents_per_batch}"
                )
            agents = self._batches[ids.tobytes()] = _Agents(first, count)
        return agents

    def recv(self) -> HostBatch:  # noqa: D102
        obs, reward, terminated, truncated, *_, infos, ids, mask = self.vecenv.recv()
        agents = self._agents(np.asarray(ids))
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        mask = np.asarray(mask, bool)
        waiting, done = agents.waiting, terminated | truncated
        all_play = np.count_nonzero(mask) == mask.size
        if self.shows_final:
            start = waiting if all_play else waiting & mask
            agents.waiting = done if all_play else done | (waiting & ~mask)
            played = ~done if all_play else mask & ~done
        else:
            start, played = done | waiting, mask
            agents.waiting = np.zeros_like(waiting)
        batch = HostBatch(
            agents.first,
            np.asarray(obs),
            np.asarray(reward, np.float32),
            terminated,
            truncated,
            start,
            played,
            None,
            collect(infos, self.agents_per_batch) if infos else {},
        )
        agents.add(batch, done & ~waiting)  # whoever is absent has ended long ago
        return batch

    def send(self, actions: Any) -> None:  # noqa: D102
        self.vecenv.send(actions)

    def close(self) -> None:  # noqa: D102
        self.vecenv.close()


class GymnasiumVecEnv:
    """A `gymnasium.vector.VectorEnv` (1.x) in any `autoreset_mode`.

    NEXT_STEP: the observation that comes with an episode's end is its final one, and the action on
    it is ignored, so it is masked. SAME_STEP and DISABLED: it is the first of the next episode
    (with DISABLED, we reset), and the final one is handed out alongside.

    Raises:
        ValueError: its autoreset mode is unknown; or it hands out some of its environments only.
    """

    needs_mask = True
    overlaps = False

    def __init__(self, envs: Any):
        check_widths(envs)
        self.envs = envs
        self.num_agents = self.agents_per_batch = int(envs.num_envs)
        self.single_observation_space = envs.single_observation_space
        self.single_action_space = envs.single_action_space
        mode = (getattr(envs, "metadata", None) or {}).get("autoreset_mode", "NextStep")
        self._mode = str(getattr(mode, "value", mode)).replace("_", "").lower()
        if self._mode not in ("nextstep", "samestep", "disabled"):
            raise ValueError(f"{envs}: unknown autoreset_mode {mode!r}")
        self.shows_final = self._mode == "nextstep"
        self._agents = _Agents(0, self.num_agents)
        self._recorders = Recorders(envs)
        self._batch: HostBatch | None = None
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
                if isinstance(infos, Mapping) and "final_obs" in infos:
                    final = _fill(obs, infos["final_obs"], done)
                self._recorders.begin(done)
            case "disabled" if done.any():
                final = _copy(obs)
                options = {"reset_mask": done.copy()}
                obs, _ = self._recorders.reset(lambda: self.envs.reset(options=options), done)
        self._done = done
        self._keep(obs, reward, terminated, truncated, start, final, infos)

    def _keep(
        self,
        obs: PyTree,
        reward: ArrayLike,
        terminated: np.ndarray,
        truncated: np.ndarray,
        start: np.ndarray,
        final: PyTree,
        infos: Info,
    ) -> None:
        mask = ~self._done if self._mode == "nextstep" else np.ones(self.num_agents, bool)
        stats = told(infos, terminated | truncated)
        reward = np.asarray(reward, np.float32)
        handed = _rows(obs)
        if handed != self.num_agents:
            raise ValueError(
                f"{type(self.envs).__name__} handed out {handed} of {self.num_agents} "
                "environments; it must hand out all of them at once (EnvPool: batch_size equal to "
                "num_envs)"
            )
        # The environment may write the next observation into the same array.
        self._batch = HostBatch(
            0, _copy(obs), reward, terminated, truncated, start, mask, final, stats
        )
        self._agents.add(self._batch, terminated | truncated)

    def recv(self) -> HostBatch:  # noqa: D102
        if self._batch is None:
            raise RuntimeError("call async_reset before recv")
        return self._batch

    def close(self) -> None:  # noqa: D102
        self.envs.close()


def _rows(obs: PyTree) -> int:
    while isinstance(obs, Mapping | tuple):
        obs = next(iter(obs.values())) if isinstance(obs, Mapping) else obs[0]
    return len(obs)


def _copy(obs: PyTree) -> PyTree:
    if isinstance(obs, Mapping):
        return {name: _copy(value) for name, value in obs.items()}
    if isinstance(obs, tuple):
        return tuple(_copy(value) for value in obs)
    return np.array(obs)


def _fill(obs: PyTree, final: PyTree, done: np.ndarray) -> PyTree:
    """`obs` with the rows in `done` taken from gymnasium's `final_obs`, in either of its forms."""
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
