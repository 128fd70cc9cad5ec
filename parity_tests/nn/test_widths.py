"""Integers that JAX cannot hold without x64 are refused by their bounds, wherever they come in."""

from types import SimpleNamespace

import gymnasium
import jax
import numpy as np
import pytest
from flax import nnx
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

import puffer_jax
from puffer_jax.base import spaces as ours
from puffer_jax.environments import emulation
from puffer_jax.nn.widths import check_widths
from puffer_jax.ppo.host.envs import as_host_env

WIDE = [
    Box(0, 2**31, (2,), np.int64),
    Box(-(2**31) - 1, 0, (2,), np.int64),
    Box(0, 2**32, (2,), np.uint64),
    Box(np.array([0, 0]), np.array([1, 2**31 + 5]), dtype=np.int64),
    Discrete(2**40),
    Discrete(3, start=2**31 - 2),
    MultiDiscrete([3, 2**31 + 1]),
    Dict({"a": Discrete(2), "b": Tuple((Box(0, 2**40, (), np.int64), Discrete(2)))}),
    ours.Box(-np.inf, np.inf, (2,), np.int64),
]
FITTING = [
    Box(-(2**31), 2**31 - 1, (2,), np.int64),
    Box(0, 2**32 - 1, (2,), np.uint64),
    Box(-np.inf, np.inf, (2,), np.float64),
    Box(0, 2**32 - 1, (2,), np.uint32),
    Discrete(2**31),
    Discrete(3, start=-(2**31)),
    MultiDiscrete([3, 2**31]),
    Dict({"a": Discrete(2), "b": Box(-5, 5, (), np.int64)}),
]
ACTIONS = Discrete(2)


@pytest.mark.parametrize("space", WIDE + FITTING, ids=str)
def test_bounds_beyond_32_bits(space):
    envs = [
        SimpleNamespace(observation_space=space, action_space=ACTIONS),
        SimpleNamespace(single_observation_space=space, single_action_space=ACTIONS),
    ]
    for env in envs:
        check_widths(env)  # with x64
        with jax.enable_x64(False):
            if any(space is fitting for fitting in FITTING):  # Boxes are equal if close
                check_widths(env)
                continue
            with pytest.raises(ValueError, match=r"beyond 32 bits.*jax_enable_x64"):
                check_widths(env)


class Large(gymnasium.Env):
    """What it shows is not in int32."""

    observation_space = Dict({"a": Box(0, 2**40, (1,), np.int64), "b": Box(0, 1, (1,))})
    action_space = ACTIONS


class Pair:
    """The same of PettingZoo's kind."""

    possible_agents = ["a", "b"]  # noqa: RUF012

    def observation_space(self, agent):
        return Large.observation_space

    def action_space(self, agent):
        return ACTIONS


class InTuple(Large):
    """A policy sees the bytes of a Tuple, which do not wrap."""

    observation_space = Tuple((Large.observation_space["a"], Box(0, 1, (1,))))


class InJax:
    """The same in JAX."""

    observation_space = Large.observation_space["a"]
    action_space = ACTIONS

    def reset(self, key):
        return jax.numpy.zeros(1, int), 0

    def step(self, key, state, action):
        return jax.numpy.zeros(1, int), 0, 0.0, False, False, {}


def test_where_they_come_in():
    emulated = emulation.GymnasiumPufferEnv(Large())
    with jax.enable_x64(False), puffer_jax.vector.make(Large, num_envs=2) as vecenv:
        for use in (
            lambda: puffer_jax.Default(emulated, rngs=nnx.Rngs(0)),
            lambda: puffer_jax.MLP(Large(), rngs=nnx.Rngs(0)),
            lambda: check_widths(emulation.PettingZooPufferEnv(Pair())),
            lambda: as_host_env(gymnasium.vector.SyncVectorEnv([Large])),
            lambda: as_host_env(vecenv),
            lambda: puffer_jax.as_jax_env(InJax()),
        ):
            with pytest.raises(ValueError, match=r"beyond 32 bits.*Box\(0, 1099511627776"):
                use()
        check_widths(emulation.GymnasiumPufferEnv(InTuple()))


def test_actions_that_start_beyond_32_bits():
    space = Discrete(3, start=2**31 - 2)
    actions = np.arange(3, dtype=np.int32)
    assert puffer_jax.playable(actions, space).tolist() == [2**31 - 2, 2**31 - 1, 2**31]
    with pytest.raises(ValueError, match="goes beyond int32"):
        jax.jit(lambda x: puffer_jax.playable(x, space))(actions)
