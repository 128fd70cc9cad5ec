"""JAX-native environments: adapters, automatic resets, and the environments themselves."""

import functools
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from support.bars import relative_error

from puffer_jax import environments
from puffer_jax.base.spaces import Box, Dict, Discrete, MultiDiscrete, env_spec
from puffer_jax.environments import CartPole, Memory, ProbeMemory, Squared
from puffer_jax.environments.jax_native import AdaptedEnv, TimeLimited, as_jax_env, autoreset

pytestmark = pytest.mark.usefixtures("unoptimised")

KEY = jax.random.key(0)


def rollout(env, actions, key=KEY, envs=None):
    """`(first obs, Step)` stacked over time, in one jitted scan; over envs too where given."""
    adapted = as_jax_env(env)
    reset, step = adapted.reset, autoreset(adapted)

    def run(key):
        reset_key, key = jax.random.split(key)
        first, state = reset(reset_key)

        def one(carry, action):
            key, state = carry
            key, step_key = jax.random.split(key)
            out = step(step_key, state, action)
            return (key, out.state), out

        return first, jax.lax.scan(one, (key, state), actions)[1]

    if envs is not None:
        run, key = jax.vmap(run), jax.random.split(key, envs)
    return jax.device_get(jax.jit(run)(key))


class Counter:
    """Counts to `end`, then terminates; observation, count and reward are the same number."""

    observation_space = Box(0.0, 100.0, (1,))
    action_space = Discrete(2)

    def __init__(self, end=3):
        self.end = end

    def reset(self, key) -> Any:
        return jnp.zeros(1, jnp.float32), 0

    def step(self, key, state, action) -> Any:
        n = state + 1
        return jnp.full(1, n, jnp.float32), n, n * 1.0, n >= self.end, False, {"n": n}


# --- gymnax ----------------------------------------------------------------------------------


@pytest.mark.needs_gymnax
def test_gymnax_cartpole_is_truncated_at_its_limit_and_terminated_when_it_falls():
    import gymnax

    env, params = gymnax.make("CartPole-v1")
    adapted = as_jax_env(env, params.replace(max_steps_in_episode=10))
    spec = env_spec(adapted)
    assert spec.single_observation_space.shape == (4,)
    assert spec.single_action_space == Discrete(2)
    first, out = rollout(adapted, np.arange(50) % 2, envs=3)
    assert first.shape == (3, 4) and first.dtype == out.obs.dtype == np.float32  # x64 is on
    assert out.reward.dtype == np.float32 and out.terminated.dtype == out.truncated.dtype == bool
    assert (out.reward == 1).all() and not out.terminated.any()
    ends = np.arange(50) % 10 == 9
    assert (out.truncated == ends).all()
    # final_obs follows the observation before (x += 0.02 x_dot), obs is of a reset where one was.
    before = np.concatenate([first[:, None], out.obs[:, :-1]], 1)
    exact = before[..., 0] + 0.02 * before[..., 1].astype(np.float64)
    assert relative_error(out.final_obs[..., 0], exact) < 1e-6
    assert (np.abs(out.obs[:, ends]) <= 0.05).all()
    assert (np.abs(out.final_obs[:, ends, 1]) > 1e-3).all()
    assert (out.obs[:, ~ends] == out.final_obs[:, ~ends]).all()
    assert len(np.unique(out.obs[:, ends, 0])) == 3 * 5

    # The pair of gymnax.make, its own limit of 500: pushing to one side falls long before.
    _, out = rollout(as_jax_env((env, params)), np.ones(50, np.int32))
    falls = np.flatnonzero(out.terminated)
    assert len(falls) >= 4 and falls[0] < 12 and not out.truncated.any()
    assert (np.abs(out.final_obs[falls, 2]) > 0.2095).all()


@pytest.mark.needs_gymnax
def test_gymnax_breakout():
    import gymnax

    env, params = gymnax.make("Breakout-MinAtar")
    # Moved left by one, the paddle catches a ball that starts on the right and misses the other.
    adapted = as_jax_env(env, params.replace(max_steps_in_episode=30), max_steps=9)
    first, out = rollout(adapted, np.array([1] + [0] * 17), envs=4)
    assert first.shape == (4, 10, 10, 4) and out.obs.shape == (4, 18, 10, 10, 4)
    right = first[:, 3, 9, 1] == 1
    assert 0 < right.sum() < 4 and out.obs.dtype == np.float32
    assert (out.truncated[right, 8] & ~out.terminated[right, :9].any(1)).all()
    assert (out.terminated[~right, 5] & ~out.truncated[~right, :9].any(1)).all()
    assert out.truncated.sum() + out.terminated.sum() == (out.state.steps == 0).sum()
    done = out.terminated
    assert (out.obs[done][:, 3, :, 1].sum(-1) == 1).all()  # the ball is back in row 3
    assert (out.final_obs[done][:, 9, :, 1].sum(-1) == 1).all()  # it was lost in row 9
    assert (out.info["discount"] == ~done).all()
    assert isinstance(out.state, TimeLimited)


class OldGymnax:
    """The five-value API: `done` at 4 steps, or when the action is 1."""

    class State(NamedTuple):
        time: Any

    default_params = SimpleNamespace(max_steps_in_episode=4)

    def observation_space(self, params):
        return Box(0.0, 9.0, (1,), np.int32)  # what it gives is float: believed

    def action_space(self, params):
        return Discrete(2)

    def reset(self, key, params):
        return jnp.zeros(1), self.State(0)

    def step_env(self, key, state, action, params):
        time = state.time + 1
        done = (time >= params.max_steps_in_episode) | (action == 1)
        return jnp.ones(1) * time, self.State(time), 1, done, {}


def test_old_gymnax_api_splits_done_by_the_clock():
    env = as_jax_env(OldGymnax())
    assert env.observation_space.dtype == np.float32
    _, out = rollout(env, np.array([0, 0, 0, 0, 0, 1, 0, 0]))
    assert out.truncated.tolist() == [False] * 3 + [True] + [False] * 4
    assert out.terminated.tolist() == [False] * 5 + [True] + [False] * 2
    assert out.final_obs[:, 0].tolist() == [1, 2, 3, 4, 1, 2, 1, 2]
    assert out.obs[:, 0].tolist() == [1, 2, 3, 0, 1, 0, 1, 2]
    assert out.reward.dtype == np.float32


def test_gymnax_step_env_with_six_values():
    class Six(OldGymnax):
        def step_env(self, key, state, action, params) -> Any:
            obs, state, reward, done, info = super().step_env(key, state, action, params)
            return obs, state, reward, done, action == 2, info

    env = as_jax_env(Six())
    _, state = env.reset(KEY)
    assert [bool(x) for x in env.step(KEY, state, jnp.int32(1))[3:5]] == [True, False]
    assert [bool(x) for x in env.step(KEY, state, jnp.int32(2))[3:5]] == [False, True]


@pytest.mark.needs_gymnax
def test_gymnax_spaces_that_are_not_what_comes():
    import gymnax

    catch = as_jax_env(gymnax.make("Catch-bsuite"))  # declares int32
    assert catch.observation_space.dtype == np.float32 and catch.observation_space.shape == (10, 5)
    rooms = as_jax_env(gymnax.make("FourRooms-misc"))  # declares float32, gives integers
    assert rooms.observation_space.dtype == jax.eval_shape(rooms.reset, KEY)[0].dtype == np.float32
    lake = as_jax_env(gymnax.make("FrozenLake-misc"))  # declares what it gives, a Discrete
    assert jax.eval_shape(lake.reset, KEY)[0] == jax.ShapeDtypeStruct((), jnp.int32)


def test_gymnax_wrappers_are_refused():
    class Wrapper:
        def __init__(self, env):
            self._env = env

        def __getattr__(self, name):
            return getattr(self._env, name)

    with pytest.raises(ValueError, match=r"Wrapper is a gymnax wrapper.*pass the environment"):
        as_jax_env(Wrapper(OldGymnax()))


# --- brax ------------------------------------------------------------------------------------


@struct.dataclass
class BraxState:
    pipeline_state: Any
    obs: Any
    reward: Any
    done: Any
    metrics: dict
    info: dict


class Brax:
    """The position is what the actions add up to; done, a float as in brax, beyond 2."""

    observation_size = 2
    action_size = 2

    def __init__(self, info=None):
        self.info = info or {}

    def reset(self, key):
        zero = jnp.zeros((), jnp.float32)
        position = jax.random.uniform(key, (2,), jnp.float32)
        return BraxState(
            position, position, zero, zero, {"far": zero}, {"steps": zero, **self.info}
        )

    def step(self, state, action):
        position = state.pipeline_state + action
        far = jnp.abs(position).max()
        state.info["steps"] += 1
        done = (far > 2).astype(jnp.float32)
        return state.replace(
            pipeline_state=position, obs=position, reward=-far, done=done, metrics={"far": far}
        )


def test_brax():
    env = as_jax_env(Brax(), max_steps=3)
    assert env.action_space == Box(-1.0, 1.0, (2,)) and env.observation_space.shape == (2,)
    actions = np.zeros((8, 2), np.float32)
    actions[4] = 3
    first, out = rollout(env, actions)
    assert out.truncated.tolist() == [False, False, True] + [False] * 4 + [True]
    assert np.flatnonzero(out.terminated).tolist() == [4]
    assert (out.final_obs[2] == first).all() and (out.obs[2] != first).all()
    assert (out.final_obs[4] == out.obs[3] + 3).all() and out.reward[4] == -out.final_obs[4].max()
    assert (out.info["far"] == out.final_obs.max(-1)).all()
    assert out.state.state.info["steps"].tolist() == [1, 2, 0, 1, 0, 1, 2, 0]

    by_default = as_jax_env(Brax())
    _, state = by_default.reset(KEY)
    action = jnp.zeros(2, jnp.float32)
    assert not by_default.step(KEY, state._replace(steps=jnp.int32(998)), action)[4]
    assert by_default.step(KEY, state._replace(steps=jnp.int32(999)), action)[4]
    assert state.state.info["steps"] == 0  # though the environment wrote into that dict


def test_brax_with_named_observations():
    class Named(Brax):
        observation_size = {"state": 2, "pixels": (1, 2)}  # noqa: RUF012

        def reset(self, key):
            state: Any = super().reset(key)
            return state.replace(obs={"state": state.obs, "pixels": state.obs[None]})

        def step(self, state, action):
            after: Any = super().step(state, action)
            return after.replace(obs={"state": after.obs, "pixels": after.obs[None]})

    env = as_jax_env(Named())
    shapes = {name: space.shape for name, space in env.observation_space.spaces.items()}
    assert shapes == {"state": (2,), "pixels": (1, 2)}
    assert env_spec(env).single_observation_space.features == 4
    obs, _ = jax.eval_shape(env.reset, KEY)
    assert {name: x.shape for name, x in obs.items()} == shapes


def test_brax_info_counts_instead_of_us():
    env = as_jax_env(Brax({"truncation": jnp.ones(())}))
    _, state = env.reset(KEY)
    assert isinstance(state, BraxState)
    *_, terminated, truncated, _ = env.step(KEY, state, jnp.full(2, 5.0, jnp.float32))
    assert truncated and not terminated
    with pytest.raises(ValueError, match="Brax resets by itself"):
        as_jax_env(Brax({"first_obs": jnp.zeros(2)}))


# --- the protocol ----------------------------------------------------------------------------


def test_max_steps_and_idempotence():
    env = as_jax_env(Counter(end=3))
    assert as_jax_env(env) is env and isinstance(env.unwrapped, Counter)
    assert as_jax_env(env, max_steps=2).unwrapped is env.unwrapped
    limited = as_jax_env(env, max_steps=3)
    _, out = rollout(limited, np.zeros(7, np.int32))
    # Both at once at step 3, as gymnasium's TimeLimit has it.
    assert out.terminated.tolist() == out.truncated.tolist() == [False, False, True] * 2 + [False]
    assert out.final_obs[:, 0].tolist() == out.reward.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert out.obs[:, 0].tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert out.info["n"].tolist() == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("name", ["truncation", "truncated", None])
def test_five_values(name):
    class Five(Counter):
        def step(self, key, state, action):
            obs, state, reward, done, _, _ = super().step(key, state, action)
            return obs, state, reward, done, {name: action == 1} if name else {}

    _, out = rollout(Five(end=2), np.array([0, 0, 0, 1]))
    assert out.terminated.tolist() == [False, True, False, name is None]
    assert out.truncated.tolist() == [False, False, False, name is not None]


class KeyRecorder:
    """Its observation and info are the keys it got; the state holds a typed key. Two steps."""

    observation_space = Dict({"reset": Box(0, 0, (2,), np.uint32), "n": Discrete(9)})
    action_space = MultiDiscrete((2, 3))

    def reset(self, key):
        return {"reset": jax.random.key_data(key), "n": jnp.int32(0)}, (key, 0)

    def step(self, key, state, action):
        n = state[1] + 1
        obs = {"reset": jax.random.key_data(state[0]), "n": n}
        return obs, (state[0], n), 0.0, n >= 2, False, {"step": jax.random.key_data(key)}


def test_autoreset_uses_every_key_once():
    first, out = rollout(KeyRecorder(), np.zeros((50, 2), np.int32), envs=4)
    begins = out.terminated
    assert begins.sum() == 4 * 25
    keys = [first["reset"], out.obs["reset"][begins], out.info["step"].reshape(-1, 2)]
    keys = np.concatenate(keys)
    assert len(keys) == 4 + 100 + 200 == len(np.unique(keys, axis=0))
    # The key inside the state is the one of the new episode, and stays through it.
    assert (out.obs["reset"][:, 1:-1:2] == out.final_obs["reset"][:, 2::2]).all()
    assert (out.final_obs["n"] == 1 + np.arange(50) % 2).all() and (out.obs["n"][begins] == 0).all()


def test_autoreset_takes_keys_of_the_old_kind():
    old = jax.random.PRNGKey(0)
    env = as_jax_env(KeyRecorder())
    obs, state = env.reset(old)
    out = autoreset(env)(old, state, jnp.zeros(2, jnp.int32))
    assert (obs["reset"] == old).all() and (out.state[0] == old).all()


def test_state_dtypes_are_those_of_the_reset():
    class Drifting(Counter):
        def reset(self, key):
            return jnp.zeros(1, jnp.float32), {"speed": 0, "n": 0}

        def step(self, key, state, action):
            state = {"speed": state["speed"] + jnp.float32(0.25), "n": state["n"] + 1}
            return jnp.zeros(1, jnp.float64), state, 0, state["n"] >= 3, False, {}

    env = as_jax_env(Drifting())
    _, state = env.reset(KEY)
    obs, after, *_ = env.step(KEY, state, jnp.int32(0))
    assert after["speed"] == 0.25 and obs.dtype == np.float32
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert old.aval == new.aval and not old.weak_type


def broken(**changes):
    kinds = {k: staticmethod(v) if callable(v) else v for k, v in changes.items()}
    return type("Broken", (Counter,), kinds)()


OBS = jnp.zeros(1, jnp.float32)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            broken(observation_space=Box(0, 1, (3,))),
            r"Broken: observation_space says float32 \(3,\), reset gives float32 \(1,\)",
        ),
        (broken(observation_space=Box(0, 1, (1,), np.uint8)), r"uint8 \(1,\), reset gives float32"),
        (
            broken(observation_space=Dict({"a": Box(0, 1, (1,))})),
            r"says {a: float32 \(1,\)}, reset gives float32 \(1,\)",
        ),
        (
            broken(step=lambda k, s, a: (jnp.zeros(2), s, 0.0, False, False, {})),
            r"float32 \(1,\), step gives float64 \(2,\)",
        ),
        (broken(step=lambda k, s, a: (OBS, s, 0.0, {})), "Broken.step gives 4 where"),
        (broken(step=lambda k, s, a: OBS), "Broken.step gives .*Tracer where|gives ArrayImpl"),
        (broken(step=lambda k, s, a: (OBS, s, 0.0, False, None)), "info must be a dict; got None"),
        (
            broken(step=lambda k, s, a: (OBS, s, OBS, False, {})),
            r"reward must be a scalar; got shape \(1,\)",
        ),
        (
            broken(step=lambda k, s, a: (OBS, OBS, 0.0, False, {})),
            r"changes state from int64 \(\) to float32 \(1,\)",
        ),
        (broken(step=lambda k, s, a: (OBS, (s, s), 0.0, False, {})), "changes the structure"),
        (broken(action_space=Box(0, 1, (2, 2))), "policies act in Discrete"),
    ],
)
def test_what_does_not_fit_is_named(env, message):
    with pytest.raises(ValueError, match=message):
        as_jax_env(env)


def test_what_is_no_jax_environment_is_named():
    host = gymnasium.make("CartPole-v1")
    for env in (host, host.unwrapped):
        with pytest.raises(TypeError, match=r"step\(action\), like an env.*gymnasium.make_vec"):
            as_jax_env(env)
    with pytest.raises(TypeError, match="object lacks reset, step, observation_space, action_sp"):
        as_jax_env(object())
    with pytest.raises(TypeError, match="class Counter; pass an instance"):
        as_jax_env(Counter)
    with pytest.raises(TypeError, match=r"make\('cartpole'\)"):
        as_jax_env("cartpole")
    with pytest.raises(TypeError, match="is a method"):
        as_jax_env(broken(observation_space=lambda: Box(0, 1, (1,))))
    with pytest.raises(ValueError, match="Counter is not a gymnax environment"):
        as_jax_env(Counter(), env_params=1)
    with pytest.raises(ValueError, match="env_params as well"):
        as_jax_env((OldGymnax(), 1), env_params=1)
    with pytest.raises(ValueError, match="max_steps must be at least 1; got 0"):
        as_jax_env(Counter(), max_steps=0)


# --- CartPole --------------------------------------------------------------------------------


@functools.cache
def gymnasium_transitions():
    """Every step of one balanced and some random episodes: states, actions, what follows."""
    host: Any = gymnasium.make("CartPole-v1")
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(12):
        host.reset(seed=seed)
        steps, done = 0, False
        while not done:
            before = np.array(host.unwrapped.state)
            x, x_dot, theta, theta_dot = before
            balance = theta + 0.3 * theta_dot + 0.02 * x + 0.05 * x_dot > 0
            action = int(balance if seed == 0 else rng.integers(2))
            obs, reward, terminated, truncated, _ = host.step(action)
            after = np.array(host.unwrapped.state)
            rows.append((before, steps, action, after, obs, reward, terminated, truncated))
            steps, done = steps + 1, terminated or truncated
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(("dtype", "bar"), [(jnp.float64, 1e-14), (jnp.float32, 1e-6)])
def test_cartpole_is_gymnasiums(dtype, bar):
    before, steps, action, after, obs, reward, terminated, truncated = gymnasium_transitions()
    assert truncated.sum() == 1 and terminated.sum() == 11 and len(steps) > 650
    env = CartPole(dtype=dtype)
    first_obs, first = jax.vmap(env.reset)(jax.random.split(KEY, len(steps)))
    state = first._replace(
        **{name: before[:, i].astype(dtype) for i, name in enumerate(first._fields[:4])},
        steps=jnp.asarray(steps, jnp.int32),
    )
    got = jax.jit(jax.vmap(env.step))(jax.random.split(KEY, len(steps)), state, action)
    got_obs, got_state, got_reward, got_terminated, got_truncated, _ = jax.device_get(got)
    assert np.abs(np.stack(got_state[:4], -1) - after).max() < bar
    assert got_obs.dtype == obs.dtype and np.abs(got_obs - obs).max() < 1e-6
    assert (got_reward == reward).all() and got_state.steps.dtype == np.int32
    # No position is so near to a bound that rounding could end an episode there, or not.
    bounds = np.array(env.observation_space.high)[[0, 2]] / 2
    assert np.abs(np.abs(after[:, [0, 2]]) - bounds).min() > 2 * bar
    assert (got_terminated == terminated).all() and (got_truncated == truncated).all()
    # Resets are uniform in +-0.05: four thousand numbers reach both ends, and the mean is 0.
    values = np.asarray(first_obs)
    assert np.abs(values).max() <= 0.05 and values.min() < -0.0499 and values.max() > 0.0499
    assert abs(values.mean()) < 5 * 0.1 / np.sqrt(12 * values.size)


# --- probes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in environments.names() if n.startswith("probe_")])
def test_probe_values_are_the_discounted_returns_of_the_expected_policy(name):
    env = environments.make(name)
    gamma = 0.9
    best = getattr(env, "expected_action", lambda obs: jnp.zeros(obs.shape[:-1], jnp.int32))

    def run(key):
        obs, state = env.reset(key)
        cue = obs
        trace = []
        for step_key in jax.random.split(key, getattr(env, "k", 1) + 1):
            out = env.step(step_key, state, best(cue))
            wrong = env.step(step_key, state, 1 - best(cue))
            trace.append((obs, out[2], out[3], out[4], wrong[2]))
            obs, state = out[:2]
        return jax.tree.map(lambda *x: jnp.stack(x), *trace)

    obs, reward, terminated, truncated, wrong = jax.device_get(
        jax.jit(jax.vmap(run))(jax.random.split(KEY, 16))
    )
    assert not truncated.any() and obs.dtype == np.float32
    space = env.observation_space
    assert obs.shape[2:] == space.shape and (np.abs(obs) <= 1).all()
    last = {"probe_discount": 1, "probe_memory": 4}.get(name, 0)
    assert (terminated.argmax(1) == last).all() and (terminated[:, last]).all()
    steps = np.arange(last + 1)
    exact = reward.astype(np.float64)
    returns = sum(exact[:, [t]] * gamma ** (t - steps) * (t >= steps) for t in steps)
    assert np.abs(env.expected_value(obs[:, : last + 1], gamma) - returns).max() < 1e-6
    total = reward[:, : last + 1].sum(1)
    if name == "probe_observation_value":
        assert set(total) == {-1, 1} and (total == obs[:, 0, 0]).all() and env.best_return == 0
    else:
        assert (total == env.best_return).all()
    acts = hasattr(env, "expected_action")
    assert (wrong[:, last] == (-1 if acts else reward[:, last])).all()
    assert env.action_space.n == (2 if acts else 1)
    assert len(np.unique(obs[:, 0, 0])) == (
        1 if name.split("_")[1] in "value discount action" else 2
    )


def test_probe_memory_is_blank_but_for_the_clock():
    first, out = rollout(ProbeMemory(k=3), np.array([0, 0, 0, 1] * 10))
    episodes = out.final_obs.reshape(10, 4, 2)
    assert (episodes[..., 0] == 0).all() and np.allclose(episodes[..., 1], [1 / 3, 2 / 3, 1, 1])
    cues = np.concatenate([first[None], out.obs[3:-1:4]])[:, 0]
    assert set(cues) == {-1, 1} and (out.reward[3::4] == cues).all()
    assert (out.reward.reshape(10, 4)[:, :3] == 0).all()
    assert (out.terminated == (np.arange(40) % 4 == 3)).all()
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        ProbeMemory(k=0)


# --- ocean -----------------------------------------------------------------------------------

MOVES = [(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)]


def test_squared_against_a_plain_loop():
    env = Squared(distance=2, num_targets=3)
    first, start = jax.jit(env.reset)(KEY)
    step = jax.jit(env.step)
    assert first.shape == env.observation_space.shape == (5, 5)
    drawn = {tuple(map(int, p)) for p in np.argwhere(np.array(first) == 1)}
    assert len(drawn) == 3 and all(max(abs(r - 2), abs(c - 2)) == 2 for r, c in drawn)
    rng = np.random.default_rng(1)
    for greedy in (True, False):
        state, targets, position, total = start, set(drawn), (2, 2), 0.0

        def far(row, column, targets=targets):
            return min((max(abs(row - r), abs(column - c)) for r, c in targets), default=4)

        for t in range(6):
            ahead = [far(position[0] + r, position[1] + c) for r, c in MOVES]
            action = np.argmin(ahead) if greedy else rng.integers(8)
            row, column = position[0] + MOVES[action][0], position[1] + MOVES[action][1]
            obs, state, reward, terminated, truncated, info = step(KEY, state, action)
            assert reward == 1 - far(row, column) / 2 and reward.dtype == jnp.float32
            targets.discard((row, column))
            position = (2, 2) if max(abs(row - 2), abs(column - 2)) == 2 else (row, column)
            expected = np.zeros((5, 5), np.float32)
            for target in targets:
                expected[target] = 1
            expected[position] = -1
            assert (np.asarray(obs) == expected).all()
            assert np.isclose(info["score"], (3 - len(targets)) / 3)
            assert terminated == (t == 5) and not truncated
            total += float(reward)
        assert (total == env.best_return == 4.5 and not targets) if greedy else total < 4.5


def test_squared_text_and_limits():
    env = Squared(distance=1)
    _, state = env.reset(KEY)
    assert env.render(state) == "x x x\nx @ x\nx x x"
    first, out = rollout(env, np.arange(8))
    state = jax.tree.map(lambda x: x[5], out.state)
    assert env.render(state) == ". . .\n. @ .\nx . x"
    assert out.reward.sum() == env.best_return == 8
    assert out.terminated.tolist() == [False] * 7 + [True]
    assert (out.info["score"][-1] == 1) and (out.obs[-1] == first).all()
    starts = {env.render(s) for s in _starts(Squared(2, 3), 40)}
    assert len(starts) > 10
    with pytest.raises(ValueError, match="num_targets must be 1 to 16"):
        Squared(distance=2, num_targets=17)
    with pytest.raises(ValueError, match="distance must be at least 1; got 0"):
        Squared(distance=0)


def _starts(env, count):
    _, states = jax.device_get(jax.jit(jax.vmap(env.reset))(jax.random.split(KEY, count)))
    return [type(states)(*(leaf[i] for leaf in states)) for i in range(count)]


def test_memory():
    env = Memory(length=2, delay=1, digits=3)
    obs, state = jax.jit(env.reset)(KEY)
    digits = np.asarray(state.digits)
    assert env.render(state).splitlines()[1] == "^"
    step, seen, rewards, info = jax.jit(env.step), [np.asarray(obs)], [], {}
    # The first digit given too early does not count; then a right answer and a wrong one.
    for t, action in enumerate([digits[0], 0, 0, digits[0], (digits[1] + 1) % 3]):
        obs, state, reward, terminated, truncated, info = step(KEY, state, action)
        seen.append(np.asarray(obs))
        rewards.append(float(reward))
        assert terminated == (t == 4) and not truncated
    eye = np.eye(4, dtype=np.float32)
    expected = [eye[digits[0]], eye[digits[1]], 0 * eye[0], eye[3], eye[3]]
    assert (np.stack(seen[:5]) == expected).all() and seen[0].dtype == np.float32
    assert rewards == [0, 0, 0, 1, 0] and info["score"] == 0.5
    assert env.render(state) == f"{digits[0]} {digits[1]} . ? ?\n{' ' * 10}^\nright: 1 of 2"
    assert env.best_return == 2 and np.isclose(env.memoryless_return, 2 / 3)
    assert env.action_space.n == 3
    drawn = np.array([s.digits for s in _starts(env, 60)])
    assert {tuple(row) for row in drawn.tolist()} == {(a, b) for a in range(3) for b in range(3)}
    with pytest.raises(ValueError, match="delay must be at least 0; got -1"):
        Memory(delay=-1)


# --- by name ---------------------------------------------------------------------------------


def test_make():
    assert environments.make("cartpole", max_steps=7) == CartPole(max_steps=7)
    for name in environments.names():
        env = as_jax_env(environments.make(name))
        assert isinstance(env, AdaptedEnv) and env.observation_space.dtype == np.float32
    with pytest.raises(ValueError, match="no environment 'CartPol'; did you mean 'cartpole'"):
        environments.make("CartPol")
    with pytest.raises(ValueError, match="'zzzz'; JAX-native are: cartpole, memory, probe_action"):
        environments.make("zzzz")
    with pytest.raises(TypeError, match="size"):
        environments.make("squared", size=3)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        environments.Nothing  # noqa: B018
    assert {"make", "names", *environments.__all__} <= set(dir(environments))


class Privileged(Counter):
    observation_space = Dict({"state": Box(0, 100, (1,)), "privileged_state": Box(0, 100, (2,))})

    def reset(self, key):
        obs, state = super().reset(key)
        return {"state": obs, "privileged_state": jnp.zeros(2, jnp.float32)}, state

    def step(self, key, state, action):
        obs, *others = super().step(key, state, action)
        return {"state": obs, "privileged_state": jnp.ones(2, jnp.float32)}, *others


def test_one_part_of_the_observations():
    env = as_jax_env(Privileged(), observation="state")
    assert env.observation_space == Box(0, 100, (1,))
    obs, state = env.reset(KEY)
    assert obs.shape == (1,) and env.step(KEY, state, 0)[0].tolist() == [1.0]
    with pytest.raises(ValueError, match=r"one of state, privileged_state; got 'sate'.*'state'"):
        as_jax_env(Privileged(), observation="sate")
    with pytest.raises(ValueError, match="names a part of Dict observations; those of Counter"):
        as_jax_env(Counter(), observation="state")


def test_imports_are_lazy():
    code = (
        "import sys, puffer_jax.environments as e; e.names(); assert 'jax' not in sys.modules;"
        "e.make('cartpole'); e.make('squared'); e.make('probe_value');"
        "print({'gymnax', 'gymnasium', 'brax', 'flax', 'torch'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "set()"
