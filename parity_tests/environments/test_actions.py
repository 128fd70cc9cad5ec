"""What a policy chooses, as environments accept it: `playable`, and that the trainer plays it."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

import puffer_jax
from puffer_jax.base import spaces as ours
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.host.rollout import HostSource
from puffer_jax.ppo.jax_rollout import JaxSource

pytestmark = pytest.mark.usefixtures("quick")
INF = np.inf
SPACES = {
    "wide": (Box(-2, 2, (3,)), [-5, 0.1, 5], [-2, 0.1, 2]),
    # 0.1 is not in float32, and its nearest one is above.
    "double": (Box(-0.1, 0.1, (3,), np.float64), [-5, 0.1, 0.05], None),
    "half": (Box(-0.1, 0.1, (3,), np.float16), [-1e30, 0.1, 0.05], None),
    "one_sided": (
        Box(np.array([0, -INF, 1]), np.array([INF, 1, 1]), dtype=np.float64),
        [-1] * 3,
        None,
    ),
    "free": (Box(-INF, INF, (3,)), [-5e30, 0, 5], [-5e30, 0, 5]),
    "largest": (Box(-1e308, 1e308, (2,), np.float64), [-3e38, 3], None),
    "discrete": (Discrete(3, start=5), 2, 7),
    "below": (Discrete(3, start=-2), 0, -2),
    "from_0": (Discrete(3), 2, 2),
    "several": (MultiDiscrete([3, 2], start=[10, -1]), [2, 1], [12, 0]),
    "small": (MultiDiscrete(np.array([3, 2], np.int8), dtype=np.int8), [2, 1], [2, 1]),
}


@pytest.mark.parametrize("name", SPACES)
def test_playable_actions_are_in_the_space(name):
    space, action, expected = SPACES[name]
    dtype = np.float32 if isinstance(space, Box) else np.int32
    actions = np.broadcast_to(np.array(action, dtype), (4, *space.shape))  # read-only
    envs = [space, type("Env", (), {"action_space": space})()]
    envs.append(type("Vector", (), {"action_space": None, "single_action_space": space})())
    traced = jax.jit(lambda x: puffer_jax.playable(x, space))(actions)
    for env in envs:
        for given in (actions, jnp.asarray(actions)):
            played = puffer_jax.playable(given, env)
            assert type(played) is np.ndarray and played.shape == actions.shape
            assert all(action in space for action in played)
            if expected is not None:
                right = np.array(expected, space.dtype)
                np.testing.assert_array_equal(played, np.broadcast_to(right, actions.shape))
            played[...] = 0  # it may be written to
    assert isinstance(traced, jax.Array)
    assert all(np.asarray(action, space.dtype) in space for action in traced)
    if isinstance(space, Box):
        assert traced.dtype == space.dtype
        close = dict(rtol=1e-6) if space.dtype == np.float64 else {"rtol": 0}
        np.testing.assert_allclose(traced, puffer_jax.playable(actions, space), **close)
    else:
        np.testing.assert_array_equal(traced, puffer_jax.playable(actions, space))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Box(0, 9, (2,), np.uint8), "Box of integers .uint8.*MultiDiscrete"),
        (Box(-5, 5, (2,), np.int32), "Box of integers .int32.*MultiDiscrete"),
        (Box(-5, 5, (2,), np.int8), "Box of integers .int8"),
        (ours.Box(0, 1, (2,), bool), "Box of integers .bool"),
        (MultiBinary(3), "must be emulated"),
        (Dict({"a": Discrete(2)}), "must be emulated"),
    ],
)
def test_spaces_that_no_policy_plays_in(space, message):
    with pytest.raises(ValueError, match=message):
        puffer_jax.playable(np.zeros((4, 2), np.float32), space)
    if isinstance(space, Box):  # the trainer says so when it is built, on the host and in JAX
        envs = gymnasium.vector.SyncVectorEnv([lambda: Careful(space)] * 2)
        for env in (envs, Native(space)):
            with pytest.raises(ValueError, match=message):
                puffer_jax.PuffeRL(config(), env, Far(2, rngs=nnx.Rngs(0)))


class Far(nnx.Module):
    """Means of +-3 in a Box, and the last action of a Discrete."""

    hidden_size = 1

    def __init__(self, count, continuous=True, *, rngs):
        self.is_continuous, self.count = continuous, count
        self.weight = nnx.Param(jnp.zeros(()))

    def encode_observations(self, observations, state=None):
        return jnp.asarray(observations)

    def decode_actions(self, hidden):
        values = hidden * self.weight[...]
        if not self.is_continuous:
            last = jnp.where(jnp.arange(self.count) == self.count - 1, 0, -jnp.inf)
            return jnp.broadcast_to(last, (len(hidden), self.count)), values
        loc = jnp.where(jnp.arange(self.count) % 2, 3.0, -3.0).astype(jnp.float32)
        loc = jnp.broadcast_to(loc, (len(hidden), self.count))
        return puffer_jax.Normal(loc, jnp.ones_like(loc)), values

    def forward_eval(self, observations, state=None):
        return self.decode_actions(self.encode_observations(observations))

    forward = forward_eval


class Careful(gymnasium.Env):
    """Takes nothing but what is in its space, and writes to what it gets."""

    observation_space = Box(-1, 1, (1,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert action in self.action_space, action
        if isinstance(self.action_space, Box):
            at_bound = float((np.abs(action) > 0.0999999).all())
            np.clip(action, -0.01, 0.01, out=action)
        else:
            at_bound = float(action == 7)
        return np.zeros(1, np.float32), at_bound, False, False, {}


class Native:
    """The same in JAX: the reward says whether the action is in the space, and extreme."""

    observation_space = ours.Box(-1, 1, (1,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, key):
        return jnp.zeros(1), jnp.zeros(())

    def step(self, key, state, action):
        extreme = action == 7
        if isinstance(self.action_space, Box):
            low, high = jnp.float64(-0.1), jnp.float64(0.1)
            is_in = ((low <= action) & (action <= high)).all() & (action.dtype == jnp.float64)
            extreme = is_in & (jnp.abs(action) > 0.0999999).all()
        no = jnp.zeros((), bool)
        return jnp.zeros(1), state, extreme.astype(jnp.float32), no, no, {}


def config():
    return PuffeRLConfig.from_dict(
        {"bptt_horizon": 4, "minibatch_size": "auto", "total_timesteps": 10**6, "num_envs": 4}
        | {"batch_size": 16}
    )


@pytest.mark.parametrize("space", ["double", "discrete"])
@pytest.mark.parametrize("kind", ["raw", "serial", "turns", "jax", "jax_vecenv"])
def test_the_trainer_plays_what_is_playable(kind, space):
    space = SPACES[space][0]
    is_box = isinstance(space, Box)
    policy = Far(3, is_box, rngs=nnx.Rngs(0))
    make = lambda: Careful(space)  # noqa: E731
    profile = puffer_jax.run.trainer.Profile()
    if kind == "jax":
        source = JaxSource(config(), puffer_jax.as_jax_env(Native(space)), policy)
    else:
        if kind == "raw":
            envs = gymnasium.vector.SyncVectorEnv([make] * 4)
        elif kind == "jax_vecenv":
            envs = puffer_jax.vector.JaxVecEnv(Native(space), 4)
        else:
            envs = puffer_jax.vector.make(make, num_envs=4, num_buffers=2 if kind == "turns" else 1)
        host = puffer_jax.ppo.host.envs.as_host_env(envs)
        source = HostSource(config(), host, policy, profile)
    collect = jax.jit(source.collect) if source.pure else source.collect
    stream = source.init(jax.random.key(0))
    _, experience, _ = collect(puffer_jax.split(policy)[1], stream, jax.random.key(1))
    # What is stored is the policy's own.
    stored, rewards = np.asarray(experience.actions), np.asarray(experience.rewards)
    assert (
        (np.abs(stored).max() > 2 and stored.dtype == np.float32) if is_box else (stored == 2).all()
    )
    np.testing.assert_array_equal(rewards[:, 0], 0)
    outside = (np.abs(stored) > 0.1).all(-1)[:, :-1] if is_box else True
    np.testing.assert_array_equal(rewards[:, 1:] == 1, outside)
