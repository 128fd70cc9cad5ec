"""Vecenvs: the same trajectories on every backend and as the reference's, and their protocol."""

import gc
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pufferlib.emulation
import pufferlib.vector
import pytest
from flax import nnx
from gymnasium.spaces import Box
from support.vector_envs import Guess, Modules, Native, Pair, Tick, Together, Walk

import puffer_jax.emulation
from puffer_jax import vector
from puffer_jax.base import spaces
from puffer_jax.ppo.host.envs import as_host_env
from puffer_jax.vector.jax_native import JaxVecEnv
from puffer_jax.vector.multiprocessing import Multiprocessing
from puffer_jax.vector.serial import Serial

ENVS = {"walk": (Walk, 1), "pair": (Pair, 3), "native": (Native, 2)}


def workers(num, **options):
    return {"backend": Multiprocessing, "num_workers": num, "overwork": True, **options}


def actions_of(space, ids, counts):
    """What agent `id` does on its `count`-th observation."""
    nvec = np.atleast_1d(getattr(space, "nvec", getattr(space, "n", 3)))
    shape = (len(ids), *space.shape)
    values = (7 * ids + counts * (3 + ids % 2)) % 12
    actions = np.stack([values % n for n in nvec], axis=1)
    if hasattr(space, "low"):
        return np.stack([values / 12 - 0.5, 0.3 - values / 24], axis=1).astype(np.float32)
    return actions.reshape(shape).astype(np.int32)


def play(vecenv, steps, seed=5):
    """(rows, infos) of `steps` steps of every agent; rows have a field for what each saw."""
    space = vecenv.single_action_space
    count = np.zeros(vecenv.num_agents, int)
    fields, told = None, {}
    vecenv.async_reset(seed)
    while True:
        obs, rewards, terminals, truncations, *_, infos, ids, masks = vecenv.recv()
        assert len(ids) == vecenv.agents_per_batch
        fields = fields or [
            np.zeros((steps, vecenv.num_agents, *a.shape[1:]), a.dtype)
            for a in (obs, rewards, terminals, truncations, masks)
        ]
        now = count[ids] < steps
        for field, given in zip(fields, (obs, rewards, terminals, truncations, masks), strict=True):
            field[count[ids[now]], ids[now]] = given[now]
        for info in infos if now.all() else ():
            for name, value in info.items():
                if value or not isinstance(value, dict):  # the reference tells of empty ones, too
                    told.setdefault(str(name), []).append(str(value))
        count[ids] += 1
        if (count >= steps).all():
            return fields, {name: sorted(values) for name, values in told.items()}
        vecenv.send(actions_of(space, ids, count[ids]))


def same(ours, theirs, infos=True):
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine, other)
    assert not infos or ours[1] == theirs[1]


@pytest.mark.parametrize("name", ENVS)
def test_every_backend_plays_the_same_steps(name):
    creator, agents = ENVS[name]
    with vector.make(creator, num_envs=4) as vecenv:
        expected = play(vecenv, 250)
        assert vecenv.num_agents == vecenv.num_envs == 4 * agents
    observations, rewards, terminals, truncations, masks = expected[0]
    assert terminals.any() and expected[1] and len(np.unique(rewards)) > 250
    assert (masks.all(), truncations.any()) == (name != "pair", name == "walk")
    assert (np.ptp(observations[0].astype(float), axis=0) > 0).any()  # the seeds differ
    splits = [
        workers(2),
        workers(2, local_worker=True),
        workers(2, local_worker=True, batch_size=2),
        workers(4, batch_size=2, sync_traj=False),
        {"num_buffers": 2},
    ]
    if name == "walk":
        splits += [workers(1), workers(4, batch_size=3, zero_copy=False)]
        splits += [workers(1, local_worker=True), workers(3, local_worker=True)]
    for options in splits:
        with vector.make(creator, num_envs=4, **options) as vecenv:
            same(play(vecenv, 250), expected, {"batch_size", "num_buffers"}.isdisjoint(options))


def play_renewed(vecenv, steps, seed=5):
    """(last, rewards, terminals, truncations, first) of every agent's steps; infos by environment.

    `first` is what it acts on next: after an episode's end, the first observation of the next one.
    """
    rows, told = [[] for _ in range(vecenv.num_agents)], {}
    count = np.full(vecenv.num_agents, -1)  # steps, the first of which is a reset
    vecenv.async_reset(seed)
    while count.min() < steps:
        *step, infos, ids, _ = vecenv.recv()
        if count[ids[0]] >= 0:
            step = [array.copy() for array in step]
            for info, source in zip(infos, vecenv.info_sources, strict=True):
                told.setdefault(source, []).append(info)
            first, rewards, terminals, truncations, infos, again, _ = vecenv.renew()
            assert again.tolist() == ids.tolist() and not infos
            if vecenv.emulated and vecenv.num_agents == vecenv.num_environments:
                assert not (terminals | truncations).any()
                assert not rewards[step[2] | step[3]].any()
            for i, agent in enumerate(ids):
                rows[agent].append([*(array[i] for array in step), first[i].copy()])
        count[ids] += 1
        vecenv.send(actions_of(vecenv.single_action_space, ids, count[ids]))
    return [row[:steps] for row in rows], told


def same_rows(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        for step, expected in zip(mine, other, strict=True):
            for value, right in zip(step, expected, strict=True):
                np.testing.assert_array_equal(value, right)


def test_renewed_episodes_begin_in_the_step_that_ends_the_last():
    steps = 80
    with vector.make(Walk, num_envs=4) as vecenv:
        rows, told = play_renewed(vecenv, steps)
        space = vecenv.single_action_space
    by_hand, infos = [], {}
    for number in range(4):
        env = puffer_jax.emulation.GymnasiumPufferEnv(env_creator=Walk)
        env.reset(seed=5 + number)
        played = []
        for count in range(steps):
            action = actions_of(space, np.array([number]), np.array([count]))
            _, reward, terminated, truncated, info = env.step(action)
            last = env.observations[0].copy()
            if info:
                infos.setdefault(number, []).append(info)
            if terminated or truncated:
                env.reset()
            ends = np.float32(reward), terminated, truncated
            played.append([last, *ends, env.observations[0].copy()])
        by_hand.append(played)
    same_rows(rows, by_hand)
    assert told == infos and len(infos) == 4
    for options in (
        workers(2, local_worker=True),
        workers(4, batch_size=2, sync_traj=False),
        {"num_buffers": 2},
    ):
        with vector.make(Walk, num_envs=4, **options) as vecenv:
            same_rows(play_renewed(vecenv, steps)[0], by_hand)


def test_what_has_no_episode_over_is_not_renewed():
    """Three agents, of which one leaves early, and native environments, which reset themselves."""
    for creator, options in ((Pair, {}), (Pair, workers(2)), (Native, {}), (Native, workers(2))):
        with vector.make(creator, num_envs=2, **options) as vecenv:
            rows, _ = play_renewed(vecenv, 30)
        if creator is Native:
            assert all(np.array_equal(last, first) for row in rows for last, *_, first in row)
            assert any(terminal for row in rows for _, _, terminal, *_ in row)
            continue
        assert [step[2] for step in rows[2][:4]] == [False, False, True, True]  # c has left
        ends = [i for i, (a, b) in enumerate(zip(rows[0], rows[2], strict=True)) if a[2] and b[2]]
        assert ends and not rows[2][ends[0] + 1][2]  # and is back after all have


@pytest.mark.usefixtures("quick")
def test_jax_vecenvs_are_renewed():
    with JaxVecEnv(puffer_jax.environments.make("cartpole"), 3, seed=7) as vecenv:
        vecenv.reset()
        ends = 0
        for _ in range(30):
            obs, _, terminals, *_ = (np.array(a) for a in vecenv.step(np.ones(3, int))[:4])
            first, rewards, *flags, infos, _, _ = vecenv.renew()
            assert not np.any(flags) and not infos
            assert (rewards == ~terminals).all()
            np.testing.assert_array_equal(first[~terminals], obs[~terminals])
            assert (np.abs(first[terminals]) <= 0.05).all()
            ends += terminals.sum()
        assert 6 <= ends <= 12  # always to the right, a pole falls after about ten steps
        with pytest.raises(TypeError, match="environments of a JaxVecEnv are no objects"):
            vecenv.apply(repr)
        vecenv.step(np.ones(3, int))  # it goes on


def test_functions_of_environments_are_called_where_these_live():
    def steps_of(env):
        if env.env.first < 0:
            raise AttributeError("none")
        return env.env.steps, os.getpid()

    def lower(env):
        env.env.first = -1.0

    for options in (
        {"num_buffers": 2},
        workers(2),
        workers(2, local_worker=True),
        workers(4, batch_size=2),
    ):
        with vector.make(Tick, num_envs=4, **options) as vecenv:
            vecenv.reset(0)
            vecenv.step(np.zeros(vecenv.agents_per_batch, int))
            found = vecenv.apply(steps_of, [3, 0, 3])
            assert found[0] == found[2] and {steps for steps, _ in found} <= {0, 1}
            assert len({pid for _, pid in found}) == (1 if "num_buffers" in options else 2)
            assert vecenv.apply(lower, [1]) == [None]
            with pytest.raises(AttributeError, match="none") as error:
                vecenv.apply(steps_of)
            assert error.value.__notes__ == ["(in environment 1)"]
            with pytest.raises(ValueError, match=r"envs must be 0 \.\. 3; got \[4, -1\]"):
                vecenv.apply(steps_of, [0, 4, -1])
            if options.get("num_workers"):
                with pytest.raises(TypeError, match=r"environment 0 .* a generator, cannot"):
                    vecenv.apply(lambda env: (i for i in [env]))
            for _ in range(4):  # and all goes on
                vecenv.step(np.zeros(vecenv.agents_per_batch, int))
    with pytest.raises(RuntimeError, match="closed"):
        vecenv.apply(steps_of)


def test_trajectories_are_the_references():
    wrapped = {
        "walk": (pufferlib.emulation.GymnasiumPufferEnv, puffer_jax.emulation.GymnasiumPufferEnv),
        "pair": (pufferlib.emulation.PettingZooPufferEnv, puffer_jax.emulation.PettingZooPufferEnv),
    }
    for name, (theirs, ours) in wrapped.items():
        creator = ENVS[name][0]
        vecenv = pufferlib.vector.make(
            partial(theirs, env_creator=creator), backend=pufferlib.vector.Serial, num_envs=3
        )
        expected = play(vecenv, 300)
        spaces = (vecenv.observation_space, vecenv.action_space)
        vecenv.close()
        for env in (
            creator,
            partial(theirs, env_creator=creator),
            partial(ours, env_creator=creator),
        ):
            with vector.make(env, num_envs=3) as vecenv:
                same(play(vecenv, 300), expected)
                assert (vecenv.observation_space, vecenv.action_space) == spaces
                assert vecenv.emulated and vecenv.driver_env.emulated == vecenv.emulated


def test_ends_and_resets():
    with vector.make(Tick, env_kwargs={"length": 2}, num_envs=2, seed=3) as vecenv:
        first, infos = vecenv.reset(3)
        first, zero = first.copy(), np.zeros(2, int)
        assert infos == [] and first[0, 0] != first[1, 0]
        got = [[a.copy() for a in vecenv.step(zero)[:4]] for _ in range(3)]
    assert [obs[0, 1] for obs, *_ in got] == [1, 2, 0]
    assert [rewards.tolist() for _, rewards, *_ in got] == [[1, 1], [1, 1], [0, 0]]
    assert [ends.tolist() for _, _, ends, _ in got] == [[False] * 2, [True] * 2, [False] * 2]
    # The constructor's seed holds where reset gives none, whichever worker.
    for options in ({}, workers(2), workers(2, local_worker=True)):
        with vector.make(Tick, num_envs=2, seed=3, **options) as vecenv:
            np.testing.assert_array_equal(vecenv.reset()[0], first)
            assert (vecenv.reset()[0][:, 0] != first[:, 0]).any()
            np.testing.assert_array_equal(vecenv.reset(3)[0], first)
            vecenv.send(zero)
            vecenv.async_reset(3)  # forgets the step under way
            np.testing.assert_array_equal(vecenv.recv()[0], first)


def test_batches():
    """Which agents come, in which order, and that rows in a row are no copies."""
    for options, expected in (
        ({"num_buffers": 2}, [[0, 1], [2, 3], [0, 1], [2, 3]]),
        ({"num_buffers": 4}, [[0], [1], [2], [3], [0]]),
        (workers(4, batch_size=2), [[0, 1], [2, 3], [0, 1], [2, 3]]),
        (workers(4, batch_size=2, zero_copy=False), [[0, 1], [2, 3], [0, 1], [2, 3]]),
        (workers(4, batch_size=3, zero_copy=False), [[0, 1, 2], [3, 0, 1], [2, 3, 0], [1, 2, 3]]),
        (workers(2, batch_size=2, local_worker=True), [[0, 1], [2, 3], [0, 1], [2, 3]]),
        (workers(2, batch_size=2, sync_traj=False), None),
        (workers(4, batch_size=2, zero_copy=False, sync_traj=False), None),
    ):
        kwargs = [{}, {}, {}, {"pause": 0.02 if expected else 0.5}]
        with vector.make([Tick] * 4, [()] * 4, kwargs, num_envs=4, **options) as vecenv:
            assert (vecenv.num_agents, vecenv.agents_per_batch) == (
                4,
                len((expected or [[0, 0]])[0]),
            )
            vecenv.async_reset(0)
            seen = []
            for _ in range(len(expected or range(12))):
                obs, *_, ids, _ = vecenv.recv()
                seen.append(ids.tolist())
                assert obs.flags.owndata == (not options.get("zero_copy", True))
                vecenv.send(np.zeros(len(ids), int))
            vecenv.recv()
        if expected:
            assert seen == expected
        else:  # the slow one keeps none waiting
            assert sum(3 in ids for ids in seen) < 4 and all(len(set(ids)) == 2 for ids in seen)
    with vector.make([Tick] * 4, num_envs=4, batch_size=2, **workers(2)) as vecenv:
        host = as_host_env(vecenv)
        host.async_reset(1)
        received = [host.recv()]
        host.send(np.zeros(2, int))
        received.append(host.recv())
        assert [r.agent for r in received] == [0, 2] and host.shows_final
        assert all(r.start.all() and r.mask.all() for r in received)


def test_call_order_and_actions():
    for options in ({}, workers(1), workers(2, local_worker=True)):
        vecenv = vector.make(Walk, num_envs=2, **options)
        good = np.array([[0, 1, 3], [2, 0, 0]])
        for call, message in (
            (vecenv.recv, "call .async_.reset before recv"),
            (partial(vecenv.send, good), "call .async_.reset before send"),
            (partial(vecenv.step, good), "call .async_.reset before send"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call()
        vecenv.async_reset(0)
        with pytest.raises(RuntimeError, match="call recv before send"):
            vecenv.send(good)
        vecenv.recv()
        with pytest.raises(RuntimeError, match="call send before recv"):
            vecenv.recv()
        for bad, message in (
            (good[:1], r"shape \(2, 3\); got shape \(1, 3\) of int64 in 0 .. 3"),
            (good + 0.5, "int64; got shape .* float64"),
            (good + 1, r"(?s)values in Box\(.*in 1 .. 4"),
        ):
            with pytest.raises(ValueError, match=message):
                vecenv.send(bad)
        vecenv.send(good)
        vecenv.recv()
        vecenv.close()
        vecenv.close()
        for call in (vecenv.recv, vecenv.reset, vecenv.notify, partial(vecenv.send, good)):
            with pytest.raises(RuntimeError, match=f"this {type(vecenv).__name__} is closed"):
                call()


def test_a_buffer_steps_when_its_turn_comes():
    with vector.make(Tick, num_envs=4, num_buffers=2, seed=3) as vecenv:
        assert (vecenv.num_buffers, vecenv.num_agents, vecenv.agents_per_batch) == (2, 4, 2)
        vecenv.async_reset(3)
        counts = []
        for _ in range(4):
            obs, *_ = vecenv.recv()
            counts.append(obs[:, 1].tolist())
            vecenv.send(jax.numpy.zeros(2, int))  # may still be computed, and is not waited for
            assert obs[:, 1].tolist() == counts[-1]
        assert counts == [[0, 0], [0, 0], [1, 1], [1, 1]]
        vecenv.recv()
        with pytest.raises(ValueError, match=r"shape \(2,\); got shape \(3,\)"):
            vecenv.send(jax.numpy.zeros(3, int))
        own = np.zeros(2, int)
        vecenv.send(own)
        own[:] = 99  # too late to be played
        np.testing.assert_array_equal(vecenv.pending[0], 0)
        vecenv.async_reset(3)  # forgets the steps under way
        assert vecenv.recv()[0][:, 1].tolist() == [0, 0]
        assert vecenv.pending == [None, None]


def not_puffer(buf=None, seed=0):
    return Native()


@pytest.mark.parametrize(
    ("creator", "options", "message"),
    [
        (Walk, {"num_envs": 0}, "num_envs must be an integer of at least 1; got 0"),
        (Walk, {"backend": "Serail"}, "one of Serial, Multiprocessing, Ray; got 'Serail'"),
        (Walk, {"backend": 3}, "backend must be a class"),
        (Walk, {"num_worker": 3}, "no option 'num_worker'; did you mean 'num_workers'"),
        (Walk, {"num_envs": 4} | workers(3), "num_workers must divide num_envs; got 3 and 4"),
        (Walk, {"num_envs": 4, **workers(10**6), "overwork": False}, "10+, but there are .* cores"),
        (Walk, {"num_envs": 4, "batch_size": 5} | workers(2), r"1 .. num_envs \(4\); got 5"),
        (Walk, {"num_envs": 4, "batch_size": 3} | workers(4), "multiple of batch_size; got 4 and"),
        (Walk, {"num_envs": 4, "batch_size": 1} | workers(2), r"one worker \(4 / 2\); got 1"),
        (Walk, {"num_envs": 4, "num_buffers": 3}, "divide the number of environments, 4; got 3"),
        (Walk, {"num_buffers": 0}, "divide the number of environments, 1; got 0"),
        (Walk, {"num_buffers": 1} | workers(1), "num_buffers is Serial's; Multiproc.* batch_size"),
        (Walk, {"local_worker": True}, "is Multiprocessing's; Serial has restart_failed"),
        (
            Walk,
            {"num_envs": 4} | workers(4, local_worker=True, batch_size=2),
            "batch_size, which must be at least num_workers; got 4, 2 and 4",
        ),
        (
            Walk,
            {"num_envs": 4} | workers(2, local_worker=True, batch_size=3, zero_copy=False),
            "num_envs must be a multiple of batch_size; got 4 and 3",
        ),
        (Walk, workers(0), "num_workers must be at least 1; got 0"),
        (3, {}, "creator 0 must be callable, or a name; got 3"),
        ([Walk], {"num_envs": 2}, r"creators must be a list of num_envs \(2\)"),
        ([Walk], {"env_args": [3]}, "env_args of environment 0 must be a list; got 3"),
        (Walk, {"env_kwargs": [3]}, "env_kwargs of environment 0 must be a dict"),
        (dict, {}, "returned .*dict.*expected an environment of gymnasium"),
        (lambda: Native(), {}, "must take its buffers: `def creator"),
        (not_puffer, {}, "does not write into the buffers it was given"),
        (lambda: gymnasium.make_vec("CartPole-v1", 2), {}, "is a vector of environments"),
        (lambda: puffer_jax.environments.make("squared"), {}, "use puffer_jax.vector.JaxVecEnv"),
        ([Walk, Tick], {"num_envs": 2}, "environments differ: expected AgentLayout"),
    ],
)
def test_what_cannot_be_made(creator, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        vector.make(creator, **options)


def test_choices():
    with vector.make(Tick, num_envs=6, backend="Multiprocessing", batch_size="auto") as vecenv:
        assert vecenv.agents_per_batch == 3 and 1 <= len(vecenv.pids) <= 6
    with vector.make(Tick, num_envs=6, batch_size=2, num_workers="auto") as vecenv:
        assert vecenv.num_agents == 2  # quirk kept
    for options in (workers(2), workers(2, local_worker=True)):
        with vector.make(Native, num_envs=2, **options) as vecenv:
            first = vecenv.reset(1)[0].copy()
            vecenv.notify()
            second = vecenv.reset()[0]
            np.testing.assert_array_equal(second[:2], second[2:])  # each had been told
            assert not vecenv.emulated and (first[:2] != first[2:]).all()
    env = partial(gymnasium.make, "CartPole-v1")  # takes any keyword, and must not get `buf`
    with vector.make(env, num_envs=2) as vecenv:
        assert vecenv.reset(0)[0].shape == (2, 4)
    with vector.make("CartPole-v1", num_envs=2, **workers(1)) as vecenv:
        assert vecenv.reset(0)[0].shape == (2, 4)


def test_workers_are_light_and_sleep():
    vecenv = vector.make(Modules, num_envs=2, **workers(2))
    vecenv.reset(0)
    *_, infos = vecenv.step(np.zeros(2, int))
    assert [info["pid"] for info in infos] == vecenv.pids and os.getpid() not in vecenv.pids
    for info in infos:
        assert {"jax", "jaxlib", "flax", "torch"}.isdisjoint(info["modules"])
        assert "pufferlib" not in info["modules"] and "support.vector_envs" in info["modules"]
        assert info["main"] is None and info["platforms"] == "cpu"
    stats = [Path(f"/proc/{pid}/stat") for pid in vecenv.pids]
    if stats[0].exists():
        time.sleep(0.05)  # they stay awake for a moment
        before = [stat.read_text().rsplit(")")[1].split() for stat in stats]
        time.sleep(0.3)
        after = [stat.read_text().rsplit(")")[1].split() for stat in stats]
        assert [state[0] for state in after] == ["S", "S"]
        assert [state[11:13] for state in after] == [state[11:13] for state in before]  # no tick
    pids = vecenv.pids
    del vecenv
    gc.collect()
    assert not [pid for pid in pids if alive(pid)]
    with vector.make(Modules, num_envs=2, **workers(2, local_worker=True)) as vecenv:
        vecenv.reset(0)
        *_, infos = vecenv.step(np.zeros(2, int))
        assert [info["pid"] for info in infos] == [*vecenv.pids, os.getpid()]
        assert len(vecenv.pids) == 1


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_script_needs_no_guard(tmp_path):
    """Nothing here is importable: neither the script nor what it defines."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
import gymnasium
import numpy as np
import puffer_jax

print("started")
size = 3

class Env(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (size,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.full(size, seed, np.float32), {}

vecenv = puffer_jax.vector.make(
    lambda: Env(), num_envs=2, backend=puffer_jax.vector.Multiprocessing
)
print(vecenv.reset(4)[0].tolist())
loaded = {"jax", "torch", "ray", "pettingzoo"} & set(sys.modules)
print(sorted(loaded))
"""
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines() == ["started", "[[4.0, 4.0, 4.0], [5.0, 5.0, 5.0]]", "[]"]
    assert (result.returncode, result.stderr) == (0, "")


def test_an_extra_that_is_missing(monkeypatch):
    for name, extra, options in (
        ("cloudpickle", "vector", workers(1)),
        ("ray", "ray", {"backend": "Ray"}),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ImportError, match=rf"pip install 'puffer_jax\[{extra}\]'"):
                vector.make(Tick, **options)


def test_jax_vecenv():
    """A gym-like loop over a JAX-native environment: its episodes, and their seeds."""
    env = puffer_jax.environments.make("cartpole")
    with JaxVecEnv(env, 3, seed=7) as vecenv:
        default = vecenv.reset()[0].copy()
        one, two = play(vecenv, 60, seed=7), play(vecenv, 60, seed=8)
        assert as_host_env(vecenv).shows_final
    with JaxVecEnv(env, 3) as vecenv:
        same(play(vecenv, 60, seed=7), one)
    observations, rewards, terminals, truncations, _ = one[0]
    np.testing.assert_array_equal(observations[0], default)
    np.testing.assert_array_equal(observations[:, 1:][0], two[0][0][:, :-1][0])  # seed + i
    assert terminals.any() and not truncations.any() and observations.dtype == np.float32
    # As an emulated environment: no reward in the step after an end, which starts anew.
    after = np.roll(terminals, 1, axis=0)[1:]
    assert not rewards[1:][after].any() and rewards[1:][~after].all()
    assert (np.abs(observations[1:][after]) <= 0.05).all()
    assert (np.abs(observations[terminals]).max(-1) > 0.2).all()


class Shown:
    """JAX-native, structured: counts, and echoes its action."""

    observation_space = spaces.Dict(
        {"flag": spaces.Box(0, 1, (), np.bool_), "at": spaces.Box(-9, 9, (2,), np.float32)}
    )
    action_space = Box(-1, 1, (2,))

    def reset(self, key):
        return {"flag": False, "at": jax.numpy.zeros(2)}, jax.numpy.int32(0)

    def step(self, key, state, action):
        obs = {"flag": state % 2 == 0, "at": action * (state + 1)}
        return obs, state + 1, 1.0, False, state == 2, {"count": state}


def test_jax_vecenv_packs_structured_observations():
    with JaxVecEnv(Shown(), 2) as vecenv:
        vecenv.reset(0)
        native = puffer_jax.nativize_dtype(vecenv.driver_env.emulated)
        actions = np.array([[0.5, -0.5], [1, 0]], np.float32)
        got = [tuple(np.array(a) for a in vecenv.step(actions)) for _ in range(4)]
    for i, (obs, rewards, terminals, truncations, (info,)) in enumerate(got):
        leaves = puffer_jax.nativize_tensor(obs, native)
        np.testing.assert_array_equal(leaves["at"], actions * (i + 1) if i < 3 else 0 * actions)
        assert np.array(leaves["flag"]).ravel().tolist() == [i in (0, 2)] * 2
        assert rewards.tolist() == [i < 3] * 2 and truncations.tolist() == [i == 2] * 2
        assert not terminals.any() and (i == 3 or info["count"].tolist() == [i, i])


class Numbers:
    """JAX-native: shows the last action, a number that does not start at 0."""

    observation_space = gymnasium.spaces.Discrete(500, start=-2)
    action_space = gymnasium.spaces.Discrete(400, start=10)

    def reset(self, key):
        return jax.numpy.int32(-2), 0

    def step(self, key, state, action):
        return action, 0, 0.0, False, False, {}


def test_jax_vecenv_hands_out_numbers():
    with JaxVecEnv(Numbers(), 2) as vecenv:
        assert vecenv.single_action_space == gymnasium.spaces.Discrete(400)
        assert vecenv.reset(0)[0].tolist() == [[-2], [-2]]
        assert vecenv.step(np.array([0, 399]))[0].tolist() == [[10], [409]]


def test_measure_and_autotune(capsys):
    for vecenv in (
        vector.make(Tick, env_kwargs={"pause": 0.01}, num_envs=2),
        gymnasium.vector.SyncVectorEnv([partial(Tick, pause=0.01)] * 2),
    ):
        assert 10 < vector.measure(vecenv, 0.1) < 101
        vecenv.close()
    trials = vector.autotune(
        partial(Tick, pause=0.002), batch_size=2, max_envs=4, cores=2, seconds=0.1
    )
    backends = [trial.options["backend"] for trial in trials]
    assert backends.count(Serial) == 1 and backends.count(Multiprocessing) == len(trials) - 1 > 2
    rates = [trial.steps_per_second for trial in trials]
    assert rates == sorted(rates, reverse=True) and 10 < rates[0] < 4 / 0.002
    vector.make(Tick, **trials[0].options).close()
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"batch_size must be 1 \.\. max_envs \(1\); got 2"):
        vector.autotune(Tick, batch_size=2, max_envs=1)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("creator", "chance", "best"),
    [(Guess, 1 / 3, 1), (Together, 1 / 9, 1), (partial(Together, rivals=True), 1 / 4, 3 / 4)],
    ids=["dict", "cooperative", "competitive"],
)
def test_training(creator, chance, best, tmp_path):
    """Structured observations, and agents that work together or against each other, are learnt."""
    with vector.make(creator, num_envs=32, **workers(1)) as vecenv:
        policy = puffer_jax.Default(vecenv.driver_env, 32, rngs=nnx.Rngs(0))
        config = puffer_jax.PuffeRLConfig.recommended(
            total_timesteps=10**6,
            bptt_horizon=8,
            minibatch_size=vecenv.num_agents * 8,
            update_epochs=4,
            optimizer="adam",
            learning_rate=1e-2,
            max_grad_norm=1.5,
            ent_coef=0.0,
            anneal_lr=False,
            normalize_rewards=False,
            data_dir=str(tmp_path),
        )
        trainer = puffer_jax.PuffeRL(config, vecenv, policy)
        means = []
        for _ in range(25):
            means.append(np.mean(trainer.evaluate()["episode_return"]))
            trainer.train()
        trainer.close()
    assert abs(means[0] - chance) < 0.15 and np.mean(means[-5:]) > 0.85 * best
