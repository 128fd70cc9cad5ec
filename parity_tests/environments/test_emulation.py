"""Emulation against PufferLib's: the same bytes, rewards, flags, infos and actions; and errors."""

import copy
import subprocess
import sys
from functools import partial

import gymnasium
import numpy as np
import pufferlib
import pufferlib.emulation as reference
import pufferlib.spaces
import pufferlib.vector
import pytest
from flax import nnx
from gymnasium.spaces import (
    Box,
    Dict,
    Discrete,
    Graph,
    MultiBinary,
    MultiDiscrete,
    OneOf,
    Sequence,
    Text,
    Tuple,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pettingzoo.butterfly import knights_archers_zombies_v11
from pettingzoo.classic import connect_four_v3, rps_v2
from support.reference import generic, skeleton
from support.spaces import NESTED, containers, leaf_spaces

from puffer_jax import (
    MLP,
    Default,
    load_state_dict,
    nativize_dtype,
    nativize_tensor,
    state_dict,
    unflatten_observations,
    vector,
)
from puffer_jax.environments import Policy, emulation

# gymnasium's `contains`, which the reference calls.
CASTING = pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
BUFFERS = ("observations", "rewards", "terminals", "truncations", "masks")
DICT = Dict({"kind": Box(0, 9, (2,), np.int32), "place": Box(-1, 1, (3,), np.float32)})


class Sampled(gymnasium.Env):
    """Observations, rewards and ends drawn from the seed; keeps the actions."""

    render_mode = "ansi"

    def __init__(self, observation_space, action_space, ends=0.2, infos=True):
        self.observation_space = copy.deepcopy(observation_space)
        self.action_space = copy.deepcopy(action_space)
        self.ends, self.infos = ends, infos
        self.actions, self.options = [], []

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.observation_space.seed(seed)
            self.rng = np.random.default_rng(seed)
        self.options.append((seed, options))
        return self.observation_space.sample(), {"new": seed}

    def step(self, action):
        self.actions.append(copy.deepcopy(action))
        reward = self.rng.normal(size=3).astype(np.float32)
        form = self.rng.integers(5)
        reward = (float(reward[0]), reward[0], reward, reward.tolist(), reward[:1].reshape(()))[
            form
        ]
        ends = self.rng.random((2, 2)) < self.ends / 2
        ends = list(ends) if form > 2 else [bool(ends[0, 0]), ends[1, 0]]
        return self.observation_space.sample(), reward, *ends, {"form": form}

    def render(self):
        return "drawn"


def constant(obs, action_space=None):
    """An environment class whose observations are what `obs` says, whatever its space."""

    class Constant(Sampled):
        def step(self, action):
            self.actions.append(action)
            return obs(len(self.actions)), 0.0, False, False, {}

        def reset(self, *, seed=None, options=None):
            return obs(0), {}

    return Constant


def theirs_of(env):
    """The reference around `env`; None where it has no rows: int64 ones for int32 of Discrete."""
    try:
        return reference.GymnasiumPufferEnv(env)
    except ValueError as error:
        assert "must be a divisor" in str(error) or "larger dtype" in str(error)
        return None


def buffers_of(env):
    return {name: getattr(env, name).tobytes() for name in BUFFERS}


def draw_actions(space, rng, count):
    """(count, ...) flat actions as a vecenv sends them."""
    if isinstance(space, Box):
        draw = rng.uniform(space.low, space.high, (count, *space.shape))
        return draw.astype(space.dtype)
    sizes = getattr(space, "nvec", None)
    return rng.integers(space.n if sizes is None else sizes, size=(count, *space.shape)).astype(
        "i4"
    )


def same_actions(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        ours, theirs = tuple(ours.values()), tuple(theirs.values())
    if isinstance(ours, tuple):
        for one, other in zip(ours, theirs, strict=True):
            same_actions(one, other)
        return
    assert np.asarray(ours).dtype == np.asarray(theirs).dtype
    np.testing.assert_array_equal(ours, theirs, strict=True)


def race(ours, theirs, steps, seed=3):
    """Both with the same actions, as a vecenv uses them: what they show is the same."""
    rng = np.random.default_rng(seed)
    spaces = ("single_observation_space", "single_action_space", "num_agents", "emulated")
    for name in spaces:
        assert getattr(ours, name) == getattr(theirs, name)
    episodes = 0
    for i in range(steps):
        assert i == 0 or ours.done == theirs.done
        if ours.done:
            given = {"seed": seed} if i == 0 else {}
            (_, info), (_, their_info) = ours.reset(**given), theirs.reset(**given)
            assert info == their_info
            episodes += 1
        else:
            actions = draw_actions(ours.single_action_space, rng, ours.num_agents)
            results, their_results = ours.step(actions.copy()), theirs.step(actions.copy())
            assert results[1:] == their_results[1:]
        assert buffers_of(ours) == buffers_of(theirs)
    assert np.any(ours.observations.view(np.uint8))
    return episodes


# --- gymnasium -------------------------------------------------------------------------------


def as_int32(space):
    """The same with the dtype that is stored, as which the reference can read all spaces."""
    if isinstance(space, Dict):
        return Dict({key: as_int32(child) for key, child in space.spaces.items()})
    if isinstance(space, Tuple):
        return Tuple([as_int32(child) for child in space.spaces])
    if isinstance(space, Discrete):
        return Discrete(int(space.n), dtype=np.int32)
    if isinstance(space, MultiDiscrete):
        return MultiDiscrete(space.nvec, dtype=np.int32)
    if isinstance(space, Box) and space.dtype == np.float16:  # whose bounds it takes from float32
        return Box(0, 1, space.shape, np.float32)
    return space


DISCRETE = st.builds(Discrete, st.integers(2, 9))
ACTIONS = st.one_of(
    DISCRETE,
    st.builds(MultiDiscrete, st.lists(st.integers(2, 9), min_size=1, max_size=3)),
    st.builds(partial(Box, -1, 2), st.sampled_from([(1,), (3,)])),
    containers(st.recursive(DISCRETE, containers, max_leaves=4)),
)


@CASTING
@PROPERTY
@given(NESTED.map(as_int32), ACTIONS, st.integers(0, 99))
def test_same_as_the_reference_on_random_spaces(observation_space, action_space, seed):
    envs = [Sampled(observation_space, action_space) for _ in range(2)]
    ours = emulation.GymnasiumPufferEnv(envs[0])
    assert race(ours, reference.GymnasiumPufferEnv(envs[1]), 12, seed) >= 1
    assert len(envs[0].actions) == len(envs[1].actions) > 0
    for action, expected in zip(envs[0].actions, envs[1].actions, strict=True):
        same_actions(action, expected)
        assert action in action_space


@PROPERTY
@given(st.one_of(NESTED, leaf_spaces()))
def test_rows_hold_the_observations(space):
    """Also where the reference has no rows for them, and as `nativize_tensor` reads them."""
    env = emulation.GymnasiumPufferEnv(Sampled(space, Discrete(2)))
    env.reset(seed=1)
    twin = copy.deepcopy(space)
    twin.seed(1)
    observation = twin.sample()
    if isinstance(space, MultiBinary | Box | MultiDiscrete | Discrete):
        stored = "i4" if isinstance(space, MultiDiscrete | Discrete) else space.dtype
        expected = np.asarray(observation, stored)
    else:
        expected = np.zeros((), reference.dtype_from_space(space))
        reference.emulate(expected, observation)
    assert env.observations.tobytes() == expected.tobytes()
    if not isinstance(space, Box):
        native = nativize_tensor(env.observations, nativize_dtype(env.emulated))
        first = native
        while isinstance(first, dict):
            first = next(iter(first.values()))
        leaf = expected
        while leaf.dtype.names:
            leaf = leaf[leaf.dtype.names[0]]
        np.testing.assert_array_equal(np.asarray(first).ravel(), leaf.ravel())


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "Blackjack-v1"])
def test_same_as_the_reference_on_gymnasium(name):
    ours = emulation.GymnasiumPufferEnv(name, env_kwargs={"max_episode_steps": 30})
    theirs = theirs_of(gymnasium.make(name, max_episode_steps=30))
    if theirs is not None:
        assert race(ours, theirs, 100) > 2
        return
    assert name == "Blackjack-v1"  # a Tuple of three Discrete
    inner = gymnasium.make(name)
    observation, _ = inner.reset(seed=5)
    ours.reset(seed=5)
    steps = 0
    for i in range(30):
        np.testing.assert_array_equal(ours.observations.view(np.int32), [observation])
        if ours.done:
            observation, _ = inner.reset()
            ours.reset()
            continue
        observation, reward, *ends, _ = inner.step(i % 2)
        assert ours.step(np.array([i % 2]))[1:4] == (reward, *ends)
        assert ours.rewards[0] == reward
        steps += 1
    assert steps > 10


@pytest.mark.parametrize(
    ("space", "observation", "numbers"),
    [
        (Discrete(500), 300, [300]),
        (Discrete(5, start=-2), -2, [-2]),
        (Discrete(2**31 - 1), 2**31 - 2, [2**31 - 2]),
        (Discrete(500, dtype=np.int16), np.int16(300), [300]),
        (MultiDiscrete([500, 2, 300]), np.array([300, 1, 299]), [300, 1, 299]),
        (MultiDiscrete([[5, 6], [7, 800]], start=[[0, 1], [-9, 0]]), [[4, 1], [-9, 799]], None),
        (
            MultiDiscrete(np.array([5, 6], np.int8), dtype=np.int8),
            np.array([4, 5], np.int8),
            [4, 5],
        ),
        (Discrete(500, dtype=np.int32), 300, [300]),
    ],
    ids=str,
)
def test_discrete_observations_are_numbers(space, observation, numbers):
    """What a policy reads is what it reads without emulation: its weights fit both."""
    numbers = np.ravel(observation).tolist() if numbers is None else numbers
    make = constant(lambda i: observation)
    raw = make(space, Discrete(2))
    env = emulation.GymnasiumPufferEnv(raw)
    rows, _ = env.reset()
    assert rows.dtype == np.int32 and rows.tolist() == [numbers]
    assert env.single_observation_space.contains(rows[0])
    with vector.make(lambda: make(space, Discrete(2)), num_envs=3) as vecenv:
        assert vecenv.reset()[0].tolist() == [numbers] * 3
    native = nativize_dtype(env.emulated)
    np.testing.assert_array_equal(np.asarray(nativize_tensor(rows, native)).ravel(), numbers)
    same = np.asarray(unflatten_observations(rows, space))
    np.testing.assert_array_equal(same, np.asarray(observation)[None])
    policies = [generic(lambda e=e: Default(e, 4, rngs=nnx.Rngs(0))) for e in (raw, env)]
    shapes = [{n: w.shape for n, w in state_dict(policy).items()} for policy in policies]
    assert shapes[0] == shapes[1] and shapes[0]["encoder.0.weight"] == (4, len(numbers))
    load_state_dict(policies[1], state_dict(policies[0]))
    hidden = [
        policy.encode_observations(x)
        for policy, x in zip(policies, (np.asarray(observation)[None], rows), strict=True)
    ]
    np.testing.assert_array_equal(*map(np.asarray, hidden))
    if space.dtype == np.int32:  # then the reference has rows, too
        theirs = theirs_of(raw)
        assert env.single_observation_space == theirs.single_observation_space
        assert theirs.reset()[0].tolist() == rows.tolist()


@pytest.mark.parametrize("space", [Discrete(5), MultiDiscrete([2, 3]), Box(-1, 1, (2,))], ids=str)
@pytest.mark.parametrize("actions", [Discrete(2), Box(-1, 1, (2,))], ids=str)
def test_the_same_policy_is_chosen_with_and_without_emulation(space, actions):
    raw = Sampled(space, actions)
    chosen = [
        type(skeleton(lambda e=e: Policy(e, rngs=nnx.Rngs(0))))
        for e in (raw, emulation.GymnasiumPufferEnv(raw))
    ]
    assert chosen == [MLP if isinstance(actions, Box) else Default] * 2


def test_in_the_vecenvs_of_the_reference():
    """Duck typing but for an `isinstance`, which a class of both passes."""

    class Ours(emulation.GymnasiumPufferEnv, reference.GymnasiumPufferEnv):
        pass

    creators = [Ours, reference.GymnasiumPufferEnv]
    make = partial(Sampled, DICT, Tuple((Discrete(3), Discrete(2))))
    vecs = [
        pufferlib.vector.make(c, env_kwargs={"env_creator": make}, backend="Serial", num_envs=3)
        for c in creators
    ]
    assert vecs[0].emulated == vecs[1].emulated
    results = [vec.reset(seed=4) for vec in vecs]
    for _ in range(20):
        for one, other in zip(*results, strict=True):
            np.testing.assert_array_equal(one, other)
        actions = vecs[0].action_space.sample().astype(np.int32)
        results = [vec.step(actions) for vec in vecs]


@PROPERTY
@given(
    containers(
        st.one_of(
            st.builds(
                lambda n, start: Discrete(n, start=start),
                DISCRETE.map(lambda d: int(d.n)),
                st.integers(-5, 5),
            ),
            st.just(MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[1, 0], [2, -3]]))),
            st.just(MultiBinary([2, 2])),
        )
    ),
    st.integers(0, 99),
)
def test_actions_the_reference_cannot_nest(space, seed):
    env = emulation.GymnasiumPufferEnv(Sampled(Box(0, 1, (1,)), space, ends=0))
    env.reset()
    flat = draw_actions(env.action_space, np.random.default_rng(seed), 1)
    env.step(flat)
    env.step(env.action_space.nvec - 1)
    env.step(np.zeros_like(env.action_space.nvec))
    action, highest, lowest = env.env.actions
    assert all(one in space for one in (action, highest, lowest))

    def numbers(action):
        if isinstance(action, dict | tuple):
            parts = action.values() if isinstance(action, dict) else action
            return [n for part in parts for n in numbers(part)]
        return np.ravel(action).tolist()

    np.testing.assert_array_equal(np.subtract(numbers(action), numbers(lowest)), flat[0])
    span = np.subtract(numbers(highest), numbers(lowest))
    np.testing.assert_array_equal(span, env.action_space.nvec - 1)


def test_actions_that_do_not_start_at_0():
    env = emulation.GymnasiumPufferEnv(Sampled(Box(0, 1, (1,)), Discrete(3, start=5), ends=0))
    assert env.action_space == Discrete(3)
    env.reset()
    for action in (0, np.array([2], np.int32)):
        env.step(action)
    assert env.env.actions == [5, 7]
    space = MultiDiscrete([2, 4], start=[10, 20])
    env = emulation.GymnasiumPufferEnv(Sampled(Box(0, 1, (1,)), space, ends=0))
    assert env.action_space == MultiDiscrete([2, 4])
    env.reset()
    env.step(np.array([[1, 3]], np.int32))
    np.testing.assert_array_equal(env.env.actions, [[11, 23]])


def test_actions_of_other_dtypes_and_shapes():
    """By their values: the reference reads int64 as pairs of int32, and flattens a Box."""
    space = Tuple((Discrete(3), Discrete(2)))
    env = emulation.GymnasiumPufferEnv(Sampled(DICT, space, ends=0))
    env.reset()
    for action in (np.array([2, 1]), [2, 1], np.array([[2, 1]], np.uint8)):
        env.step(action)
    assert env.env.actions == [(2, 1)] * 3

    env = emulation.GymnasiumPufferEnv(Sampled(DICT, Box(-1, 1, (2, 2)), ends=0))
    env.reset()
    action = np.arange(4, dtype=np.float32).reshape(1, 2, 2) / 4
    env.step(action)
    kept = env.env.actions[0]
    assert kept.shape == (2, 2) and kept.dtype == np.float32
    np.testing.assert_array_equal(kept, action[0])

    # What a vecenv sends is a view of a buffer that it writes to again.
    kept_env = constant(lambda i: np.zeros(1, np.float32))(Box(0, 1, (1,)), MultiDiscrete([2, 2]))
    env = emulation.GymnasiumPufferEnv(kept_env)
    env.reset()
    action = np.ones((1, 2), np.int32)
    env.step(action)
    action[:] = 0
    np.testing.assert_array_equal(kept_env.actions, [[1, 1]])


def test_simple_values_are_taken():
    """Python numbers and lists, other integers, NumPy scalars: what the space contains."""
    space = Dict(
        {
            "a": Discrete(3),
            "b": Box(0, 1, (2,), np.float64),
            "c": Box(0, 1, ()),
            "d": MultiBinary(2),
            "e": Tuple((Discrete(2, start=-1), MultiDiscrete([2, 3]))),
        }
    )
    values = [
        {
            "a": np.int64(2),
            "b": np.array([0.5, 1], np.float32),
            "c": np.float32(0.5),
            "d": np.array([1, 0], np.int64),
            "e": (-1, np.array([1, 2])),
        },
        {"a": np.array(1), "b": [0.25, 0.5], "c": 0.25, "d": [1, 1], "e": [0, [0, 1]]},
    ]
    env = emulation.GymnasiumPufferEnv(constant(values.__getitem__)(space, Discrete(2)))
    env.reset()
    row = env.observations.view(env.emulated["emulated_observation_dtype"])[0, 0]
    for i, (a, b, c, d, e, f) in enumerate(
        [(2, [0.5, 1], 0.5, [1, 0], -1, [1, 2]), (1, [0.25, 0.5], 0.25, [1, 1], 0, [0, 1])]
    ):
        if i:
            env.step(0)
        np.testing.assert_array_equal(row["b"], b)
        np.testing.assert_array_equal(row["d"], d)
        np.testing.assert_array_equal(row["e"]["f1"], f)
        assert (row["a"], row["c"], row["e"]["f0"]) == (a, c, e)


def test_buffers_that_are_handed_in():
    for teacher in (True, False):
        whole = {
            "observations": np.zeros((4, 5), np.float32),
            "rewards": np.zeros(4, np.float32),
            "actions": np.zeros((4, 2), np.int32),
        }
        whole |= {name: np.zeros(4, bool) for name in ("terminals", "truncations", "masks")}
        if teacher:
            whole["teacher_actions"] = np.zeros((4, 2), np.int32)
        space = Tuple((Box(0, 1, (3,)), Box(1, 2, (2,))))
        made = Sampled(space, Dict({"a": Discrete(2), "b": Discrete(3)}), ends=1)
        part = {name: array[2:3] for name, array in whole.items()}
        env = emulation.GymnasiumPufferEnv(made, buf=part)
        env.reset(seed=0)
        assert whole["masks"].tolist() == [False, False, True, False]
        assert np.all(whole["observations"][2]) and not np.any(whole["observations"][[0, 1, 3]])
        while not env.done:
            _, reward, terminated, truncated, _ = env.step(np.zeros((1, 2), np.int32))
        assert whole["rewards"][2] == np.float32(reward) != 0
        ended = whole["terminals"][2], whole["truncations"][2]
        assert ended == (terminated, truncated) and any(ended)
        assert env.actions.base is whole["actions"]
        assert env.teacher_actions.shape == (1, 2)
        assert (env.teacher_actions.base is whole.get("teacher_actions", 0)) == teacher
        env.reset()
        assert not (
            whole["rewards"].any() or whole["terminals"].any() or whole["truncations"].any()
        )


@pytest.mark.parametrize(
    "space", [Discrete(3), MultiDiscrete([2, 3]), Box(-1, 1, (2,), np.float64)]
)
def test_spaces_and_buffers_of_several_agents(space):
    joint, expected = emulation.joint_space(space, 3), pufferlib.spaces.joint_space(space, 3)
    assert joint == expected and joint.dtype == expected.dtype
    envs = [
        type(
            "Env",
            (),
            {
                "num_agents": 3,
                "single_observation_space": Box(0, 1, (4, 2)),
                "single_action_space": space,
            },
        )()
        for _ in range(2)
    ]
    emulation.set_buffers(envs[0])
    pufferlib.set_buffers(envs[1])
    for name in (*BUFFERS, "actions", "teacher_actions"):
        one, other = (getattr(env, name) for env in envs)
        np.testing.assert_array_equal(one, other, strict=True)
    with pytest.raises(ValueError, match="Discrete, MultiDiscrete or Box: MultiBinary"):
        emulation.joint_space(MultiBinary(3), 2)


def test_seeds_and_options():
    env = emulation.GymnasiumPufferEnv(Sampled(DICT, Discrete(2)), seed=7)
    for given_ in ({}, {}, {"seed": 3}, {"options": {"level": 2}}):
        env.reset(**given_)
    env.seed(9)
    env.reset()
    seeds = [(7, None), (None, None), (3, None), (None, {"level": 2}), (9, None)]
    assert env.env.options == seeds
    env = emulation.GymnasiumPufferEnv(Sampled(DICT, Discrete(2)), seed=7)
    env.reset(seed=0)
    env.reset()
    assert env.env.options == [(0, None), (None, None)]


def test_ways_to_make_one():
    made = Sampled(DICT, Discrete(2))
    for env in (
        emulation.GymnasiumPufferEnv(made),
        emulation.GymnasiumPufferEnv(env_creator=Sampled, env_args=[DICT, Discrete(2)]),
        emulation.GymnasiumPufferEnv(
            env_creator=Sampled, env_args=(DICT,), env_kwargs={"action_space": Discrete(2)}
        ),
        emulation.GymnasiumPufferEnv(None, lambda: made, None, None),
    ):
        assert isinstance(env.env, Sampled) and env.single_action_space == Discrete(2)
        assert (env.render_mode, env.render()) == ("ansi", "drawn")
        assert env.unwrapped is env and env.metadata is env.env.metadata
        assert env.observation_space is env.single_observation_space
        assert env.agent_ids.tolist() == [0] and env.is_obs_emulated and not env.is_atn_emulated
    for id_given in ({"env": "CartPole-v1"}, {"env_creator": "CartPole-v1"}):
        env = emulation.GymnasiumPufferEnv(**id_given, env_kwargs={"render_mode": "rgb_array"})
        assert env.env.spec.id == "CartPole-v1" and env.render_mode == "rgb_array"
        env.close()


MAKE_ERRORS = [
    ({}, ValueError, "either env or env_creator"),
    ({"env": Sampled(DICT, Discrete(2)), "env_creator": Sampled}, ValueError, "either env or"),
    ({"env": Sampled}, TypeError, "Sampled'> as env_creator"),
    ({"env_creator": 3}, TypeError, "must be callable, got 3"),
]


@pytest.mark.parametrize("kind", [emulation.GymnasiumPufferEnv, emulation.PettingZooPufferEnv])
@pytest.mark.parametrize(("arguments", "error", "match"), MAKE_ERRORS)
def test_what_is_no_environment(kind, arguments, error, match):
    with pytest.raises(error, match=match):
        kind(**arguments)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "error", "match"),
    [
        (Text(3), Discrete(2), TypeError, r"<Sampled instance>: unsupported space Text"),
        (Dict({"a": Sequence(Discrete(2))}), Discrete(2), TypeError, "unsupported space Sequence"),
        (Tuple((Graph(Discrete(2), None),)), Discrete(2), TypeError, "unsupported space Graph"),
        (OneOf((Discrete(2), DICT)), Discrete(2), TypeError, "unsupported space OneOf"),
        (DICT, Text(3), TypeError, "<Sampled instance>: unsupported space Text"),
        (DICT, Dict({"a": Box(0, 1, (2,))}), ValueError, "<Sampled .* cannot hold Box.*only discr"),
        (Dict({}), Discrete(2), ValueError, "<Sampled instance>: .*non-empty string keys"),
        (Dict({1: Discrete(2)}), Discrete(2), ValueError, "non-empty string keys"),
        (Tuple((Discrete(2**40),)), Discrete(2), ValueError, "Discrete.* does not fit in int32"),
    ],
)
def test_spaces_that_are_not_supported(observation_space, action_space, error, match):
    env = Sampled(DICT, Discrete(2))
    env.observation_space, env.action_space = observation_space, action_space
    with pytest.raises(error, match=match):
        emulation.GymnasiumPufferEnv(env)


WRONG = [
    (Box(0, 1, (3,)), np.zeros(1, np.float32), "float32 of shape \\(1,\\) instead of Box"),
    (Box(0, 1, (3,)), np.zeros(3), "float64 of shape \\(3,\\) instead of Box"),
    (Box(0, 1, (3,)), None, "NoneType instead of Box"),
    (Box(0, 9, (2,), np.int8), [0.5, 1], "list instead of Box"),
    (Discrete(3), 3, "int instead of Discrete"),
    (Discrete(3), 1.0, "float instead of Discrete"),
    (Discrete(3, start=1), np.int64(0), "int64 of shape \\(\\) instead of Discrete"),
    (MultiDiscrete([2, 2]), [0, 2], "list instead of MultiDiscrete"),
    (MultiBinary(2), np.array([0, 2]), "int64 of shape \\(2,\\) instead of MultiBinary"),
    (Dict({"a": Discrete(2)}), {"b": 1}, "'a'.*{b: int}"),
    (Dict({"a": Discrete(2)}), {"a": 1, "b": 1}, "2 parts instead of 1"),
    (Dict({"a": Discrete(2)}), np.zeros(1, int), "int64 of shape \\(1,\\)"),
    (Tuple((Discrete(2), Discrete(2))), (1,), "1 parts instead of 2"),
    (Dict({"a": Tuple((DICT,))}), {"a": ({"kind": np.zeros(2, np.int32)},)}, "1 parts instead of"),
]


@pytest.mark.parametrize(("space", "wrong", "match"), WRONG)
@pytest.mark.parametrize("at", [0, 2])
def test_observations_outside_their_space(space, wrong, match, at):
    """At every step, not just in the first, as NumPy would cast and broadcast them."""
    right = space.sample()
    env = constant(lambda i: wrong if i == at else right)(space, Discrete(2))
    env = emulation.GymnasiumPufferEnv(env)
    with pytest.raises(ValueError, match=match) as raised:
        env.reset()
        for i in range(2):
            assert i < at
            env.step(0)
    assert "<Constant instance>" in str(raised.value) and repr(space) in str(raised.value)


def test_the_first_observation_is_within_bounds():
    env = constant(lambda i: np.full(2, 2, np.float32))(Box(0, 1, (2,)), Discrete(2))
    with pytest.raises(ValueError, match=r"float32 of shape \(2,\) instead of Box.*array"):
        emulation.GymnasiumPufferEnv(env).reset()


@pytest.mark.parametrize(
    ("space", "action", "match"),
    [
        (Discrete(3), 3, "Discrete\\(3\\): int, 3"),
        (Discrete(3), 1.0, "float, 1.0"),
        (Discrete(3), None, "NoneType, None"),
        (Discrete(3), np.array([1, 2]), "int64 of shape \\(2,\\)"),
        (MultiDiscrete([2, 3]), np.array([0, 3]), "int64 of shape"),
        (MultiDiscrete([2, 3]), np.array([1]), "int64 of shape \\(1,\\)"),
        (Box(-1, 1, (2,)), np.full((1, 2), 3, np.float32), "float32 of shape \\(1, 2\\)"),
        (Box(0, 5, (2,), np.int64), np.array([0.5, 1]), "float64 of shape"),
        (Dict({"a": Discrete(2), "b": Discrete(2)}), np.array([0, -1]), "MultiDiscrete\\(\\[2 2"),
        (Dict({"a": Discrete(2)}), {"a": 1}, "{a: int}"),
    ],
)
def test_actions_outside_their_space(space, action, match):
    env = emulation.GymnasiumPufferEnv(Sampled(Box(0, 1, (1,)), space, ends=0))
    env.reset()
    with pytest.raises(ValueError, match=f"<Sampled instance>: an action is not .*{match}"):
        env.step(action)
    env.step(np.zeros(env.action_space.shape, env.actions.dtype))
    if match.startswith("int64 of shape \\(") or "float64" in match:  # shape and dtype: always
        with pytest.raises(ValueError, match=match):
            env.step(action)


def test_steps_out_of_turn():
    single = emulation.GymnasiumPufferEnv(Sampled(DICT, Discrete(2), ends=1))
    several = emulation.PettingZooPufferEnv(Crowd(DICT, Discrete(2)))
    for env, action in ((single, 0), (several, np.zeros(4, int))):
        assert env.done
        with pytest.raises(
            RuntimeError, match=r"(<Sampled instance>|crowd): step\(\) before reset"
        ):
            env.step(action)
        env.reset(seed=0)
        while not env.done:
            env.step(action)
        with pytest.raises(RuntimeError, match="after the episode's end; call reset"):
            env.step(action)


# --- PettingZoo ------------------------------------------------------------------------------


class Crowd:
    """A parallel environment whose agents come and go."""

    metadata = {"name": "crowd"}  # noqa: RUF012
    render_mode = None

    def __init__(self, observation_space, action_space, all_first=True):
        self.possible_agents = [f"agent_{i}" for i in range(4)]
        self.spaces = {a: copy.deepcopy(observation_space) for a in self.possible_agents}
        self.acting = copy.deepcopy(action_space)
        self.all_first, self.actions, self.agents, self.closed = all_first, [], [], False

    def __str__(self):
        return "crowd"

    def observation_space(self, agent):
        return self.spaces[agent]

    def action_space(self, agent):
        return self.acting

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
            for i, space in enumerate(self.spaces.values()):
                space.seed(seed + i)
        self.agents = list(self.possible_agents) if self.all_first else self.possible_agents[1:3]
        self.time = 0
        return {a: self.spaces[a].sample() for a in self.agents}, {a: {} for a in self.agents}

    def step(self, actions):
        assert set(actions) <= set(self.agents)
        self.actions.append(copy.deepcopy(actions))
        self.time += 1
        last = self.time == 8
        acted, ends = self.agents, self.rng.random(4) < 0.2
        done = {a: bool(ends[i] or last) for i, a in enumerate(acted)}
        cut = {a: False for a in acted}
        rewards = {a: float(self.rng.normal()) for a in acted}
        self.agents = [a for a in acted if not done[a]]
        if self.agents and self.time == 5:  # who is absent comes back
            self.agents = list(self.possible_agents)
        # Who is not there any more, yet acted, has a last observation.
        return {a: self.spaces[a].sample() for a in acted}, rewards, done, cut, {"time": self.time}

    def render(self):
        return "drawn"

    def close(self):
        self.closed = True


@CASTING
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.one_of(NESTED.map(as_int32), st.just(Box(0, 1, (3, 2)))), ACTIONS, st.integers(0, 99))
def test_several_agents_as_in_the_reference(observation_space, action_space, seed):
    envs = [Crowd(observation_space, action_space) for _ in range(2)]
    ours = emulation.PettingZooPufferEnv(envs[0])
    theirs = reference.PettingZooPufferEnv(envs[1])
    assert race(ours, theirs, 40, seed) > 3
    assert ours.mask == theirs.mask and ours.agents == theirs.agents
    assert len(envs[0].actions) == len(envs[1].actions) > 20
    assert {len(actions) for actions in envs[0].actions} > {4}
    for mine, other in zip(envs[0].actions, envs[1].actions, strict=True):
        same_actions(mine, other)


def test_same_as_the_reference_on_pettingzoo():
    """Knights that die; a game of turns with Dict observations, by PettingZoo's converter."""
    from pettingzoo.utils.conversions import turn_based_aec_to_parallel

    make = partial(knights_archers_zombies_v11.parallel_env, max_cycles=150)
    ours, theirs = emulation.PettingZooPufferEnv(make()), reference.PettingZooPufferEnv(make())
    assert race(ours, theirs, 200) >= 2
    assert theirs.single_observation_space.dtype == np.float64

    ours = emulation.PettingZooPufferEnv(env_creator=connect_four_v3.raw_env)
    theirs = reference.PettingZooPufferEnv(turn_based_aec_to_parallel(connect_four_v3.raw_env()))
    for env in (ours, theirs):
        env.reset(seed=1)
    assert ours.observations.any() and ours.single_observation_space.shape == (91,)
    for i in range(7):  # the first player fills a column
        actions = np.array([3, 4 + i % 2])
        results = [env.step(actions) for env in (ours, theirs)]
        assert results[0][1:] == results[1][1:]
        assert buffers_of(ours) == buffers_of(theirs)
    assert ours.done and theirs.done and ours.rewards.tolist() == [1, -1]


def test_pettingzoo_where_the_reference_has_no_rows():
    theirs = reference.PettingZooPufferEnv(rps_v2.parallel_env())
    assert theirs.single_observation_space.shape == (0,)
    for env in (rps_v2.parallel_env(), rps_v2.env()):
        env = emulation.PettingZooPufferEnv(env)
        env.reset(seed=0)
        assert env.observations.view(np.int32).tolist() == [[3], [3]]  # nothing played yet
        env.step(np.array([1, 0], np.int32))
        assert env.observations.view(np.int32).tolist() == [[0], [1]]  # what the other played
        assert env.rewards.tolist() == [1, -1]
        assert not env.done


def test_agents_that_are_absent():
    ours = emulation.PettingZooPufferEnv(Crowd(DICT, Discrete(2), all_first=False))
    theirs = reference.PettingZooPufferEnv(Crowd(DICT, Discrete(2), all_first=False))
    rows, _ = ours.reset(seed=3)
    theirs.reset(seed=3)
    assert ours.observations.tobytes() == theirs.observations.tobytes()
    assert [bool(row.any()) for row in rows.values()] == [False, True, True, False]
    assert ours.masks.tolist() == [False, True, True, False]
    assert theirs.masks.all()  # unlike ours
    assert ours.mask == theirs.mask
    while not ours.done:
        results = [env.step({a: 1 for a in ours.possible_agents}) for env in (ours, theirs)]
        assert results[0][1:] == results[1][1:]
        assert buffers_of(ours) == buffers_of(theirs)


class Script:
    """A parallel environment that plays what is written: (agents left, what `step` returns)."""

    metadata = {"name": "script"}  # noqa: RUF012
    possible_agents = ["a", "b"]  # noqa: RUF012
    render_mode = None

    def __init__(self, first, steps):
        self.first, self.steps = first, steps

    def observation_space(self, agent):
        return Box(-9, 9, (1,))

    def action_space(self, agent):
        return Discrete(2)

    def reset(self, seed=None, options=None):
        self.agents, self.left = list(self.first), list(self.steps)
        return {a: np.ones(1, np.float32) for a in self.first}, {}

    def step(self, actions):
        agents, seen, rewards, ended, cut = self.left.pop(0)
        self.agents = list(agents)
        observations = {a: np.ones(1, np.float32) for a in seen}
        return observations, rewards, dict.fromkeys(ended, True), dict.fromkeys(cut, True), {}


BOTH = {"a": 1, "b": 2}
ENDS = {  # (who begins, [(agents left, observed, rewards, terminated, truncated)]), over, how
    "one_each_way": ("ab", [("ab", "ab", BOTH, "a", "b")], [True], "tc"),
    "all_gone": ("ab", [("", "ab", BOTH, "ab", "")], [True], "tt"),
    "gone_without_a_word": ("ab", [("", "ab", BOTH, "b", "")], [True], "ct"),
    "one_goes_on": ("ab", [("b", "ab", BOTH, "a", "")], [False], "t-"),
    "another_enters": ("a", [("b", "ab", BOTH, "a", "")], [False], "t-"),
    "another_enters_unseen": ("a", [("ab", "a", BOTH, "a", "")], [False], "tt"),
    "one_after_the_other": (
        "ab",
        [("ab", "ab", BOTH, "a", ""), ("ab", "b", {"b": 2}, "", "b")],
        [False, True],
        "tc",
    ),
    "comes_back": (
        "ab",
        [("b", "ab", BOTH, "a", ""), ("ab", "ab", BOTH, "", ""), ("a", "ab", BOTH, "b", "")],
        [False, False, False],
        "-t",
    ),
    "without_a_reward": ("ab", [("ab", "ab", {"a": 1}, "", "")], [False], "--"),
    "without_a_last_look": ("ab", [("b", "b", BOTH, "a", "")], [False], "t-"),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_episode_ends_agent_by_agent(name):
    """With the reference one terminated and the other cut off never ends, for example."""
    first, steps, over, how = ENDS[name]
    env = emulation.PettingZooPufferEnv(Script(first, steps))
    for _ in range(2):  # and again after a reset
        env.reset()
        for i, expected in enumerate(over):
            env.step(np.zeros(2, np.int32))
            assert env.done == expected, i
        assert env.terminals.tolist() == [end == "t" for end in how]
        assert env.truncations.tolist() == [end == "c" for end in how]
        rewards = steps[-1][2]
        assert env.rewards.tolist() == [
            rewards.get(agent, 0) if agent in steps[-1][1] or name == "without_a_last_look" else 0
            for agent in "ab"
        ]
    if not env.done:
        with pytest.raises(IndexError):  # the next step is the environment's
            env.step(np.zeros(2, np.int32))


def test_errors_with_several_agents():
    made = Crowd(DICT, Discrete(2))
    env = emulation.PettingZooPufferEnv(made)
    assert env.observation_space("agent_1") is env.single_observation_space
    assert env.action_space("agent_1") is env.single_action_space
    assert (env.render(), env.render_mode, env.metadata) == ("drawn", None, {"name": "crowd"})
    for method in (env.observation_space, env.action_space):
        with pytest.raises(ValueError, match=r"crowd: no agents \['x'\]; there are \['agent_0', "):
            method("x")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="crowd: 3 actions for 4 agents"):
        env.step(np.zeros(3, int))
    with pytest.raises(ValueError, match=r"no agents \['x'\]"):
        env.step({"x": 0})
    with pytest.raises(ValueError, match=r"crowd: an action is not in Discrete\(2\)"):
        env.step({"agent_2": 2})
    made.spaces["agent_3"] = Box(0, 1, (3,))
    with pytest.raises(ValueError, match="crowd: an observation is not in Dict"):
        env.step(np.zeros(4, int))
    with pytest.raises(ValueError, match=r"crowd: all agents must have the same.*'agent_3' Box"):
        emulation.PettingZooPufferEnv(made)
    made = Crowd(DICT, Discrete(2))
    env = emulation.PettingZooPufferEnv(made)
    made.reset = lambda seed=None: ({"ghost": DICT.sample()}, {})
    with pytest.raises(ValueError, match=r"no agents \['ghost'\]"):
        env.reset()
    env.close()
    assert made.closed


def test_workers_stay_light():
    code = (
        "import sys, puffer_jax.emulation;"
        "print({'jax', 'flax', 'torch', 'pufferlib', 'gymnasium', 'pettingzoo'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "set()"
    code = "import sys; sys.modules['gymnasium'] = None\n" + (
        "import puffer_jax.emulation as e\n"
        "try: e.GymnasiumPufferEnv('CartPole-v1')\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "emulation needs gymnasium: pip install 'puffer_jax[vector]'"
