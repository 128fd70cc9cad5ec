"""What every vecenv can do, and the order of its calls."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from puffer_jax.base.spaces import Space, structured_dtype
from puffer_jax.environments.emulation.spaces import joint_space
from puffer_jax.vector.envs import AgentLayout, Env, Info

T = TypeVar("T")
Actions = Any
"""An array (agents_per_batch, ...), NumPy's or JAX's, which is not imported here."""
_Array = np.ndarray
AgentBatch = tuple[_Array, _Array, _Array, _Array, list[Info], _Array, _Array]
"""What `recv` returns: observations, rewards, terminals, truncations, infos, agent ids, masks."""


class WorkerError(RuntimeError):
    """A worker failed: an environment raised in it, it died, or it hung."""


class VecEnv(ABC):
    """The protocol, and the order of its calls.

    Args:
        driver_env: one of the environments, for its spaces.
        layout: what each environment needs of the buffers.
        num_envs: number of environments.
        batch_envs: number of environments that act at once.

    Attributes:
        driver_env: one of the environments; a policy is made for it.
        emulated: how a structured observation is packed, see `puffer_jax.nativize_dtype`; False
            for native environments.
        single_observation_space: observation space of one agent.
        single_action_space: action space of one agent.
        num_environments: number of environments.
        num_agents: number of agents in all environments.
        agents_per_batch: number of agents that act at once.
        agent_ids: numbers of all agents.
        num_buffers: number of groups that take turns in this process, see `Serial`.
        info_sources: for each of the infos received last, the number of the environment that said
            it; empty where one info is of all environments (`JaxVecEnv`).
    """

    num_buffers = 1

    def __init__(self, driver_env: Env, layout: AgentLayout, num_envs: int, batch_envs: int):
        self.driver_env = driver_env
        self.emulated = driver_env.emulated
        self.single_observation_space = layout.observation_space
        self.single_action_space = layout.action_space
        self.num_environments = num_envs
        self.num_agents = layout.num_agents * num_envs
        self.agents_per_batch = layout.num_agents * batch_envs
        self.agent_ids = np.arange(self.num_agents)
        self.info_sources: list[int] = []
        self._state = "reset"  # what must be called next; or "closed"
        self._action = structured_dtype(layout.action_space)
        self._actions_shape = (self.agents_per_batch, *self._action.shape)
        self._actions_checked = False

    @property
    def num_envs(self) -> int:
        """Rows of a batch. Quirk kept: agents, not environments."""
        return self.agents_per_batch

    @functools.cached_property
    def observation_space(self) -> Space:
        """Observation space of a batch, a Box."""
        return joint_space(self.single_observation_space, self.agents_per_batch)

    @functools.cached_property
    def action_space(self) -> Space:
        """Action space of a batch: MultiDiscrete for Discrete, otherwise a Box."""
        return joint_space(self.single_action_space, self.agents_per_batch)

    def async_reset(self, seed: int | None = None) -> None:
        """Start all episodes; environment i with `seed + i`, whichever worker has it.

        With None, environments go on with the seeds they were made with.

        Raises:
            RuntimeError: it is closed.
            WorkerError: a worker failed. Everything is closed then.
        """
        self._expect("reset", "recv", "send")
        self._or_close(self._reset, seed)
        self._state = "recv"

    def recv(self) -> AgentBatch:
        """Wait for a batch.

        Returns:
            (observations, rewards, terminals, truncations, infos, agent_ids, masks): arrays
            (agents_per_batch, ...) except for infos, a list of the environments' infos. A mask is
            False where an agent is absent.

        Raises:
            RuntimeError: neither `async_reset` nor `send` came before.
            WorkerError: a worker failed. Everything is closed then.
        """
        self._expect("recv")
        received = self._or_close(self._recv)
        self._state = "send"
        return received

    def send(self, actions: Actions) -> None:
        """Act on the batch received last.

        Args:
            actions: (agents_per_batch, ...), of the joint `action_space`; their values are checked
                against it only the first time. With several buffers, JAX may still be computing
                them.

        Raises:
            RuntimeError: `recv` did not come before.
            ValueError: `actions` have another shape or kind, or are outside the space.
            WorkerError: a worker failed. Everything is closed then.
        """
        self._expect("send")
        if self.num_buffers == 1:
            actions = np.asarray(actions)
        elif not hasattr(actions, "block_until_ready"):
            actions = np.array(actions)  # the caller may reuse its array before they are played
        self._check_actions(actions)
        self._or_close(self._send, actions)
        self._state = "recv"

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, list[Info]]:
        """`async_reset` and `recv`; returns observations and infos."""
        self.async_reset(seed)
        received = self.recv()
        return received[0], received[4]

    def step(
        self, actions: Actions
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[Info]]:
        """`send` and `recv`; returns observations, rewards, terminals, truncations and infos."""
        self.send(actions)
        return self.recv()[:5]

    def renew(self) -> AgentBatch:
        """Start the next episode, now, wherever in the batch received last one is over.

        For loops that expect an episode's first observation in the step that ends the one before:
        what `recv` gave is then overwritten. Without this, an emulated environment begins its next
        episode in the next step, and ignores that step's action; after this, it acts. Native
        environments reset themselves, so nothing is done, and what `recv` gave stays.

        Returns:
            As `recv`. The agents of environments that were reset have their first observations,
            rewards of 0 and no flags; the others', what `recv` gave. infos are those of the resets.
            If `restart_failed` brings a lost worker back, its environments are truncated; call this
            again then.

        Raises:
            RuntimeError: `recv` did not come before.
            WorkerError: a worker failed. Everything is closed then.

        Example:
            >>> import numpy as np, puffer_jax
            >>> with puffer_jax.vector.make("CartPole-v1", num_envs=4) as vecenv:
            ...     obs, infos = vecenv.reset(seed=0)
            ...     while not vecenv.step(np.zeros(4, int))[2].any():
            ...         pass
            ...     obs, rewards, terminals, *_ = vecenv.renew()
            >>> terminals.tolist()
            [False, False, False, False]
        """
        self._expect("send")
        return self._or_close(self._renew)

    def apply(self, function: Callable[[Env], T], envs: Sequence[int] | None = None) -> list[T]:
        """Call a function of environments, each in the process where it lives.

        Args:
            function: gets an environment as the vecenv has it, that is, emulated: a
                `GymnasiumPufferEnv`'s `env` is what the creator returned. For workers it is
                pickled, by cloudpickle, and so is what it returns.
            envs: numbers of environments; None: all.

        Returns:
            What it returned, in the order of the numbers.

        Raises:
            Exception: what it raises, of the first environment where it does, with a note that says
                which. Others have been called, and everything goes on.
            ValueError: there is no environment of such a number.
            TypeError: what it returns cannot come from another process; or the environments are no
                objects (`JaxVecEnv`).
            RuntimeError: it is closed.
            WorkerError: a worker is lost, even with `restart_failed`. Everything is closed then.

        Example:
            >>> import puffer_jax
            >>> with puffer_jax.vector.make("CartPole-v1", num_envs=2) as vecenv:
            ...     vecenv.apply(lambda env: env.env.spec.max_episode_steps)
            [500, 500]
        """
        self._expect("reset", "recv", "send")
        numbers = [*range(self.num_environments)] if envs is None else [int(i) for i in envs]
        wrong = [number for number in numbers if not 0 <= number < self.num_environments]
        if wrong:
            raise ValueError(f"envs must be 0 .. {self.num_environments - 1}; got {wrong}")
        try:
            results = self._apply(function, numbers)
        except WorkerError:
            self.close()
            raise
        for done, result in results:
            if not done:
                raise result
        return [result for _, result in results]

    def notify(self) -> None:
        """Call `notify` on the environments that have it."""
        self._expect("reset", "recv", "send")
        self._notify()

    def close(self) -> None:
        """Close the environments and end the workers; a second call does nothing."""
        if self._state != "closed":
            self._state = "closed"
            self._close()

    def __enter__(self) -> "VecEnv":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _expect(self, *states: str) -> None:
        if self._state in states:
            return
        if self._state == "closed":
            raise RuntimeError(f"this {type(self).__name__} is closed")
        first = {"reset": "(async_)reset", "recv": "recv", "send": "send"}[self._state]
        raise RuntimeError(f"call {first} before {states[0]}")

    def _or_close(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return function(*arguments)
        except Exception:
            self.close()
            raise

    def _check_actions(self, actions: Actions) -> None:
        problem = "" if actions.shape == self._actions_shape else f"shape {self._actions_shape}"
        if not problem and not self._actions_checked:
            space = self.action_space
            if not np.can_cast(actions.dtype, space.dtype, "same_kind"):
                problem = f"{space.dtype}"
            elif not space.contains(np.asarray(actions).astype(space.dtype)):
                problem = f"values in {space}"
            self._actions_checked = not problem
        if problem:
            raise ValueError(
                f"actions must have {problem}; got shape {actions.shape} of {actions.dtype}"
                + (f" in {actions.min()} .. {actions.max()}" if actions.size else "")
            )

    @abstractmethod
    def _reset(self, seed: int | None) -> None: ...

    @abstractmethod
    def _recv(self) -> AgentBatch: ...

    @abstractmethod
    def _send(self, actions: Actions) -> None: ...

    @abstractmethod
    def _renew(self) -> AgentBatch: ...

    @abstractmethod
    def _apply(
        self, function: Callable[[Env], Any], numbers: Sequence[int]
    ) -> list[tuple[bool, Any]]: ...

    @abstractmethod
    def _notify(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...
