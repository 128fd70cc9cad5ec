"""Environments on the host: statistics of their episodes, infos of any kind, interruptions."""

import decimal
import fractions

import gymnasium
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import RecordEpisodeStatistics, TransformReward
from gymnasium.wrappers import vector as of_vectors
from support.vector_envs import Pair, Tick

import puffer_jax
from puffer_jax.base.profile import Profile
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.host.envs import as_host_env
from puffer_jax.ppo.host.rollout import HostSource
from puffer_jax.ppo.host.stats import collect, number

MODES = gymnasium.vector.AutoresetMode


class Steps(gymnasium.Env):
    """Episodes of so many steps, each worth 1, with an info of its own."""

    observation_space = Box(-1, 1, (1,))
    action_space = Discrete(2)

    def __init__(self, length, info=None):
        self.length, self.info = length, info or {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.taken += 1
        return np.zeros(1, np.float32), 1.0, self.taken == self.length, False, dict(self.info)


def tenth(env):
    return TransformReward(env, lambda reward: reward / 10)


RECORDERS = {  # what wraps each environment, what wraps their vector, the return of 3 steps
    "none": (tenth, lambda envs: envs, 0.3),
    "each": (lambda env: tenth(RecordEpisodeStatistics(env)), lambda envs: envs, 3.0),
    "all": (tenth, of_vectors.RecordEpisodeStatistics, 0.3),
    "all_inside": (
        lambda env: env,
        lambda envs: of_vectors.TransformReward(
            of_vectors.RecordEpisodeStatistics(envs), lambda rewards: rewards / 10
        ),
        3.0,
    ),
}


def told_by(host, steps):
    """The statistics of so many steps."""
    host.async_reset(0)
    told = {"episode_return": [], "episode_length": []}
    for _ in range(steps):
        for name, values in host.recv().stats.items():
            told.setdefault(name, []).extend(values)
        host.send(np.zeros(host.num_agents, int))
    return told


@pytest.mark.parametrize("name", RECORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_the_same_in_every_mode(mode, name):
    each, together, value = RECORDERS[name]
    lengths = (3, 4)  # so that one ends in the midst of the other
    envs = gymnasium.vector.SyncVectorEnv(
        [lambda length=length: each(Steps(length)) for length in lengths], autoreset_mode=mode
    )
    told = told_by(as_host_env(together(envs)), 26)
    assert set(told["episode_length"]) == {3, 4} and len(told["episode_length"]) >= 11
    assert told["episode_return"] == pytest.approx(
        [length * value / 3 for length in told["episode_length"]]
    )


def test_statistics_are_the_same_in_our_vecenvs():
    for each, _, value in list(RECORDERS.values())[:2]:
        with puffer_jax.vector.make(lambda each=each: each(Steps(3)), num_envs=2) as vecenv:
            told = told_by(as_host_env(vecenv), 10)
        assert told["episode_length"] == [3] * 4
        assert told["episode_return"] == pytest.approx([value] * 4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "episode", [{"r": 1}, {"l": 2}, {"r": "x"}, {"r": None, "l": [1, 2]}, {}, 3]
)
def test_what_a_recorder_leaves_out_is_counted(episode, mode):
    envs = gymnasium.vector.SyncVectorEnv(
        [lambda: Steps(3, {"episode": episode})] * 2, autoreset_mode=mode
    )
    told = told_by(as_host_env(envs), 8)
    is_told = isinstance(episode, dict) and isinstance(episode.get("r"), int)
    assert set(told["episode_return"]) == {1 if is_told else 3.0}
    assert set(told["episode_length"]) == {2 if episode == {"l": 2} else 3}


def test_who_is_absent_ends_no_episodes():
    """The agent c leaves after three steps; the others stay until the end."""
    with puffer_jax.vector.make(Pair, num_envs=1) as vecenv:
        told = told_by(as_host_env(vecenv), 200)
    lengths = told["episode_length"]
    assert 30 < len(lengths) < 40 and lengths.count(3) >= 12
    assert 1 not in lengths and 0 not in told["episode_return"]


class Odd:
    """Fits nowhere."""

    @property
    def shape(self):
        raise RuntimeError("no")


NUMBERS = [True, 2, 2.5, np.bool_(True), np.int8(3), np.float16(0.5), np.array(4), np.array(True)]
NUMBERS += [jnp.array(1.5), jnp.bfloat16(1.5), ml_dtypes.bfloat16(1.5), fractions.Fraction(1, 2)]
NUMBERS += [decimal.Decimal("0.25"), np.longdouble(2)]
NO_NUMBERS = ["3", b"3", None, 1j, np.complex64(1), np.datetime64("2026-01-01"), object(), Odd()]
NO_NUMBERS += [np.array("x"), np.array(None), 10**400, [[1], [2, 3]], {1}, np.zeros((84, 84, 3))]
NO_NUMBERS += [np.zeros(65), [0] * 65, np.zeros((2, 2)), np.timedelta64(3, "s"), {}]


def test_infos_are_numbers_or_nothing():
    for value in NUMBERS:
        assert type(number(value)) is float and number(value) == float(value), value
        assert collect([{"a": {"b": value}}], 1) == {"a/b": [float(value)]}
    for value in NO_NUMBERS:
        assert number(value) is None, value
        assert collect([{"a": value, 3: 1}], 1) == {"3": [1.0]}, value
    # Lists are extended, as in the reference; so is what comes for each agent.
    assert collect([{"a": [1, "x", np.bool_(False)]}, {"a": np.ones(2)}], 1) == {"a": [1, 0, 1, 1]}
    assert collect([{"a": np.ones(65)}], 65) == {"a": [1] * 65}
    itself = {"x": 1}
    itself["itself"] = itself
    assert collect([itself], 1)["x"] == [1]
    for infos in (None, [None], [3, [4], "x"], {"a": 1}, ({"a": 1},)):
        assert collect(infos, 1) in ({}, {"a": [1.0]})


def test_infos_of_any_kind_end_no_training():
    """Through the vecenv; what is no mapping at all included."""
    many = {str(i): value for i, value in enumerate([*NUMBERS, *NO_NUMBERS])}

    class Infos(Steps):
        def step(self, action):
            info = (many, None, np.zeros(2), "x", [3])[self.taken % 5]
            return *super().step(action)[:4], info

    with puffer_jax.vector.make(lambda: Infos(9), num_envs=2) as vecenv:
        told = told_by(as_host_env(vecenv), 12)
    assert told["episode_length"] == [9, 9]
    assert sorted(told.keys() - {"episode_return", "episode_length"}, key=int) == [
        str(i) for i in range(len(NUMBERS))
    ]


class Count(Tick):
    """Shows a number from its seed and its step; Ctrl-C comes in the step that it is told."""

    interrupted = None

    def step(self, action):
        if self.steps + 1 == Count.interrupted:
            Count.interrupted = None
            raise KeyboardInterrupt
        return super().step(action)


class Same(nnx.Module):
    """Does the same everywhere, and counts its steps in its state."""

    hidden_size, is_continuous = 1, False

    def __init__(self):
        self.weight = nnx.Param(jnp.zeros(()))

    def initial_state(self, batch_size):
        return {"steps": jnp.zeros((batch_size, 1))}

    def forward_eval(self, observations, state):
        state = {"steps": state["steps"] + 1}
        return jnp.zeros((len(observations), 2)) + self.weight[...], state["steps"], state


VECENVS = {
    "serial": lambda: puffer_jax.vector.make(Count, num_envs=2),
    "turns": lambda: puffer_jax.vector.make(Count, num_envs=2, num_buffers=2),
    "workers": lambda: puffer_jax.vector.make(
        Tick, num_envs=2, backend="Multiprocessing", num_workers=2, overwork=True
    ),
    "gymnasium": lambda: gymnasium.vector.SyncVectorEnv([Count] * 2),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", VECENVS)
def test_an_interrupted_rollout_leaves_nothing_behind(kind, monkeypatch):
    config = PuffeRLConfig.from_dict(
        {"bptt_horizon": 4, "batch_size": 8, "minibatch_size": 8, "total_timesteps": 10**6}
        | {"store_initial_state": True}
    )
    envs, policy = VECENVS[kind](), Same()
    host = as_host_env(envs)
    source = HostSource(config, host, policy, Profile())
    stream, params = source.init(jax.random.key(9)), puffer_jax.split(policy)[1]
    seeds = []
    for i in range(3):
        key = jax.random.key(i)
        if i:
            if kind == "workers":
                monkeypatch.setattr(host.vecenv, "_wait", interrupt)
            elif i == 1:
                Count.interrupted = 6
            else:  # between `recv` and `send`
                monkeypatch.setattr(host, "send", interrupt)
            with pytest.raises(KeyboardInterrupt):
                source.collect(params, stream, key)
            monkeypatch.undo()
        stream, experience, (steps, _) = source.collect(params, stream, key)
        assert steps == 8
        observations = np.asarray(experience.observations)
        np.testing.assert_array_equal(observations[..., 1], [[0, 1, 2, 3]] * 2)
        np.testing.assert_array_equal(experience.values, [[1, 2, 3, 4]] * 2)
        seeds.append(observations[0, 0, 0])
    assert len(set(seeds)) == 3
    envs.close()


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.usefixtures("quick")
def test_agents_that_did_not_play_are_named():
    config = {"bptt_horizon": 4, "batch_size": 12, "minibatch_size": 12, "total_timesteps": 1200}
    for use_mask, advice in (
        (False, "1 of 3: 2), and use_mask=False learns from them"),
        (True, ""),
    ):
        with puffer_jax.vector.make(Pair, num_envs=1) as vecenv:
            policy = puffer_jax.Default(vecenv, hidden_size=4, rngs=nnx.Rngs(0))
            given = PuffeRLConfig.from_dict(config | {"use_mask": use_mask})
            source = HostSource(given, as_host_env(vecenv), policy, Profile())
            stream = source.init(jax.random.key(0))
            source.collect(puffer_jax.split(policy)[1], stream, jax.random.key(1))
        assert advice in source.advice() and bool(advice) == bool(source.advice())


class Pool:
    """The interface of EnvPool, as far as the trainer may take it for another one's.

    Args:
        kind: "gymnasium", or "gym" as in older releases.
        batch: how many of its environments it hands out at once.
    """

    def __init__(self, kind, batch=2):
        self.observation_space, self.action_space = Box(-1, 1, (1,)), Discrete(2)
        self.batch = batch
        if kind == "gymnasium":
            self.num_envs = 2
            self.metadata = {"autoreset_mode": MODES.NEXT_STEP}
            self.single_observation_space = self.observation_space
            self.single_action_space = self.action_space

    def async_reset(self): ...
    def recv(self): ...
    def send(self, action, env_id=None): ...

    def reset(self, *, seed=None, options=None):
        self.taken = 0
        return np.zeros((self.batch, 1), np.float32), {"env_id": np.arange(self.batch)}

    def step(self, action):
        assert action.dtype == np.int32
        self.taken = (self.taken + 1) % 4  # the fourth is a reset
        ended = np.full(2, self.taken == 3)
        rewards = np.full(2, float(self.taken > 0))
        obs = np.zeros((self.batch, 1), np.float32)
        return obs, rewards, ended, ~ended & False, {"elapsed_step": np.full(2, self.taken)}


def test_envpools_are_gymnasiums_or_an_error():
    host = as_host_env(Pool("gymnasium"))
    host.async_reset(0)
    lengths = []
    for _ in range(9):
        lengths += host.recv().stats.get("episode_length", [])
        host.send(np.zeros(2, np.int32))
    assert lengths == [3] * 4
    with pytest.raises(TypeError, match=r"Pool has.*num_agents.*env_type=.gymnasium"):
        as_host_env(Pool("gym"))
    with pytest.raises(ValueError, match=r"handed out 1 of 2 environments.*batch_size"):
        as_host_env(Pool("gymnasium", batch=1)).async_reset(0)


def test_a_step_is_one_program_and_the_devices_arrays_stay_there():
    envs = gymnasium.vector.SyncVectorEnv([lambda: Steps(3)] * 2)
    policy = puffer_jax.Default(envs, 4, rngs=nnx.Rngs(0))
    config = PuffeRLConfig(num_envs=2, batch_size=16, bptt_horizon=8, minibatch_size=8)
    source = HostSource(config, as_host_env(envs), policy, Profile())
    params, step, steps = puffer_jax.split(policy)[1], source.step, []

    def counted(params, state, *inputs):
        # The only things that go to the device in a step, and at once.
        steps.append(jax.device_put(inputs))
        with jax.transfer_guard_host_to_device("disallow"):
            return step(params, state, *steps[-1])

    source.step = counted
    stream = source.init(jax.random.key(0))
    key = jax.random.key(1)
    source._keys(key)
    finish = source._finish

    def unguarded(*inputs):
        with jax.transfer_guard_host_to_device("allow"):
            return finish(*inputs)

    source._finish = unguarded
    with jax.transfer_guard_host_to_device("disallow"):
        source.collect(params, stream, key)
    assert len(steps) == 8
    assert step._cache_size() == finish._cache_size() == source._keys._cache_size() == 1


def test_nothing_is_transferred_in_an_epoch_of_jax_native_environments(quick):
    env = puffer_jax.environments.make("cartpole")
    policy = puffer_jax.Default(env, 4, rngs=nnx.Rngs(0))
    sizes = {"batch_size": 16, "bptt_horizon": 8, "minibatch_size": 8}
    config = PuffeRLConfig(num_envs=2, total_timesteps=16, **sizes)
    train = jax.jit(puffer_jax.make_train(config, env, policy))
    key = jax.random.key(0)
    with jax.transfer_guard("disallow"):
        train(key)
