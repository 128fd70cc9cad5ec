"""Two small tasks in the style of PufferLib's Ocean, JAX-native: Squared and Memory."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from puffer_jax.base.spaces import Box, Discrete
from puffer_jax.environments.jax_native import Transition
from puffer_jax.nn import random

# Up, down, left, right, then the diagonals, as (row, column).
_MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)], np.int32)


class SquaredState(NamedTuple):
    """Where the agent is (row, column), the targets left, and the steps taken."""

    position: Int[Array, "2"]
    targets: Bool[Array, "side side"]
    steps: Int[Array, ""]


@dataclass(frozen=True)
class Squared:
    """Reach the targets on the border of a square, each time from its centre.

    The grid has 2 * distance + 1 tiles a side. One of 8 actions moves the agent to a neighbour:
    up, down, left, right, up-left, up-right, down-left, down-right. From the border it is put
    back into the centre at once, and a target it reached is gone. The reward of a step is
    1 - (moves from where it went to the nearest remaining target) / distance, in [-1, 1]. An
    episode has num_targets * distance steps, just enough for all. `info["score"]` is the share of
    targets reached so far.

    Observations are float32 (side, side): -1 the agent, 1 a target, 0 nothing.

    Attributes:
        distance: distance from the centre to the border, at least 1.
        num_targets: number of targets, drawn anew each episode from the 8 * distance border tiles;
            None: all of them.
    """

    distance: int = 3
    num_targets: int | None = None

    action_space: ClassVar[Discrete] = Discrete(len(_MOVES))

    def __post_init__(self) -> None:
        if self.distance < 1:
            raise ValueError(f"distance must be at least 1; got {self.distance}")
        if not 1 <= self._count <= 8 * self.distance:
            raise ValueError(
                f"num_targets must be 1 to {8 * self.distance}, the border tiles at distance "
                f"{self.distance}; got {self.num_targets}"
            )

    @property
    def observation_space(self) -> Box:
        """Box (side, side), float32."""
        return Box(-1.0, 1.0, (self._side, self._side))

    @property
    def best_return(self) -> float:
        """The return of a policy that always walks straight to a target."""
        return self._count * (self.distance + 1) / 2

    @property
    def _side(self) -> int:
        return 2 * self.distance + 1

    @property
    def _count(self) -> int:
        return 8 * self.distance if self.num_targets is None else self.num_targets

    def reset(self, key: PRNGKeyArray) -> tuple[Array, SquaredState]:
        """Random targets, the agent in the centre."""
        border = np.ones((self._side, self._side), bool)
        border[1:-1, 1:-1] = False
        targets = jnp.asarray(border)
        if self._count < 8 * self.distance:
            draw = jax.random.uniform(random.fast(key), (8 * self.distance,), jnp.float32)
            chosen = jax.lax.top_k(draw, self._count)[1]
            rows, columns = jnp.asarray(np.argwhere(border).T)
            targets = jnp.zeros(border.shape, bool).at[rows[chosen], columns[chosen]].set(True)
        state = SquaredState(jnp.full(2, self.distance, jnp.int32), targets, jnp.int32(0))
        return self._observation(state), state

    def step(self, key: PRNGKeyArray, state: SquaredState, action: ArrayLike) -> Transition:
        """Move; `key` is not used."""
        row, column = position = state.position + jnp.asarray(_MOVES)[action]
        tiles = jnp.arange(self._side)
        moves = jnp.maximum(jnp.abs(tiles - row)[:, None], jnp.abs(tiles - column))
        nearest = jnp.where(state.targets, moves, 2 * self.distance).min()
        targets = state.targets.at[row, column].set(False)
        at_border = jnp.abs(position - self.distance).max() >= self.distance
        state = SquaredState(
            jnp.where(at_border, self.distance, position), targets, state.steps + 1
        )
        reward = 1 - nearest.astype(jnp.float32) / self.distance
        terminated = state.steps >= self._count * self.distance
        score = (self._count - targets.sum(dtype=jnp.float32)) / self._count
        return (
            self._observation(state),
            state,
            reward,
            terminated,
            jnp.bool_(False),
            {"score": score},
        )

    def render(self, state: SquaredState) -> str:
        """The grid as text: @ the agent, x a target, . nothing."""
        tiles = np.where(np.asarray(state.targets), "x", ".")
        tiles[tuple(np.asarray(state.position))] = "@"
        return "\n".join(" ".join(row) for row in tiles)

    def _observation(self, state: SquaredState) -> Array:
        grid = state.targets.astype(jnp.float32)
        return grid.at[state.position[0], state.position[1]].set(-1)


class MemoryState(NamedTuple):
    """The digits to repeat, the steps taken, and how many answers were right."""

    digits: Int[Array, "length"]
    steps: Int[Array, ""]
    right: Int[Array, ""]


@dataclass(frozen=True)
class Memory:
    """Repeat a sequence of digits after a delay; without memory, one can only guess.

    An episode shows `length` digits one by one, then nothing for `delay` steps, then asks for
    the digits in order, `length` steps. Each right answer gives 1; other actions do nothing.
    `info["score"]` is the share of the digits repeated so far.

    Observations are float32 (digits + 1,): the digit shown as a one-hot vector, and a last
    number that is 1 while an answer is asked for.

    Attributes:
        length: length of the sequence, at least 1.
        delay: steps between the last digit and the first answer, at least 0.
        digits: number of digits to choose from, at least 2.
    """

    length: int = 3
    delay: int = 2
    digits: int = 2

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("delay", 0), ("digits", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")

    @property
    def observation_space(self) -> Box:
        """Box (digits + 1,), float32."""
        return Box(0.0, 1.0, (self.digits + 1,))

    @property
    def action_space(self) -> Discrete:
        """The digit to answer."""
        return Discrete(self.digits)

    @property
    def best_return(self) -> float:
        """The return of every answer right."""
        return float(self.length)

    @property
    def memoryless_return(self) -> float:
        """What guessing gets on average."""
        return self.length / self.digits

    @property
    def _asks_from(self) -> int:
        return self.length + self.delay

    def reset(self, key: PRNGKeyArray) -> tuple[Array, MemoryState]:
        """Random digits, the first of them shown."""
        digits = jax.random.randint(random.fast(key), (self.length,), 0, self.digits, jnp.int32)
        state = MemoryState(digits, jnp.int32(0), jnp.int32(0))
        return self._observation(state), state

    def step(self, key: PRNGKeyArray, state: MemoryState, action: ArrayLike) -> Transition:
        """Count the answer if one was asked for; `key` is not used."""
        asked = state.steps - self._asks_from
        right = (asked >= 0) & (state.digits[jnp.maximum(asked, 0)] == jnp.asarray(action))
        state = MemoryState(state.digits, state.steps + 1, state.right + right)
        return (
            self._observation(state),
            state,
            right.astype(jnp.float32),
            state.steps >= self._asks_from + self.length,
            jnp.bool_(False),
            {"score": state.right.astype(jnp.float32) / self.length},
        )

    def render(self, state: MemoryState) -> str:
        """The episode as text: digits shown, . pauses, ? answers; ^ is under the current step."""
        tape = [*map(str, np.asarray(state.digits)), *"." * self.delay, *"?" * self.length]
        steps = int(state.steps)
        caret = " " * len(" ".join([*tape[:steps], ""])) + "^"
        return f"{' '.join(tape)}\n{caret}\nright: {int(state.right)} of {self.length}"

    def _observation(self, state: MemoryState) -> Array:
        shown = state.digits[jnp.minimum(state.steps, self.length - 1)]
        digit = jnp.where(state.steps < self.length, jax.nn.one_hot(shown, self.digits), 0)
        asks = state.steps >= self._asks_from
        return jnp.append(digit, asks).astype(jnp.float32)
