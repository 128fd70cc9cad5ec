"""Resets only where episodes end: who begins where, and how many are computed."""

import itertools
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

import puffer_jax
from puffer_jax.base.spaces import Box, Discrete
from puffer_jax.environments.jax_native import as_jax_env
from puffer_jax.environments.resets import autoreset_all, begin_where
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.vector.jax_native import JaxVecEnv

pytestmark = pytest.mark.usefixtures("unoptimised")

KEY = jax.random.key(0)


class World:
    """Its observation is the number that its reset drew, and it lasts for a time drawn there, too.

    The reset sorts 7 numbers, and nothing else does, so that it can be found in a program.
    """

    observation_space = Box(0.0, 1.0, (1,))
    action_space = Discrete(2)

    def __init__(self, shortest=4, longest=20):
        self.between = shortest, longest

    def reset(self, key):
        number = jnp.sort(jax.random.uniform(key, (7,), jnp.float32))[3]
        last = jax.random.randint(jax.random.fold_in(key, 1), (), *self.between)
        return number[None], (number, last, key, 0)

    def step(self, key, state, action):
        number, last, own, n = state
        return number[None], (number, last, own, n + 1), number, n + 1 >= last, False, {}


def rolled(reset_ratio, envs, steps, world):
    """`Step` over time, (steps, envs, ...), of `autoreset_all`."""
    env = as_jax_env(world)
    step = autoreset_all(env, envs, reset_ratio)

    def one(state, key):
        out = step(jax.random.split(key, envs), state, jnp.zeros(envs, jnp.int32))
        return out.state, out

    def run(key):
        state = jax.vmap(env.reset)(jax.random.split(key, envs))[1]
        return jax.lax.scan(one, state, jax.random.split(jax.random.fold_in(key, 1), steps))[1]

    return jax.device_get(jax.jit(run)(KEY))


def numbers(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def test_it_is_the_plain_path_while_few_end_at_once():
    plain, few = (rolled(ratio, 8, 60, World()) for ratio in (None, 2))
    ends = plain.terminated.sum(1)
    assert 0 < ends.max() <= 4 and ends.sum() > 20 and (ends == 0).any()
    jax.tree.map(np.testing.assert_array_equal, numbers(plain), numbers(few))
    begun = few.obs[few.terminated]
    assert len(np.unique(begun)) == len(begun)


def test_who_begins_where():
    """Every set of five environments, of which two resets are computed."""
    env = as_jax_env(World())
    old, new = (jax.random.split(jax.random.key(seed), 5) for seed in (1, 2))
    sets = np.array(list(itertools.product([False, True], repeat=5)))

    @jax.jit
    def every(running):
        def begin(over):
            return begin_where(over, env.reset, new, running, 2)

        return jax.vmap(begin)(sets)

    running, fresh = (numbers(jax.vmap(env.reset)(keys)) for keys in (old, new))
    got = numbers(every(jax.vmap(env.reset)(old)))
    for i, over in enumerate(sets):
        source = np.flatnonzero(over)[:2]
        expected = list(range(5))
        for turn, place in enumerate(np.flatnonzero(over)):
            expected[place] = 5 + source[turn % 2]
        both = jax.tree.map(lambda a, b: np.concatenate([a, b])[expected], running, fresh)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[i], got), both)  # noqa: B023


def test_starts_are_shared_when_all_end_at_once():
    out = rolled(4, 10, 12, World(3, 4))
    ends = out.terminated.all(1)
    assert ends.sum() == 4 and not out.terminated[~ends].any()
    for row in out.obs[ends][..., 0]:
        values, users = np.unique(row, return_counts=True)
        assert len(values) == 3 and sorted(users) == [3, 3, 4]  # 10 / 4, rounded up
    assert len(np.unique(out.obs[ends])) == 12


def sorts(jaxpr):
    """The shapes of what a program sorts that ends in 7."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sort" and eqn.invars[0].aval.shape[-1:] == (7,):
            found.append(eqn.invars[0].aval.shape)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                found += sorts(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize("ratio, rows", [(None, 10), (4, 3), (99, 1)])
def test_a_training_computes_no_more_resets(ratio, rows):
    env = as_jax_env(World())
    config = PuffeRLConfig(num_envs=10, bptt_horizon=4, total_timesteps=80, reset_ratio=ratio)
    train = puffer_jax.make_train(config, env, puffer_jax.Default(env, rngs=nnx.Rngs(0)))
    assert sorts(jax.make_jaxpr(train)(KEY).jaxpr) == [(10, 7), (rows, 7)]


def test_a_vecenv_takes_it_too():
    action = np.zeros(4, np.int32)
    for ratio, different in ((None, 4), (2, 2), (4, 1)):
        with JaxVecEnv(World(1, 2), 4, reset_ratio=ratio) as vecenv:
            vecenv.reset(seed=0)
            assert vecenv.step(action)[2].all()
            assert len(np.unique(vecenv.step(action)[0])) == different


def test_keys_of_the_old_kind():
    env = as_jax_env(World())
    keys = jax.random.key_data(jax.random.split(KEY, 4))
    state = jax.jit(jax.vmap(env.reset))(keys)[1]
    steps = [jax.jit(autoreset_all(env, 4, ratio)) for ratio in (None, 2)]
    outs = [step(keys, state, jnp.zeros(4, jnp.int32)) for step in steps]
    jax.tree.map(np.testing.assert_array_equal, *outs)


def test_what_it_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="reset_ratio must be a positive number; got 0"):
        PuffeRLConfig(reset_ratio=0)
    with pytest.raises(ValueError, match="reset_ratio must be at least 1; got 0"):
        JaxVecEnv(World(), 4, reset_ratio=0)
    config = PuffeRLConfig(bptt_horizon=8, reset_ratio=2, data_dir=str(tmp_path))
    spaces = SimpleNamespace(observation_space=Box(-1, 1, (4,)), action_space=Discrete(2))
    policy = puffer_jax.Default(spaces, hidden_size=4, rngs=nnx.Rngs(0))
    envs = gymnasium.make_vec("CartPole-v1", num_envs=2)
    with pytest.raises(ValueError, match=r"reset_ratio=2 is for JAX-native environments"):
        puffer_jax.PuffeRL(config, envs, policy)
    envs.close()
