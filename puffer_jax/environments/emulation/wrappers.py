"""Environments of gymnasium and PettingZoo behind flat arrays."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from puffer_jax.base.spaces import Env, Space
from puffer_jax.environments.emulation.buffers import Buffers, set_buffers
from puffer_jax.environments.emulation.rows import Reader, Sample, Writer
from puffer_jax.environments.emulation.spaces import (
    emulate_action_space,
    emulate_observation_space,
    import_gymnasium,
)

Info = Any
"""What an environment says besides; in gymnasium's protocol, a dict."""

ByAgent = Mapping[Hashable, Any]


class _Emulated:
    """What the environments of one and of several agents have in common."""

    single_observation_space: Space
    single_action_space: Space
    observations: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray
    truncations: np.ndarray
    masks: np.ndarray
    actions: np.ndarray
    teacher_actions: np.ndarray

    def __init__(
        self,
        env: Env,
        spaces: tuple[Space, Space],
        agents: int,
        buf: Buffers | None,
        seed: int | None,
    ):
        self.env = env
        self.num_agents = agents
        self.agent_ids = np.arange(agents)
        self.initialized = False
        self._seed = seed
        try:
            self.single_observation_space, structured = emulate_observation_space(spaces[0])
            self.single_action_space, build = emulate_action_space(spaces[1])
            self.emulated = {
                "observation_dtype": self.single_observation_space.dtype,
                "emulated_observation_dtype": structured,
            }
            set_buffers(self, buf)
            self._write = Writer(env, spaces[0], self.observations, structured).write
        except (TypeError, ValueError) as error:
            raise type(error)(f"{env}: {error}") from error
        self._reader = Reader(env, self.single_action_space, build)
        self.is_obs_emulated = self.single_observation_space is not spaces[0]
        self.is_atn_emulated = build is not None

    @property
    def render_mode(self) -> str | None:
        """That of the environment."""
        return self.env.render_mode

    @property
    def metadata(self) -> Mapping[str, Any]:
        """That of the environment."""
        return getattr(self.env, "metadata", None) or {"render_modes": []}

    def seed(self, seed: int | None) -> None:
        """Seed the next reset, if that gets no seed."""
        self._seed = seed

    def render(self) -> Any:
        """What the environment draws."""
        return self.env.render()

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _reset(self, seed: int | None, options: object) -> tuple[Sample, Info]:
        seed, self._seed = self._seed if seed is None else seed, None
        arguments = {"seed": seed, "options": options}
        self.initialized = True
        # To an environment, a seed of None may mean something other than no seed.
        return self.env.reset(**{name: v for name, v in arguments.items() if v is not None})

    def _check_running(self, done: bool) -> None:
        if not self.initialized:
            raise RuntimeError(f"{self.env}: step() before reset()")
        if done:
            raise RuntimeError(f"{self.env}: step() after the episode's end; call reset()")


class GymnasiumPufferEnv(_Emulated):
    """A gymnasium environment behind flat arrays: one agent.

    Attributes:
        env: the environment.
        observation_space: `single_observation_space`, the Box of a row of `observations`.
        action_space: `single_action_space`, what `step` takes.
        emulated: what `puffer_jax.nativize_dtype` reads.
        done: whether `reset` is due.
        observations, rewards, terminals, truncations, masks, actions, teacher_actions: see
            `set_buffers`; written in place.
    """

    def __init__(
        self,
        env: Env = None,
        env_creator: object = None,
        env_args: Sequence[object] | None = (),
        env_kwargs: Mapping[str, object] | None = None,
        buf: Buffers | None = None,
        seed: int | None = 0,
    ):
        """Make the environment, if it is not made yet, and lay out the way to the buffers.

        Args:
            env: an environment, or an id for `gymnasium.make`.
            env_creator: or a function of `env_args` and `env_kwargs` that gives one, or an id.
            env_args: see `env_creator`.
            env_kwargs: see `env_creator`.
            buf: the buffers, see `set_buffers`.
            seed: of the first reset, if that gets no seed. (The reference ignores it.)

        Raises:
            TypeError: `env_creator` is not callable, or `env` is; or a space is not supported.
            ValueError: both or neither of `env` and `env_creator` are given; or a space cannot be
                laid out.
        """
        if isinstance(env, str):
            env, env_creator = None, env if env_creator is None else env_creator
        if isinstance(env_creator, str):
            env_creator = partial(import_gymnasium().make, env_creator)
        env = _make(env, env_creator, env_args, env_kwargs)
        super().__init__(env, (env.observation_space, env.action_space), 1, buf, seed)
        self.observation_space = self.single_observation_space
        self.action_space = self.single_action_space
        self.done = True

    @property
    def unwrapped(self) -> "GymnasiumPufferEnv":
        """This environment: inside it the spaces are others."""
        return self

    def reset(self, seed: int | None = None, options: object = None) -> tuple[np.ndarray, Info]:
        """Begin an episode.

        Returns:
            (`observations` (1, *shape), info).

        Raises:
            ValueError: the observation is not in its space.
        """
        observation, info = self._reset(seed, options)
        self._write(0, observation)
        self.done = False
        self.rewards[0], self.terminals[0], self.truncations[0] = 0, False, False
        self.masks[0] = True
        return self.observations, info

    def step(self, action: Sample) -> tuple[np.ndarray, float, bool, bool, Info]:
        """Act.

        Args:
            action: of `action_space`, also with a leading axis of 1.

        Returns:
            (`observations`, reward, terminated, truncated, info). Rewards of several agents are
            added up, and the episode ends when it does for any of them.

        Raises:
            RuntimeError: there is no running episode.
            ValueError: the action or the observation is not in its space.
        """
        if self.done:
            self._check_running(True)
        observation, reward, terminated, truncated, info = self.env.step(self._reader.read(action))
        if type(reward) is not float:
            reward = float(np.sum(reward) if isinstance(reward, _MANY) else reward)
        if type(terminated) is not bool:
            terminated = bool(np.any(terminated))
        if type(truncated) is not bool:
            truncated = bool(np.any(truncated))
        self._write(0, observation)
        self.rewards[0] = reward
        if terminated or truncated:  # both are False since the reset
            self.terminals[0], self.truncations[0], self.done = terminated, truncated, True
        return self.observations, reward, terminated, truncated, info


class PettingZooPufferEnv(_Emulated):
    """A PettingZoo environment behind flat arrays: a row for each possible agent.

    An absent agent has a row of zeros, which is masked; unlike in the reference, also after a
    reset. The episode is over when no agent is left, or each that is left is terminated or
    truncated; the reference waits until all are terminated, or all truncated.

    Attributes:
        env: the parallel environment.
        emulated: what `puffer_jax.nativize_dtype` reads.
        mask: agent -> whether it is present.
        observations, rewards, terminals, truncations, masks, actions, teacher_actions: see
            `set_buffers`; written in place.
    """

    def __init__(
        self,
        env: Env = None,
        env_creator: object = None,
        env_args: Sequence[object] | None = (),
        env_kwargs: Mapping[str, object] | None = None,
        buf: Buffers | None = None,
        seed: int | None = 0,
    ):
        """Make the environment, if it is not made yet, and lay out the way to the buffers.

        Args:
            env: a parallel environment; one in which agents take turns (AEC) goes through
                PettingZoo's own converter.
            env_creator: or a function of `env_args` and `env_kwargs` that gives one.
            env_args: see `env_creator`.
            env_kwargs: see `env_creator`.
            buf: the buffers, see `set_buffers`.
            seed: of the first reset, if that gets no seed. (The reference ignores it.)

        Raises:
            TypeError: `env_creator` is not callable, or `env` is; or a space is not supported.
            ValueError: both or neither of `env` and `env_creator` are given; or a space cannot be
                laid out, or is not the same for all agents.
        """
        env = _parallel(_make(env, env_creator, env_args, env_kwargs))
        agents = list(env.possible_agents)
        spaces = env.observation_space(agents[0]), env.action_space(agents[0])
        for agent in agents[1:]:
            for first, other in zip(
                spaces, (env.observation_space(agent), env.action_space(agent)), strict=True
            ):
                if other != first:
                    raise ValueError(
                        f"{env}: all agents must have the same spaces; {agents[0]!r} has {first}, "
                        f"{agent!r} {other}"
                    )
        super().__init__(env, spaces, len(agents), buf, seed)
        self.possible_agents = agents
        self.mask = dict.fromkeys(agents, False)
        self._ended: set[Hashable] = set()
        self._rows = {agent: self.observations[i] for i, agent in enumerate(agents)}
        self._over = True

    @property
    def agents(self) -> list[Hashable]:
        """The agents that are present."""
        return self.env.agents

    @property
    def done(self) -> bool:
        """Whether `reset` is due."""
        return self._over or not self.env.agents

    def observation_space(self, agent: Hashable) -> Space:
        """`single_observation_space`; raises ValueError if there is no such agent."""
        self._check_agents((agent,))
        return self.single_observation_space

    def action_space(self, agent: Hashable) -> Space:
        """`single_action_space`; raises ValueError if there is no such agent."""
        self._check_agents((agent,))
        return self.single_action_space

    def reset(
        self, seed: int | None = None, options: object = None
    ) -> tuple[dict[Hashable, np.ndarray], Info]:
        """Begin an episode.

        Returns:
            (agent -> its row of `observations`, infos).

        Raises:
            ValueError: an observation is not in its space, or is of an agent that does not exist.
        """
        observations, infos = self._reset(seed, options)
        self._receive(observations, {}, {}, {})
        self.terminals[:] = False
        self._ended.clear()
        self._over = False
        return self._rows, infos

    def step(self, actions: ByAgent | np.ndarray) -> tuple[ByAgent, ...]:
        """Act.

        Args:
            actions: (agents, ...) in the order of `possible_agents`, or by agent. Those of absent
                agents are left out.

        Returns:
            (observations, rewards, terminated, truncated, infos), dicts by agent; the first four
            have all possible agents.

        Raises:
            RuntimeError: there is no running episode.
            ValueError: an action or observation is not in its space, or is of an agent that does
                not exist.
        """
        self._check_running(self.done)
        present = set(self.env.agents)
        if not isinstance(actions, np.ndarray):
            self._check_agents(actions)
            read = {a: self._reader.read(x) for a, x in actions.items() if a in present}
        elif len(actions) == self.num_agents:
            pairs = zip(self.possible_agents, self._reader.read_all(actions), strict=True)
            read = {a: x for a, x in pairs if a in present}
        else:
            raise ValueError(f"{self.env}: {len(actions)} actions for {self.num_agents} agents")
        observations, rewards, terminated, truncated, infos = self.env.step(read)
        self._receive(observations, rewards, terminated, truncated)
        for agent in {**observations, **terminated, **truncated}:  # the others are as before
            over = terminated.get(agent) or truncated.get(agent)
            (self._ended.add if over else self._ended.discard)(agent)
        self._over = self._ended.issuperset(self.env.agents)
        if self._over:  # whoever left without a word was cut off
            self.truncations |= self.masks & ~self.terminals
        padded = self._pad(rewards, 0), self._pad(terminated, True), self._pad(truncated, False)
        return self._rows, *padded, infos

    def _pad(self, values: ByAgent, absent: object) -> ByAgent:
        if values.keys() == self.mask.keys():
            return values
        return {agent: values.get(agent, absent) for agent in self.possible_agents}

    def _receive(
        self,
        observations: ByAgent,
        rewards: ByAgent,
        terminated: ByAgent,
        truncated: ByAgent,
    ) -> None:
        """Write the rows of the agents that are observed, and zeros for those that are not.

        What is not said of an agent is 0 or False. Who leaves may have a reward without one.
        """
        count, mask, write = 0, self.mask, self._write
        for i, agent in enumerate(self.possible_agents):
            was_present, present = mask[agent], agent in observations
            mask[agent] = self.masks[i] = present
            if present:
                count += 1
                write(i, observations[agent])
                self.terminals[i] = terminated.get(agent, False)
                self.truncations[i] = truncated.get(agent, False)
            else:
                self.observations[i] = 0
                self.terminals[i], self.truncations[i] = True, False
            self.rewards[i] = rewards.get(agent, 0) if present or was_present else 0
        if count != len(observations):
            self._check_agents(observations)

    def _check_agents(self, agents: Iterable[Hashable]) -> None:
        unknown = [agent for agent in agents if agent not in self.mask]
        if unknown:
            raise ValueError(f"{self.env}: no agents {unknown}; there are {self.possible_agents}")


_MANY = (np.ndarray, list, tuple)


def _make(
    env: Env,
    creator: object,
    args: Sequence[object] | None,
    kwargs: Mapping[str, object] | None,
) -> Env:
    if (env is None) == (creator is None):
        raise ValueError(f"give either env or env_creator, got {env!r} and {creator!r}")
    if env is not None:
        if callable(env):
            raise TypeError(f"env must be an environment; give {env!r} as env_creator")
        return env
    if not callable(creator):
        raise TypeError(f"env_creator must be callable, got {creator!r}")
    return creator(*(args or ()), **(kwargs or {}))


def _parallel(env: Env) -> Env:
    """The environment, or what PettingZoo makes of one whose agents take turns."""
    if not hasattr(env, "agent_iter"):
        return env
    from pettingzoo.utils import conversions

    if env.metadata.get("is_parallelizable", False):
        return conversions.aec_to_parallel(env)
    return conversions.turn_based_aec_to_parallel(env)
