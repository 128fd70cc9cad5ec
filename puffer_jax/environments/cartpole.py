"""CartPole-v1 as in gymnasium, JAX-native."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base.spaces import Box, Discrete
from puffer_jax.environments.jax_native import Transition
from puffer_jax.nn import random

_GRAVITY = 9.8
_POLE_MASS = 0.1
_TOTAL_MASS = 1.0 + _POLE_MASS
_HALF_LENGTH = 0.5
_FORCE = 10.0
_TAU = 0.02
_MAX_X = 2.4
_MAX_THETA = 12 * 2 * math.pi / 360


class CartPoleState(NamedTuple):
    """Position and velocity of the cart, angle and angular velocity of the pole, and time."""

    x: Array
    x_dot: Array
    theta: Array
    theta_dot: Array
    steps: Array


@dataclass(frozen=True)
class CartPole:
    """Gymnasium's CartPole-v1: the explicit Euler method, in steps of 0.02 s.

    Observations are float32 (x, x_dot, theta, theta_dot); actions push left (0) or right (1);
    each step gives 1. Terminated when |x| > 2.4 or |theta| > 12 degrees, truncated at the limit,
    possibly both at once, as in gymnasium.

    Attributes:
        max_steps: number of steps after which an episode is truncated.
        dtype: dtype of the physics; gymnasium's is float64, which here needs x64 mode.
    """

    max_steps: int = 500
    dtype: DTypeLike = jnp.float32

    observation_space: ClassVar[Box] = Box(
        low=(-2 * _MAX_X, -np.inf, -2 * _MAX_THETA, -np.inf),
        high=(2 * _MAX_X, np.inf, 2 * _MAX_THETA, np.inf),
        shape=(4,),
    )
    action_space: ClassVar[Discrete] = Discrete(2)

    def reset(self, key: PRNGKeyArray) -> tuple[Array, CartPoleState]:
        """All four numbers uniform in +-0.05."""
        values = jax.random.uniform(random.fast(key), (4,), self.dtype, -0.05, 0.05)
        state = CartPoleState(*values, steps=jnp.int32(0))
        return _observation(state), state

    def step(self, key: PRNGKeyArray, state: CartPoleState, action: ArrayLike) -> Transition:
        """One step of 0.02 s; `key` is not used."""
        x, x_dot, theta, theta_dot, steps = state
        force = jnp.where(action == 1, _FORCE, -_FORCE).astype(x.dtype)
        cos, sin = jnp.cos(theta), jnp.sin(theta)
        pole = _POLE_MASS * _HALF_LENGTH
        push = (force + pole * theta_dot**2 * sin) / _TOTAL_MASS
        inertia = _HALF_LENGTH * (4 / 3 - _POLE_MASS * cos**2 / _TOTAL_MASS)
        theta_acc = (_GRAVITY * sin - cos * push) / inertia
        x_acc = push - pole * theta_acc * cos / _TOTAL_MASS
        state = CartPoleState(
            x=x + _TAU * x_dot,
            x_dot=x_dot + _TAU * x_acc,
            theta=theta + _TAU * theta_dot,
            theta_dot=theta_dot + _TAU * theta_acc,
            steps=steps + 1,
        )
        terminated = (jnp.abs(state.x) > _MAX_X) | (jnp.abs(state.theta) > _MAX_THETA)
        truncated = state.steps >= self.max_steps
        return _observation(state), state, jnp.float32(1), terminated, truncated, {}


def _observation(state: CartPoleState) -> Array:
    return jnp.stack(state[:4]).astype(jnp.float32)
