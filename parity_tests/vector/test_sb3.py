"""Our vecenvs behind Stable-Baselines3's interface give what its own give, step by step."""

import sys
from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from support.vector_envs import Ends, Modules, Native, Pair, Tick, Together, Walk

import puffer_jax
import puffer_jax.sb3
from puffer_jax import vector

WORKERS = {"backend": "Multiprocessing", "num_workers": 2, "overwork": True}


PARTS = {"camera": Box(0, 255, (4, 4, 1), np.uint8), "gear": Discrete(5), "speed": Box(-1, 1, (2,))}
CREATORS = {
    "cartpole": partial(gymnasium.make, "CartPole-v1", max_episode_steps=15),
    "dict": partial(Ends, Dict(PARTS)),
    "pixels": partial(Ends, Box(0, 255, (8, 8, 1), np.uint8)),
}


def equal(ours, theirs):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        return [equal(ours[name], theirs[name]) for name in theirs]
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cartpole", {}),
        ("dict", {}),
        ("pixels", {}),
        ("cartpole", WORKERS),
        ("dict", WORKERS | {"local_worker": True}),
    ],
)
def test_every_step_is_what_sb3s_own_gives(name, options):
    ours = puffer_jax.sb3.VecEnv(vector.make(CREATORS[name], num_envs=4, **options))
    theirs = DummyVecEnv([lambda: Monitor(CREATORS[name]())] * 4)
    assert ours.observation_space == theirs.observation_space
    assert (ours.action_space, ours.num_envs) == (theirs.action_space, 4)
    assert ours.seed(3) == theirs.seed(3)
    equal(ours.reset(), theirs.reset())
    assert ours.reset_infos == theirs.reset_infos
    actions, cuts, ends = np.random.default_rng(0), 0, 0
    for _ in range(200):
        action = actions.integers(ours.action_space.n, size=4)
        *mine, infos = ours.step(action)
        *right, expected = theirs.step(action)
        for value, other in zip(mine, right, strict=True):
            equal(value, other)
        for info, other in zip(infos, expected, strict=True):
            assert info.keys() == other.keys()
            for key in other.keys() - {"episode"}:
                equal(info[key], other[key])
            if "episode" in other:
                assert info["episode"].pop("t") > 0 < other["episode"].pop("t")
                assert info["episode"] == other["episode"]
            cuts += other["TimeLimit.truncated"]
        ends += right[2].sum()
        assert ours.reset_infos == theirs.reset_infos
    assert cuts > 5 and ends > cuts + 5
    equal(ours.reset(), theirs.reset())  # in the middle of episodes, and without a seed
    for env in (ours, theirs):
        env.close()


@pytest.mark.parametrize("options", [{}, WORKERS], ids=["serial", "workers"])
def test_environments_can_be_reached(options):
    env = puffer_jax.sb3.VecEnv(vector.make(CREATORS["pixels"], num_envs=2, **options))
    env.reset()
    env.step([2, 1])
    assert env.get_attr("last") == [2, 1] and env.get_attr("last", 1) == [1]
    env.set_attr("last", 0, [0])
    assert env.env_method("action_masks", indices=0)[0].tolist() == [False, True, True]
    assert is_masking_supported(env) and get_action_masks(env).shape == (2, 3)
    assert not env.has_attr("lost") and not env.get_images()[0].any()
    assert env.render("rgb_array").shape == (4, 2, 3)
    assert env.env_is_wrapped(Monitor) == [True, True]  # what it is asked for
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False, False]
    with pytest.raises(NotImplementedError, match=r"resets without options; got \{'a': 1\}"):
        env.set_options({"a": 1})
    env.close()
    env = puffer_jax.sb3.VecEnv(vector.make(CREATORS["cartpole"], num_envs=2, **options))
    assert env.env_is_wrapped(gymnasium.wrappers.TimeLimit) == [True, True]
    assert env.get_attr("gravity") == [9.8, 9.8]  # of what is wrapped
    env.close()


def test_workers_load_no_sb3():
    env = puffer_jax.sb3.VecEnv(vector.make(Modules, num_envs=2, **WORKERS))
    env.env_is_wrapped(gymnasium.Wrapper)
    env.reset()
    for info in env.step([0, 0])[3]:
        assert not {"torch", "stable_baselines3", "jax"} & set(info["modules"])
    env.close()


class Odd(gymnasium.Env):
    """Shows how many bits of the action were set, from -1 on."""

    observation_space = Discrete(4, start=-1)
    action_space = MultiBinary(3)

    def reset(self, *, seed=None, options=None):
        return np.int64(-1), {"is_success": 1, "mine": 2}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.int64(action.sum()) - 1, 0.5, bool(action.all()), False, {}


def test_spaces_that_sb3_refuses_become_others():
    env = puffer_jax.sb3.VecEnv(vector.make(Walk, num_envs=2))
    names = {"place": (2, 2), "seen/0": (2,), "seen/1": (2, 3)}
    assert {name: x.shape for name, x in env.reset().items()} == names
    assert [*env.observation_space.spaces] == [*names]
    assert env.observation_space["seen/0"] == Discrete(5)
    assert env.action_space == MultiDiscrete([3, 2, 4])
    assert env.observation_space.contains(
        {k: x[0] for k, x in env.step([[0, 1, 3]] * 2)[0].items()}
    )
    env = puffer_jax.sb3.VecEnv(vector.make(Odd, num_envs=2))
    assert (env.observation_space, env.action_space) == (Discrete(4), MultiBinary(3))
    assert env.reset().tolist() == [0, 0]
    obs, _, dones, infos = env.step(np.array([[1, 0, 1], [1, 1, 1]], np.float32))
    assert obs.tolist() == [2, 0] and dones.tolist() == [False, True]
    assert infos[1]["terminal_observation"] == 3
    assert env.reset_infos[1] == {"is_success": 1, "mine": 2}
    clash = {"a": Dict({"b": Box(0, 1)}), "a/b": Box(0, 1)}
    with pytest.raises(ValueError, match="several parts have the same path, of a/b, a/b"):
        puffer_jax.sb3.VecEnv(vector.make(partial(Ends, Dict(clash))))


def test_agents_are_rows():
    env = puffer_jax.sb3.VecEnv(vector.make(Together, num_envs=2))
    assert env.num_envs == 4 and env.reset().shape == (4, 2, 3)
    first, _, dones, infos = env.step([0, 1, 2, 0])
    assert dones.all() and all(info["episode"]["l"] == 1 for info in infos)
    assert not np.array_equal(first[0], infos[0]["terminal_observation"])
    env = puffer_jax.sb3.VecEnv(vector.make(Pair, num_envs=2, **WORKERS))
    env.reset()
    with pytest.raises(ValueError, match="in environment 0, a goes on, b goes on, c has ended"):
        for _ in range(3):
            env.step([0] * 6)
    env.close()


def test_native_environments_tell_no_last_observation():
    env = puffer_jax.sb3.VecEnv(vector.make(Native, num_envs=2))
    env.seed(0)
    assert env.reset().shape == (4, 3) and env.render_mode is None
    ended = []
    for _ in range(40):
        obs, _, dones, infos = env.step(np.zeros((4, 2), np.float32))
        ended += [info for info, done in zip(infos, dones, strict=True) if done]
        assert [info.get("ended") for info in infos][1::2] == [None, None]
        assert [info.get("ended") for info in infos][::2] == [d or None for d in dones[::2]]
    assert len(ended) > 3 and obs.dtype == np.float32
    for info in ended:
        assert info["episode"]["l"] >= 1 and "terminal_observation" not in info


@pytest.mark.usefixtures("quick")
def test_jax_native_environments():
    env = puffer_jax.as_jax_env(puffer_jax.environments.make("cartpole"), max_steps=9)
    env = puffer_jax.sb3.VecEnv(vector.JaxVecEnv(env, num_envs=3))
    env.seed(0)
    before, lengths, seen = env.reset(), np.zeros(3, int), [0, 0]
    for _ in range(40):
        obs, _, dones, infos = env.step(np.ones(3, int))  # falls after about nine steps
        lengths += 1
        for row, info in enumerate(infos):
            assert ("episode" in info) == ("terminal_observation" in info) == dones[row]
            if dones[row]:
                last, cut = info["terminal_observation"], info["TimeLimit.truncated"]
                assert info["episode"]["l"] == info["episode"]["r"] == lengths[row]
                assert np.abs(obs[row]).max() <= 0.05 < np.abs(last).max()
                assert cut == (lengths[row] == 9 and abs(last[2]) < 0.2095)
                lengths[row], seen[cut] = 0, seen[cut] + 1
            else:
                assert not np.array_equal(obs[row], before[row])
        before = obs
    assert min(seen) > 0
    assert env.get_attr("render_mode") == [None] * 3
    assert env.env_is_wrapped(Monitor) == [True] * 3
    for call in (partial(env.set_attr, "a", 1), partial(env.env_method, "a")):
        with pytest.raises(NotImplementedError, match=r"'a'\): JAX-native environments are pure"):
            call()


def test_sb3_learns_from_it():
    """And finds in the infos what it reports; wrapped in its own wrappers, too."""
    env = VecNormalize(puffer_jax.sb3.VecEnv(vector.make(CREATORS["cartpole"], num_envs=2)))
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu")
    model.learn(64)
    lengths = [episode["l"] for episode in model.ep_info_buffer]
    assert lengths and max(lengths) <= 15
    mean, _ = evaluate_policy(model, env, 4)  # warns where there is no Monitor
    assert 5 < mean <= 15
    stacked = partial(Ends, Dict({"speed": PARTS["speed"]}))
    env = VecFrameStack(puffer_jax.sb3.VecEnv(vector.make(stacked, num_envs=2)), 2)
    model = PPO("MultiInputPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu")
    model.learn(32)
    assert len(model.ep_success_buffer) == len(model.ep_info_buffer) > 0


def test_what_it_refuses(monkeypatch):
    with pytest.raises(TypeError, match=r"takes what puffer_jax.vector.make makes.*VectorEnv"):
        puffer_jax.sb3.VecEnv(gymnasium.make_vec("CartPole-v1"))
    with pytest.raises(ValueError, match="batches of 1 of 2: make it without batch_size"):
        puffer_jax.sb3.VecEnv(vector.make(Tick, num_envs=2, num_buffers=2))
    assert "sb3" not in puffer_jax.__all__  # since it may be missing
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    for name in ("puffer_jax.sb3", "puffer_jax.vector.sb3"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(puffer_jax, "sb3", raising=False)
    with pytest.raises(ImportError, match=r"sb3 needs .*pip install 'puffer_jax\[sb3\]'"):
        _ = puffer_jax.sb3
