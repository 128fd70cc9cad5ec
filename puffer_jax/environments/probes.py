"""Probe environments: a correct learner solves each at once, and each isolates one fault.

If a trainer fails a probe and passes those before it, the fault is in what the probe adds.
Every probe says what to expect: `expected_value(obs, gamma)` is the value function of the
optimal policy, obs (..., features) -> (...); `expected_action(obs)`, where actions matter, is
that policy; `best_return` is its undiscounted return.

After the probes of Andy Jones, "Debugging RL, without the agonizing pain" (2021).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base.spaces import Box, Discrete
from puffer_jax.environments.jax_native import Transition
from puffer_jax.nn import random


def _sign(key: PRNGKeyArray) -> Array:
    return jax.random.rademacher(random.fast(key), (1,), jnp.float32)


def _scored(right: Array) -> Array:
    return jnp.where(right, 1.0, -1.0).astype(jnp.float32)


@dataclass(frozen=True)
class _OneStep:
    """Episodes of one step; the state is the observation, which is also the last one."""

    observation_space: ClassVar[Box] = Box(-1.0, 1.0, (1,))
    action_space: ClassVar[Discrete] = Discrete(2)
    best_return: ClassVar[float] = 1.0

    def reset(self, key: PRNGKeyArray) -> tuple[Array, Array]:
        obs = self._observation(key)
        return obs, obs

    def step(self, key: PRNGKeyArray, state: Array, action: ArrayLike) -> Transition:
        reward = self._reward(state, jnp.asarray(action))
        return state, state, reward, jnp.bool_(True), jnp.bool_(False), {}

    def expected_value(self, obs: ArrayLike, gamma: float) -> Array:
        return jnp.ones(jnp.shape(obs)[:-1])

    def _observation(self, key: PRNGKeyArray) -> Array:
        return jnp.ones(1, jnp.float32)

    def _reward(self, obs: Array, action: Array) -> Array:
        return jnp.float32(1)


class ProbeValue(_OneStep):
    """One action, one observation, one step, reward 1: the value must become 1.

    Isolates the value loss, its gradient and the optimizer.
    """

    action_space: ClassVar[Discrete] = Discrete(1)


class ProbeObservationValue(_OneStep):
    """The observation is +-1 at random and is the reward: the value must become the same.

    Isolates the way from the observation to the value (and the mixing up of environments).
    """

    action_space: ClassVar[Discrete] = Discrete(1)
    best_return: ClassVar[float] = 0.0  # on average; there is nothing to choose

    def expected_value(self, obs: ArrayLike, gamma: float) -> Array:
        """The observation itself."""
        return jnp.asarray(obs)[..., 0]

    def _observation(self, key: PRNGKeyArray) -> Array:
        return _sign(key)

    def _reward(self, obs: Array, action: Array) -> Array:
        return obs[0]


@dataclass(frozen=True)
class ProbeDiscount:
    """Two steps, observed as -1 and then 1; reward 1 at the end: the values must be gamma and 1.

    Isolates discounting, bootstrapping and the order of time.
    """

    observation_space: ClassVar[Box] = Box(-1.0, 1.0, (1,))
    action_space: ClassVar[Discrete] = Discrete(1)
    best_return: ClassVar[float] = 1.0

    def reset(self, key: PRNGKeyArray) -> tuple[Array, Array]:
        """The first of two steps."""
        obs = -jnp.ones(1, jnp.float32)
        return obs, obs

    def step(self, key: PRNGKeyArray, state: Array, action: ArrayLike) -> Transition:
        """On to the second step, or the end."""
        last = state[0] > 0
        obs = jnp.ones(1, jnp.float32)
        return obs, obs, last.astype(jnp.float32), last, jnp.bool_(False), {}

    def expected_value(self, obs: ArrayLike, gamma: float) -> Array:
        """`gamma` at the first step, 1 at the second."""
        return jnp.where(jnp.asarray(obs)[..., 0] > 0, 1.0, gamma)


class ProbeAction(_OneStep):
    """Two actions; 1 gives +1 and 0 gives -1: the policy must take 1, the value become 1.

    Isolates the policy gradient: its sign, log-probabilities and advantages.
    """

    def expected_action(self, obs: ArrayLike) -> Array:
        """Always 1."""
        return jnp.ones(jnp.shape(obs)[:-1], jnp.int32)

    def _reward(self, obs: Array, action: Array) -> Array:
        return _scored(action == 1)


class ProbeObservationAction(_OneStep):
    """The observation is +-1 at random; +1 for action 1 at 1 and 0 at -1, otherwise -1.

    Isolates the way from the observation to the action (advantages that belong to other steps).
    """

    def expected_action(self, obs: ArrayLike) -> Array:
        """1 where the observation is positive."""
        return (jnp.asarray(obs)[..., 0] > 0).astype(jnp.int32)

    def _observation(self, key: PRNGKeyArray) -> Array:
        return _sign(key)

    def _reward(self, obs: Array, action: Array) -> Array:
        return _scored(action == self.expected_action(obs))


class ProbeMemoryState(NamedTuple):
    """The cue, float32 (1,), and the steps taken."""

    cue: Array
    steps: Array


@dataclass(frozen=True)
class ProbeMemory:
    """A cue, +-1 at random, is seen at step 0; the action at step k must match it: +1, if not -1.

    Observations are (cue or 0, step / k): the clock makes the value a function of the
    observation, and says nothing about the cue. Actions before step k do nothing. Only a policy
    that carries memory over k steps gets 1; without it no policy does better than 0 on average.

    Isolates recurrent state: carried from step to step, kept for training, reset at the end.

    Attributes:
        k: steps from the cue to the action that counts, at least 1.
    """

    k: int = 4

    observation_space: ClassVar[Box] = Box(-1.0, 1.0, (2,))
    action_space: ClassVar[Discrete] = Discrete(2)
    best_return: ClassVar[float] = 1.0
    memoryless_return: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1; got {self.k}")

    def reset(self, key: PRNGKeyArray) -> tuple[Array, ProbeMemoryState]:
        """Step 0, where the cue is seen."""
        state = ProbeMemoryState(_sign(key), jnp.int32(0))
        return self._observation(state), state

    def step(self, key: PRNGKeyArray, state: ProbeMemoryState, action: ArrayLike) -> Transition:
        """The action counts at step k, which is the last."""
        last = state.steps >= self.k
        right = jnp.asarray(action) == self.expected_action(state.cue)
        reward = jnp.where(last, _scored(right), jnp.float32(0))
        state = ProbeMemoryState(state.cue, state.steps + 1)
        return self._observation(state), state, reward, last, jnp.bool_(False), {}

    def expected_value(self, obs: ArrayLike, gamma: float) -> Array:
        """`gamma ** (k - step)`."""
        return gamma ** (self.k * (1 - jnp.asarray(obs)[..., 1]))

    def expected_action(self, obs: ArrayLike) -> Array:
        """At step k, given the observation of step 0: 1 where the cue is positive."""
        return (jnp.asarray(obs)[..., 0] > 0).astype(jnp.int32)

    def _observation(self, state: ProbeMemoryState) -> Array:
        cue = jnp.where(state.steps == 0, state.cue[0], 0.0)
        clock = jnp.minimum(state.steps, self.k) / self.k
        return jnp.stack([cue, clock]).astype(jnp.float32)
