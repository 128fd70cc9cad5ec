"""The CleanRL wrappers: the wrapped policy's numbers, in CleanRL's order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from support import reference as ref

import puffer_jax
from puffer_jax.policies.cleanrl import Policy, RecurrentPolicy

pytestmark = pytest.mark.usefixtures("quick")

HIDDEN, BATCH, TIME = 16, 6, 4
ACTIONS = {
    "discrete": Discrete(3),
    "multidiscrete": MultiDiscrete([2, 4]),
    "continuous": Box(-1, 1, (2,)),
}
KEY = jax.random.key(1)
FLOAT64 = jnp.dtype("float64")


@functools.cache  # no test changes a policy
def default(action="discrete"):
    env = ref.stub_env(Box(-1, 1, (5,)), ACTIONS[action])
    return puffer_jax.Default(env, HIDDEN, rngs=nnx.Rngs(0), param_dtype=FLOAT64)


@functools.cache
def recurrent(action="discrete"):
    policy = nnx.clone(default(action))
    return puffer_jax.LSTMWrapper(
        policy.env_spec, policy, HIDDEN, HIDDEN, rngs=nnx.Rngs(1), param_dtype=FLOAT64
    )


def observations(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, 5))


def close(ours, theirs):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), ours, theirs
    )


@pytest.mark.parametrize("action", ACTIONS)
def test_policy(action):
    policy, x = default(action), observations(BATCH)
    agent = Policy(policy)
    assert agent.is_continuous == (action == "continuous")
    logits, values = policy(x)
    sampled = agent.get_action_and_value(x, key=KEY)
    close(sampled, (*puffer_jax.sample_logits(logits, key=KEY), values))
    assert sampled[3].shape == (BATCH, 1)
    close(agent.get_value(x), values)
    close(agent.get_value(x, {}), values)
    scored = agent.get_action_and_value(x, None, sampled[0])
    close(scored, sampled)


@pytest.mark.parametrize("action", ACTIONS)
def test_recurrent_policy_acts_as_forward_eval(action):
    policy = recurrent(action)
    agent = RecurrentPolicy(policy)
    state = expected = policy.initial_state(BATCH)
    for t in range(3):
        x = observations(BATCH, seed=t)
        logits, values, new = policy.forward_eval(x, expected)
        close(agent.get_value(x, state), values)
        *sampled, state = agent.get_action_and_value(x, state, None, KEY)
        close(sampled, [*puffer_jax.sample_logits(logits, key=KEY), values])
        close(state, new)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, new)
        expected = new
    first = agent.get_action_and_value(x, key=KEY)
    close(first, agent.get_action_and_value(x, policy.initial_state(BATCH), key=KEY))


@pytest.mark.parametrize("action", ACTIONS)
def test_recurrent_policy_trains_over_time(action):
    policy = recurrent(action)
    agent = RecurrentPolicy(policy)
    x, done = observations(BATCH, TIME), np.zeros((BATCH, TIME), bool)
    done[:4, 1:] = np.eye(4, 3, dtype=bool)
    state = policy.forward_eval(observations(BATCH, seed=9), policy.initial_state(BATCH))[2]

    steps, carried = [], state
    for t in range(TIME):
        *out, carried = agent.get_action_and_value(x[:, t], carried, key=KEY, done=done[:, t])
        steps.append(out)
    actions, logprobs, entropies, values = (np.stack(o, 1) for o in zip(*steps, strict=True))
    given = agent.get_action_and_value(x, state, actions, done=done)
    close(given[1].reshape(BATCH, TIME), logprobs)
    close(given[2].reshape(BATCH, TIME), entropies)
    close(given[3], values[..., 0])
    close(given[4], carried)
    close(agent.get_value(x, state, done=done), values[..., 0])
    without = agent.get_value(x, state)
    assert np.abs(without - values[..., 0])[:3].max() > 1e-3
    close(without[4:], values[4:, :, 0])


@pytest.mark.tree
def test_jit_traces_once_and_state_is_a_carry():
    agent = RecurrentPolicy(recurrent())
    graphdef, params = puffer_jax.split(agent)
    traces = []

    @jax.jit
    def act(params, x, state, key):
        traces.append(1)
        return puffer_jax.merge(graphdef, params).get_action_and_value(x, state, None, key)

    state = eager = agent.policy.initial_state(BATCH)
    for t in range(3):
        x = observations(BATCH, seed=t)
        action, logprob, entropy, value, state = act(params, x, state, KEY)
        *expected, eager = agent.get_action_and_value(x, eager, key=KEY)
        close((action, logprob, entropy, value), tuple(expected))
    assert len(traces) == 1


def test_gradient_is_that_of_the_wrapped_policy():
    policy, x = default(), observations(BATCH)
    action = np.arange(BATCH) % 3

    def loss_of(logprob, entropy, values):
        return (logprob + 0.1 * entropy).sum() + (values**2).sum()

    graphdef, params = puffer_jax.split(policy)

    def direct(params):
        logits, values = puffer_jax.merge(graphdef, params)(x)
        return loss_of(*puffer_jax.sample_logits(logits, action)[1:], values)

    wrapped, agent_params = puffer_jax.split(Policy(policy))

    def through_agent(params):
        agent = puffer_jax.merge(wrapped, params)
        return loss_of(*agent.get_action_and_value(x, action=action)[1:])

    expected = jax.jit(jax.grad(direct))(params)
    close(jax.jit(jax.grad(through_agent))(agent_params), {"policy": expected})
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected))


@pytest.mark.tree
@pytest.mark.parametrize(("wrap", "build"), [(Policy, default), (RecurrentPolicy, recurrent)])
def test_torch_names_start_with_policy(wrap, build):
    policy = build()
    tensors = puffer_jax.state_dict(wrap(policy))
    assert list(tensors) == [f"policy.{name}" for name in puffer_jax.state_dict(policy)]
    other = wrap(nnx.clone(policy))
    puffer_jax.load_state_dict(other, {name: 2 * x for name, x in tensors.items()})
    for name, x in puffer_jax.state_dict(other).items():
        np.testing.assert_array_equal(x, 2 * tensors[name])


def test_errors_say_what_to_write():
    agent, x = Policy(default()), observations(BATCH)
    action = np.zeros(BATCH, np.int32)
    with pytest.raises(TypeError, match=r"second argument is the state.*Write action="):
        agent.get_action_and_value(x, action)
    with pytest.raises(TypeError, match=r"second argument is the state.*Write action="):
        RecurrentPolicy(recurrent()).get_action_and_value(x, action)
    with pytest.raises(ValueError, match="exactly one of action, key"):
        agent.get_action_and_value(x)
    with pytest.raises(ValueError, match="exactly one of action, key"):
        agent.get_action_and_value(x, None, action, KEY)
    with pytest.raises(TypeError, match="LSTMWrapper is recurrent; use RecurrentPolicy"):
        Policy(recurrent())
    with pytest.raises(TypeError, match="Default has no initial_state; use Policy"):
        RecurrentPolicy(default())
