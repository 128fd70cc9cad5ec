"""Rollouts and the trainer around them, in every kind of environment."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pufferlib.emulation
import pufferlib.models
import pufferlib.vector
import pytest
import torch
from flax import nnx
from support.bars import relative_error
from support.reference import generic

import puffer_jax
from puffer_jax import ppo
from puffer_jax.environments.jax_native import as_jax_env
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.host.rollout import HostStep
from puffer_jax.ppo.jax_rollout import JaxSource
from puffer_jax.ppo.rollout import Player
from puffer_jax.ppo.training import make_train
from puffer_jax.run.trainer import NonFiniteError, PuffeRL

# All of this computes little: compiling is what takes the time.
pytestmark = pytest.mark.usefixtures("quick")

MODES = gymnasium.vector.AutoresetMode
RIGHT = {  # what recommended() turns on
    "advantage": "gae",
    "sampling": "shuffled",
    "bootstrap_truncation": True,
    "bootstrap_last": True,
    "reset_on_done": True,
    "store_initial_state": True,
    "use_mask": True,
}


class Counter(gymnasium.Env):
    """Counts its steps: obs is (episode, step), reward the step; episodes of 3 and 5 steps in turn.

    Those of 3 end, those of 5 are cut off.
    """

    observation_space = gymnasium.spaces.Box(-100, 100, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self):
        self.episode = -1

    def obs(self):
        return np.array([self.episode, self.step_count], np.float32)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.episode = -1
        self.episode += 1
        self.step_count = 0
        return self.obs(), {}

    def step(self, action):
        self.step_count += 1
        ends = self.episode % 2 == 0
        done = self.step_count == (3 if ends else 5)
        return self.obs(), float(self.step_count), done and ends, done and not ends, {}


class Sum(nnx.Module):
    """The value of (episode, step) is 10 * episode + step, the action always 0."""

    is_continuous = False
    hidden_size = 2

    def __init__(self, rngs):
        self.weight = nnx.Param(jnp.array([10.0, 1.0]))

    def encode_observations(self, observations, state=None):
        return jnp.asarray(observations)

    def decode_actions(self, hidden):
        logits = jnp.stack([jnp.zeros(len(hidden)), jnp.full(len(hidden), -jnp.inf)], 1)
        return logits, hidden @ self.weight[...][:, None]

    def forward_eval(self, observations, state=None):
        return self.decode_actions(self.encode_observations(observations))

    forward = forward_eval


def counters(mode, count=2):
    return gymnasium.vector.SyncVectorEnv([Counter] * count, autoreset_mode=mode)


def default(env, hidden_size=8, dtype=jnp.float32):
    """A `Default` at once: compiling its initialisers takes longer than most tests."""
    return generic(
        lambda: puffer_jax.Default(env, hidden_size, rngs=nnx.Rngs(0), param_dtype=dtype)
    )


def widened(policy, other):
    """The float64 policy `other` with the weights of one in float32, for exact numbers."""
    assert puffer_jax.load_state_dict(other, puffer_jax.state_dict(policy)) == ([], [])
    return other


@partial(jax.jit, static_argnums=0)
def scored(graphdef, params, observations, actions):
    """Log-probabilities and values in one program, which compiles sooner than its operations."""
    logits, values = puffer_jax.merge(graphdef, params)(observations)[:2]
    return puffer_jax.sample_logits(logits, action=actions)[1], values


def small_config(**changes):
    defaults = {
        "bptt_horizon": 8,
        "minibatch_size": "auto",
        "total_timesteps": 10**6,
        "optimizer": "adam",
        "checkpoint_interval": 10**9,
    }
    return PuffeRLConfig.from_dict(defaults | changes)


def on_host(experience):
    return jax.tree.map(np.asarray, experience)


# --- the host path ------------------------------------------------------------------------------


def counted(steps):
    """Observations of a counter that resets in the step of an episode's end, and how they came."""
    rows, episode, step = [], 0, 0
    reward, terminal, truncated, start, last = 0.0, False, False, True, None
    for _ in range(steps):
        rows.append((episode, step, reward, terminal, truncated, start, last))
        step, terminal, truncated, start, last = step + 1, False, False, False, None
        reward = float(step)
        if step == (3 if episode % 2 == 0 else 5):
            terminal, truncated, start = episode % 2 == 0, episode % 2 == 1, True
            last = (episode, step)
            episode, step = episode + 1, 0
    return rows


@pytest.mark.parametrize("mode", [MODES.SAME_STEP, MODES.DISABLED])
def test_autoreset_in_the_same_step(mode):
    config = small_config(reward_clip=None, **RIGHT)
    trainer = PuffeRL(config, counters(mode), Sum(nnx.Rngs(0)))
    for first in (0, 8):
        stats = dict(trainer.evaluate())
        if first == 0:
            assert stats["episode_return"][:2] == [1.0 + 2 + 3, 1.0 + 2 + 3]
        rows = counted(17)[first : first + 9]
        experience = on_host(trainer.experience)
        for agent in range(2):
            for t, (episode, step, reward, terminal, truncated, start, last) in enumerate(rows[:8]):
                at = agent, t
                assert experience.observations[at].tolist() == [episode, step]
                assert experience.values[at] == 10 * episode + step
                assert experience.rewards[at] == reward
                assert experience.terminals[at] == (terminal or truncated)
                assert experience.starts[at] == start
                final = 10 * last[0] + last[1] if truncated else 0
                assert experience.final_values[at] == final
            episode, step, reward, terminal, truncated, _, last = rows[8]
            assert experience.last.values[agent] == 10 * episode + step
            assert experience.last.rewards[agent] == reward
            assert experience.last.terminals[agent] == (terminal or truncated)
            final = 10 * last[0] + last[1] if truncated else 0
            assert experience.last.final_values[agent] == final
        assert experience.mask.all()
        trainer.train()
        trainer.state = trainer.state._replace(params={"weight": jnp.array([10.0, 1.0])})
    assert trainer.global_step == 32


def played_advantages(mode):
    """(episode, step) -> advantage in float64, of the steps that were played."""
    config = small_config(reward_clip=None, bptt_horizon=16, **RIGHT)
    trainer = PuffeRL(config, counters(mode), Sum(nnx.Rngs(0)))
    trainer.evaluate()
    experience = trainer.experience
    # All of them small integers, which float32 has.
    wide = in_float64(experience)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, wide)
    narrow, advantages = (
        np.asarray(ppo.advantage_of(each, jnp.ones_like(each.values), config.hypers()))
        for each in (rounded, wide)
    )
    assert (narrow.dtype, advantages.dtype) == (np.float32, np.float64)
    obs, mask = np.asarray(experience.observations), np.asarray(experience.mask)
    assert relative_error(narrow[mask], advantages[mask]) < 1e-6
    return {
        tuple(obs[0, t].astype(int).tolist()): advantages[0, t] for t in range(16) if mask[0, t]
    }


def test_autoreset_modes_agree_on_every_played_step():
    same, following = played_advantages(MODES.SAME_STEP), played_advantages(MODES.NEXT_STEP)
    # NEXT_STEP spends a step on each reset, so it sees less; its last episode is cut elsewhere.
    whole = [step for step in following if step[0] < 3]
    assert len(whole) == 3 + 5 + 3
    for step in whole:
        assert relative_error(following[step], same[step]) < 1e-12, step
    # One of them by hand: (1, 4) is followed by the end of a truncated episode, value 15.
    gamma = 0.995
    assert following[1, 4] == pytest.approx(5 + gamma * 15 - 14, rel=1e-12)
    # and (0, 2) by the end of a terminated one.
    assert following[0, 2] == pytest.approx(3 - 2, rel=1e-12)


def cartpole(buf=None, seed=None):
    return pufferlib.emulation.GymnasiumPufferEnv(gymnasium.make("CartPole-v1"), buf=buf, seed=seed)


def test_pufferlib_and_gymnasium_give_the_same_experience():
    results = []
    for envs in (
        gymnasium.make_vec("CartPole-v1", 4, "sync"),
        pufferlib.vector.make(cartpole, backend=pufferlib.vector.Serial, num_envs=4),
    ):
        space = getattr(envs, "driver_env", envs)
        policy = default(space, hidden_size=8)
        config = small_config(bptt_horizon=32, **RIGHT)
        trainer = PuffeRL(config, envs, policy)
        trainer.evaluate()
        trainer.train()
        trainer.evaluate()
        results.append(on_host(trainer.experience))
        envs.close()
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert not results[0].mask.all()  # an episode ended


class Count(gymnasium.Env):
    """Shows its number, its step and the action before; remembers what it got."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, number, action_space):
        self.number, self.action_space = number, action_space

    def reset(self, *, seed=None, options=None):
        self.step_number = 0
        return np.array([self.number, 0, 0], np.float32), {}

    def step(self, action):
        self.step_number += 1
        seen = float(np.sum(action))
        obs = np.array([self.number, self.step_number, seen], np.float32)
        return obs, 10.0 * self.number + self.step_number, self.step_number == 13, False, {}


@pytest.mark.parametrize("net", ["default", "lstm"])
@pytest.mark.parametrize("space", ["discrete", "box"])
def test_buffers_overlap_and_mix_nothing_up(net, space, tmp_path):
    box = gymnasium.spaces.Box(-0.5, 0.25, (2,), np.float32)
    action_space = box if space == "box" else gymnasium.spaces.Discrete(5)
    vecenv = puffer_jax.vector.make(
        [Count] * 6, [(i, action_space) for i in range(6)], num_envs=6, num_buffers=3
    )
    env = vecenv.driver_env
    build = default if net == "default" else recurrent
    policy, exact = build(env, 8, jnp.float32), build(env, 8, jnp.float64)
    config = small_config(data_dir=str(tmp_path), batch_size=96, bptt_horizon=8)
    with PuffeRL(config, vecenv, policy) as trainer:
        for _ in range(2):
            trainer.evaluate()
            experience = on_host(trainer.experience)
            obs, actions = experience.observations, experience.actions
            assert obs.shape == (12, 8, 3) and trainer.global_step % 96 == 0
            number, step, seen = np.moveaxis(obs, -1, 0)
            np.testing.assert_array_equal(number, np.tile(np.arange(6), 2)[:, None] * np.ones(8))
            going_on = step[:, 1:] == step[:, :-1] + 1
            assert 0.8 < going_on.mean() < 1
            played = np.clip(actions, -0.5, 0.25).sum(-1) if space == "box" else actions
            # The sum of two numbers is the same in any order.
            np.testing.assert_array_equal(seen[:, 1:][going_on], played[:, :-1][going_on])
            rewards = np.where(step == 0, 0, 10 * number + step)
            np.testing.assert_array_equal(experience.rewards, np.clip(rewards, -1, 1))
            np.testing.assert_array_equal(experience.terminals, step == 13)
            # The log-probabilities and values are those of these observations and actions.
            # (An LSTM's next segments begin with the state that the ones before have left.)
            rows = 6 if net == "lstm" else 12
            given = obs[:rows] if net == "lstm" else obs.reshape(-1, 3)
            taken = actions[:rows].reshape(rows * 8, *actions.shape[2:])
            found = scored(*puffer_jax.split(widened(trainer.policy, exact)), given, taken)
            for right, stored in zip(found, (experience.logprobs, experience.values), strict=True):
                assert (right.dtype, stored.dtype) == (np.float64, np.float32)
                assert relative_error(stored[:rows].ravel(), np.ravel(right)) < 5e-6
            trainer.train()
        assert trainer.loop.source.step._cache_size() == 1
        with pytest.raises(ValueError, match="2 of 6"):
            PuffeRL(small_config(bootstrap_last=True), vecenv, policy)


@pytest.mark.parametrize("batch", [4, 2], ids=["synchronous", "asynchronous"])
def test_pufferlib_multiprocessing(batch, tmp_path):
    vecenv = pufferlib.vector.make(
        cartpole,
        backend=pufferlib.vector.Multiprocessing,
        num_envs=4,
        num_workers=2,
        batch_size=batch,
        overwork=True,
    )
    env = vecenv.driver_env
    policy = recurrent(env, 8, jnp.float32)
    config = small_config(data_dir=str(tmp_path), batch_size=64, bptt_horizon=8)
    with PuffeRL(config, vecenv, policy) as trainer:
        for _ in range(3):
            trainer.evaluate()
            experience = on_host(trainer.experience)
            # Each row is one agent's: observations move by less than a step of CartPole allows.
            jumps = np.abs(np.diff(experience.observations[..., 0], axis=1))
            ended = experience.terminals[:, :-1] + experience.terminals[:, 1:] > 0
            assert jumps[~ended].max() < 0.2
            trainer.train()
        assert trainer.global_step == 3 * 64
        # Training replays from zeros exactly what the rollout began from zeros.
        assert trainer.loop.source.step._cache_size() == 1
    theirs = pufferlib.models.LSTMWrapper(
        env, pufferlib.models.Default(env, hidden_size=8), input_size=8, hidden_size=8
    )
    weights = torch.load(tmp_path / f"{trainer.logger.run_id}.pt", weights_only=True)
    theirs.load_state_dict(weights, strict=True)
    ours = puffer_jax.state_dict(trainer.policy)
    assert all(np.array_equal(ours[name], theirs.state_dict()[name]) for name in ours)


def programs_run(function, folder):
    """How many programs the device is given by a call."""
    with jax.profiler.trace(folder):
        function()
    (file,) = Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    events = (e.name for plane in data.planes for line in plane.lines for e in line.events)
    return sum(name.endswith("::ExecuteHelperOnSingleDevice") for name in events)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_keep_their_implementation(tmp_path, impl):
    """Also where another is the default by the time of the rollout."""
    actions = []
    for other in ("threefry2x32", "unsafe_rbg"):
        with jax.default_prng_impl(impl):
            vecenv = puffer_jax.vector.make("CartPole-v1", num_envs=2)
            policy = recurrent(vecenv.driver_env, 4, jnp.float32)
            config = small_config(data_dir=str(tmp_path), batch_size=16, bptt_horizon=8)
            trainer = PuffeRL(config, vecenv, policy)
        with trainer, jax.default_prng_impl(other):
            trainer.evaluate()
            actions.append(np.asarray(trainer.experience.actions))
    np.testing.assert_array_equal(*actions)


def test_a_step_is_one_dispatch_and_nothing_retraces(tmp_path):
    double = jax.jit(lambda x: 2 * x)
    x = double(jnp.ones(3))
    assert programs_run(lambda: [double(x) for _ in range(5)], tmp_path / "five") == 5
    counts = []
    for rounds in (1, 3):
        vecenv = puffer_jax.vector.make("CartPole-v1", num_envs=2)
        policy = recurrent(vecenv.driver_env, 4, jnp.float32)
        config = small_config(data_dir=str(tmp_path), batch_size=16 * rounds, bptt_horizon=8)
        with PuffeRL(config, vecenv, policy) as trainer:
            for _ in range(2):
                trainer.evaluate()
                trainer.train()
            counts.append(programs_run(trainer.evaluate, tmp_path / f"{rounds}"))
            assert trainer.loop.source.step._cache_size() == 1
            assert trainer.loop.programs["update"]._cache_size() == 1
    assert counts[1] - counts[0] == 2 * 8  # two rounds more of eight steps


@pytest.mark.parametrize("lstm", [False, True])
def test_a_step_has_few_operations(lstm):
    """XLA:CPU runs at most eight in the thread that asks, and hands more of them to others."""
    with puffer_jax.vector.make("CartPole-v1", num_envs=4) as vecenv:
        env, space = vecenv.driver_env, vecenv.single_action_space
        policy = recurrent(env, dtype=jnp.float32) if lstm else default(env)
    player = Player(small_config(), policy, space)
    _, params = puffer_jax.split(policy)
    obs, key = np.zeros((4, 4), np.float32), np.zeros(2, np.uint32)
    # The kernels draw with threefry's keys; those of `quick` are others.
    with jax.default_prng_impl("threefry2x32"):
        step = jax.jit(HostStep(player))
        text = step.lower(params, player.initial_state(4), obs, None, key).compile().as_text()
    lines = text[text.index("ENTRY") :].split("\n}")[0].splitlines()[1:]
    free = (" parameter(", " constant(", " tuple(", " get-tuple-element(", " bitcast(")
    operations = [line for line in lines if not any(name in line for name in free)]
    assert 3 <= len(operations) <= 8, operations


def test_bootstrap_last_needs_one_batch():
    vecenv = pufferlib.vector.make(cartpole, backend=pufferlib.vector.Serial, num_envs=4)
    vecenv.agents_per_batch = 2
    policy = default(vecenv.driver_env)
    with pytest.raises(ValueError, match="2 of 4"):
        PuffeRL(small_config(bootstrap_last=True), vecenv, policy)


class Echo(gymnasium.Env):
    """Remembers the actions it gets; continuous, Dict observations."""

    observation_space = gymnasium.spaces.Dict(
        {
            "a": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
            "b": gymnasium.spaces.Discrete(3),
        }
    )
    action_space = gymnasium.spaces.Box(-0.5, 0.25, (2,), np.float32)
    seen: ClassVar[list] = []

    def reset(self, *, seed=None, options=None):
        self.count = 0
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        Echo.seen.append(np.array(action))
        self.count += 1
        return self.observation_space.sample(), 1.0, self.count % 4 == 0, False, {}


def test_dict_observations_and_bounded_actions():
    Echo.seen.clear()
    envs = gymnasium.vector.SyncVectorEnv([Echo] * 3)
    policy = default(envs, hidden_size=8)
    trainer = PuffeRL(small_config(**RIGHT), envs, policy)
    trainer.evaluate()
    experience = on_host(trainer.experience)
    assert experience.observations["a"].shape == (3, 8, 2)
    seen = np.stack(Echo.seen)
    assert seen.min() == -0.5 and seen.max() == 0.25
    # What is stored is what was sampled, before the bounds; an environment in reset sees none.
    stored = experience.actions.reshape(-1, 2)
    assert stored.min() < -0.5 and stored.max() > 0.25
    assert all((np.abs(stored.clip(-0.5, 0.25) - action) < 1e-6).all(1).any() for action in seen)
    trainer.train()
    trainer.mean_and_log()
    assert np.isfinite(trainer.losses["policy_loss"])


# --- the compiled path --------------------------------------------------------------------------


def recurrent(env, hidden=6, dtype=jnp.float64):
    def build():
        rngs, options = nnx.Rngs(0), {"param_dtype": dtype}
        inner = puffer_jax.Default(env, hidden_size=hidden, rngs=rngs, **options)
        return puffer_jax.LSTMWrapper(env, inner, hidden, hidden, rngs=rngs, **options)

    return generic(build)


def test_episodes_that_end_are_summed_over_agents_and_steps():
    """No pole falls within five steps: each episode has five, and a return of 5."""
    env = as_jax_env(puffer_jax.environments.make("cartpole", max_steps=5))
    policy = recurrent(env)
    config = small_config(num_envs=3, batch_size=3 * 32, bptt_horizon=16)
    source = JaxSource(config, env, policy)
    params = puffer_jax.split(policy)[1]
    stream = source.init(jax.random.key(0))
    collect = jax.jit(source.collect)
    for ended in (6, 6, 7):  # of each agent in 32 steps, two and then four of an episode before
        stream, _, episodes = collect(params, stream, jax.random.key(ended))
        assert tuple(map(float, episodes)) == (3 * ended, 15 * ended, 15 * ended, 3 * 32)


@pytest.mark.parametrize("options", [{}, RIGHT], ids=["reference", "recommended"])
def test_before_any_update_the_ratio_is_one(options):
    """Training sees what the rollout saw: states, resets, segment borders."""
    env = as_jax_env(puffer_jax.environments.make("cartpole"))
    policy = recurrent(env)
    rounds = 2 if options else 1  # from zeros only the first segment of an epoch can be replayed
    config = small_config(num_envs=3, batch_size=3 * 16 * rounds, bptt_horizon=16, **options)
    source = JaxSource(config, env, policy)
    params = puffer_jax.split(policy)[1]
    stream = source.init(jax.random.key(0))
    collect = jax.jit(source.collect)
    for epoch in range(2):
        stream, experience, episodes = collect(params, stream, jax.random.key(epoch))
    assert int(episodes.episodes) > 0
    assert experience.values.shape == (3 * rounds, 16)
    logits, values = ppo.evaluate_segments(policy, experience)
    _, logprob, _ = puffer_jax.sample_logits(logits, action=experience.actions)
    ratio = np.exp(np.asarray(logprob).reshape(experience.logprobs.shape) - experience.logprobs)
    np.testing.assert_allclose(ratio, 1, atol=1e-12)
    np.testing.assert_allclose(values, experience.values, atol=1e-12)
    if options:
        # The state at the second segment's start is not zero, and matters.
        state = experience.state
        assert np.abs(state["lstm_h"][3:]).min() > 0
        wrong = experience._replace(state=jax.tree.map(jnp.zeros_like, state))
        assert np.abs(ppo.evaluate_segments(policy, wrong)[1] - experience.values).max() > 1e-4
        starts = np.roll(experience.starts, 1, axis=1)
        wrong = experience._replace(starts=starts)
        assert np.abs(ppo.evaluate_segments(policy, wrong)[1] - experience.values).max() > 1e-4


def test_rollout_steps_are_the_environments():
    """The compiled rollout against the environment stepped by hand with its actions, in float64."""
    env = as_jax_env(puffer_jax.environments.make("cartpole", max_steps=7))
    policy = default(env, hidden_size=4)
    config = small_config(num_envs=2, bptt_horizon=24, reward_clip=None, **RIGHT)
    source = JaxSource(config, env, policy)
    params = puffer_jax.split(policy)[1]
    stream = source.init(jax.random.key(0))
    _, experience, episodes = jax.jit(source.collect)(params, stream, jax.random.key(1))
    found = on_host(experience)
    state = in_float64(jax.tree.map(lambda x: x[0], stream.env))
    exact_env = as_jax_env(puffer_jax.environments.make("cartpole", max_steps=7, dtype=jnp.float64))
    exact_policy = widened(policy, default(env, 4, jnp.float64))
    step = jax.jit(exact_env.step)
    truncations, final_values, exact_values, observations, exact_observations = 0, [], [], [], []
    for t in range(23):
        obs, state, reward, terminated, truncated, _ = step(
            jax.random.key(0), state, found.actions[0, t]
        )
        done = bool(terminated | truncated)
        assert found.terminals[0, t + 1] == done and found.starts[0, t + 1] == done
        assert found.rewards[0, t + 1] == reward
        if truncated and not terminated:
            truncations += 1
            exact_values.append(exact_policy.forward_eval(obs[None])[1][0, 0])
            final_values.append(found.final_values[0, t + 1])
        else:
            assert found.final_values[0, t + 1] == 0
        if done:
            break_state = state
            start = found.observations[0, t + 1]
            assert np.abs(start).max() <= 0.05
            state = _with_observation(break_state, start.astype(np.float64))
        else:
            observations.append(found.observations[0, t + 1])
            exact_observations.append(obs)
    assert truncations >= 1
    assert relative_error(final_values, exact_values) < 5e-6
    assert relative_error(observations, exact_observations) < 1e-6
    assert float(episodes.lengths) / int(episodes.episodes) <= 7


def in_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


def _with_observation(state, obs):
    """A CartPole state at the beginning of an episode that began with `obs`."""
    fields = dict(zip(("x", "x_dot", "theta", "theta_dot"), obs, strict=True))
    names = set(getattr(state, "_fields", ()))
    fields = {name: value for name, value in fields.items() if name in names}
    zero = {n: jnp.zeros_like(getattr(state, n)) for n in names - set(fields)}
    return state._replace(**fields, **zero)


def build_jax_trainer(folder, lstm=True, dtype=jnp.float32, **changes):
    env = puffer_jax.environments.make("cartpole")
    defaults = {"num_envs": 4, "data_dir": str(folder), "minibatch_size": 16}
    config = small_config(**(defaults | RIGHT | changes))
    policy = default(env, 6, dtype)
    if lstm:
        policy = recurrent(as_jax_env(env), dtype=dtype)
    return PuffeRL(config, env, policy, puffer_jax.NoLogger("run"))


def states_equal(a, b):
    def data(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(data(x), data(y)), a, b)


TRAIN_UNTIL_KILLED = """
import sys
sys.path[:0] = {tests!r}
import conftest, jax
jax.config.update("jax_default_prng_impl", "rbg")
from test_pufferl import build_jax_trainer
trainer = build_jax_trainer({folder!r}, checkpoint_interval=1)
while True:
    trainer.evaluate(); trainer.train(); print(trainer.epoch, flush=True)
"""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    script = TRAIN_UNTIL_KILLED.format(
        tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])], folder=str(tmp_path)
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    while int(process.stdout.readline()) < 4:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()

    resumed = build_jax_trainer(tmp_path)
    resumed.restore()
    assert resumed.epoch >= 3 and resumed.global_step == resumed.epoch * 32
    whole = build_jax_trainer(tmp_path / "other")
    # Many more epochs may have passed before the signal arrived.
    goal = resumed.epoch + 2
    for trainer in (resumed, whole):
        while trainer.epoch < goal:
            trainer.evaluate()
            trainer.train()
    states_equal(resumed.loop.saved(), whole.loop.saved())
    assert resumed.global_step == whole.global_step


def test_run_stops_on_sigterm_with_a_checkpoint(tmp_path):
    class Logger(puffer_jax.NoLogger):
        closed = None

        def log(self, logs, step):
            os.kill(os.getpid(), signal.SIGTERM)

        def close(self, model_path):
            self.closed = model_path

    before = signal.getsignal(signal.SIGTERM)
    trainer = build_jax_trainer(tmp_path, lstm=False)
    trainer.logger = logger = Logger("stopped")
    trainer.last_log_time = 0.0  # log at once
    logs = trainer.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer.epoch == 1 and logs["epoch"] == 1
    assert logger.closed == tmp_path / "stopped" / "model_000001.pt"
    assert (tmp_path / "stopped.pt").exists()
    assert trainer.loop.programs["epoch"]._cache_size() == 1


def test_one_program_and_two_do_the_same(tmp_path):
    # In float64, where neither program's order of sums decides which action is drawn.
    fused, split = (build_jax_trainer(tmp_path, lstm=False, dtype=jnp.float64) for _ in range(2))
    split.evaluate()
    split.train()
    split.run_epoch(apart=True)
    fused.run_epoch()
    fused.run_epoch()
    for a, b in zip(jax.tree.leaves(fused.state), jax.tree.leaves(split.state), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            assert relative_error(a, b) < 1e-9
        else:
            np.testing.assert_array_equal(a, b)
    assert fused.global_step == split.global_step == 64
    assert fused.loop.programs["epoch"]._cache_size() == 1
    assert split.loop.programs["update"]._cache_size() == 1
    assert split.loop.programs["epoch"]._cache_size() == 0
    # What a program does first is its compilation; its phase is what it does then.
    assert list(fused.profile.seconds()) == ["compile", "epoch"]
    assert list(split.profile.seconds()) == ["compile", "evaluate", "train"]


class NaNAfter(Counter):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward if self.episode < 3 else float("nan"), *rest


def test_a_nan_stops_the_run_and_names_its_origin(tmp_path):
    envs = gymnasium.vector.SyncVectorEnv([NaNAfter] * 2)
    policy = default(envs, hidden_size=4)
    trainer = PuffeRL(small_config(data_dir=str(tmp_path), total_timesteps=10**4), envs, policy)
    with pytest.raises(NonFiniteError, match="'rewards'") as error:
        trainer.run()
    epoch = trainer.epoch
    assert f"epoch {epoch}" in str(error.value)
    weights = puffer_jax.policy_from_checkpoint(trainer.run_folder / f"model_{epoch:06d}.pt")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(puffer_jax.split(weights)[1]))


def test_seeds_in_one_program_are_the_single_runs():
    with jax.default_prng_impl("threefry2x32"):
        compare_seeds()


def compare_seeds():
    env = puffer_jax.environments.make("probe_observation_action")
    config = small_config(num_envs=4, total_timesteps=4 * 8 * 3)
    options = {"param_dtype": jnp.float64}  # in which sums in another order draw the same actions
    train = make_train(config, env, lambda rngs: puffer_jax.Default(env, 4, rngs=rngs, **options))
    keys, rates = jax.random.split(jax.random.key(0), 2), jnp.array([1e-3, 1e-2])
    params, metrics = jax.jit(jax.vmap(train))(keys, {"learning_rate": rates})
    alone = jax.jit(train)
    for i in range(2):
        p, m = alone(keys[i], {"learning_rate": rates[i]})
        for a, b in zip(jax.tree.leaves((params, metrics)), jax.tree.leaves((p, m)), strict=True):
            np.testing.assert_array_equal(np.isfinite(a[i]), np.isfinite(b))
            assert relative_error(np.nan_to_num(a[i]), np.nan_to_num(b)) < 1e-9
    assert metrics["episode_return"].shape == (2, 3)


# --- it learns ----------------------------------------------------------------------------------

PROBES = {
    "probe_value": {},
    "probe_observation_value": {},
    "probe_discount": {},
    "probe_action": {},
    "probe_observation_action": {},
    "probe_memory": {"recurrent": True, "epochs": 200},
}


@pytest.mark.parametrize("name", PROBES)
def test_probe(name):
    """Each isolates one fault: value, observation, discounting, action, both, memory."""
    options = PROBES[name]
    inner = puffer_jax.environments.make(name)
    env = as_jax_env(inner)
    epochs = options.get("epochs", 120)
    if options.get("recurrent"):
        policy = recurrent(env, 16, jnp.float32)
    else:
        policy = default(env, hidden_size=16)
    config = PuffeRLConfig.recommended(
        num_envs=32,
        bptt_horizon=8,
        total_timesteps=epochs * 256,
        optimizer="adam",
        learning_rate=1e-2,
        adam_beta1=0.9,
        gamma=0.9,
        vf_clip_coef=10.0,
        ent_coef=0.0,
        update_epochs=2,
        minibatch_size=256,
        normalize_rewards=False,  # the values to be learned are those of the rewards
    )
    train = make_train(config, env, policy)
    params, metrics = jax.jit(train)(jax.random.key(0))
    assert np.nanmean(metrics["episode_return"][-10:]) > 0.9 * inner.best_return
    graphdef = puffer_jax.split(policy)[0]
    trained = puffer_jax.merge(graphdef, params)
    if not options.get("recurrent"):
        # Values of the first observations of some episodes, and of the second where there is one.
        key, rows = jax.random.key(1), []
        for _ in range(8):
            key, reset_key = jax.random.split(key)
            obs, state = inner.reset(reset_key)
            rows.append(obs)
            obs, _, _, terminated, *_ = inner.step(key, state, 0)
            rows += [] if terminated else [obs]
        values = trained.forward_eval(jnp.stack(rows))[1][:, 0]
        expected = [float(inner.expected_value(obs, 0.9)) for obs in rows]
        assert np.abs(np.asarray(values) - expected).mean() < 0.1


# --- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "agents", "message"),
    [
        ({"batch_size": 100, "bptt_horizon": 8}, 4, "100 is not a multiple .* nearest: 96 or 104"),
        ({"batch_size": 64, "bptt_horizon": 8}, 9, "8 segments .* 9 agents.*72"),
        (
            {"batch_size": 96, "bptt_horizon": 8},
            8,
            "multiple of 8 .* nearest batch_size: 64 or 128",
        ),
        ({"minibatch_size": 20}, 4, "20 is not a multiple of bptt_horizon 8; nearest: 16 or 24"),
        ({"minibatch_size": 64}, 4, "64 is larger than batch_size 32"),
        ({"minibatch_size": 32, "max_minibatch_size": 24}, 4, "nearest: 24 or 48"),
        ({"batch_size": "auto", "bptt_horizon": "auto"}, 4, "both are 'auto'"),
    ],
)
def test_sizes_that_do_not_fit(changes, agents, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes).sizes(agents)


def test_sizes_are_the_references():
    config = PuffeRLConfig(total_timesteps=10**6, minibatch_size=2048, update_epochs=3.0)
    sizes = config.sizes(64)
    assert sizes == (64, 64, 64, 32, 6, 1, 10**6 // 4096, sizes.minibatches)
    assert PuffeRLConfig(batch_size=4096, bptt_horizon="auto").sizes(64).horizon == 64
    assert PuffeRLConfig(num_envs=12, bptt_horizon=10).sizes(None).batch == 120


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 0.1}, "did you mean learning_rate"),
        ({"gamma": 1.5}, "gamma must be between 0 and 1"),
        ({"total_timesteps": 0}, "total_timesteps must be a positive number"),
    ],
)
def test_bad_configurations(values, message):
    with pytest.raises(ValueError, match=message):
        PuffeRLConfig.from_dict(values)


def test_ini(tmp_path):
    file = tmp_path / "env.ini"
    file.write_text(
        "[base]\nenv_name = x\n[train]\ntotal_timesteps = 2e6\ngamma = 1\ndevice = cuda\n"
        "minibatch_size = 4096\nanneal_lr = False\nbatch_size = auto\n"
    )
    config = PuffeRLConfig.from_ini(file)
    assert (config.total_timesteps, config.gamma, config.anneal_lr) == (2_000_000, 1.0, False)
    file.write_text("[train]\ngama = 1\n")
    with pytest.raises(ValueError, match="did you mean gamma"):
        PuffeRLConfig.from_ini(file)


def test_defaults_are_pufferlibs():
    from support.trainer import CONFIG

    sized = {"minibatch_size", "bptt_horizon", "batch_size", "total_timesteps", "optimizer", "env"}
    ours = dataclasses.asdict(PuffeRLConfig())
    for name in ours.keys() & CONFIG.keys() - sized - {"seed", "checkpoint_interval", "use_rnn"}:
        assert ours[name] == CONFIG[name], name
    assert json.dumps(ours)


def test_policies_that_do_not_fit_the_config():
    env = puffer_jax.environments.make("cartpole")
    policy = default(env)
    with pytest.raises(ValueError, match="use_rnn is True, but Default has no initial_state"):
        PuffeRL(small_config(use_rnn=True), env, policy)
    with pytest.raises(ValueError, match="bfloat16 for precision"):
        PuffeRL(small_config(precision="bfloat16"), env, policy)
    with pytest.raises(RuntimeError, match="evaluate"):
        PuffeRL(small_config(num_envs=2), env, policy).train()
    with pytest.raises(TypeError, match="make_vec"):
        PuffeRL(small_config(), gymnasium.make("CartPole-v1"), policy)
