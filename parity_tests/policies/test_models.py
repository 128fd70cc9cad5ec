"""Our policies against the real PufferLib's."""

import functools
import math
import os
from collections import OrderedDict
from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pufferlib.models as theirs
import pytest
import scipy.stats
import torch
from flax import nnx
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from support import reference as ref
from support.bars import (
    BARS,
    BFLOAT16,
    assert_arrays_close,
    named,
    prefixed,
    relative_error,
    stub_env,
)

import puffer_jax
from puffer_jax.nn.initializers import reset_orthogonal

pytestmark = pytest.mark.usefixtures("quick")

HIDDEN, BATCH, TIME = 33, 7, 5
BOX = stub_env(Box(-1, 1, (5, 3)), Discrete(3))
ACTIONS = {
    "discrete": Discrete(3),
    "multidiscrete": MultiDiscrete([2, 1, 4]),
    "continuous": Box(-1, 1, (3,)),
}


@pytest.fixture(autouse=True)
def seeded():
    """The reference draws its weights from torch's global generator.

    In float32 a ReLU's gradient jumps where rounding changes the sign of its input, a max-pool's
    where it changes the order of two; with the images and seeds below it cannot, which `ref.check`
    asserts.
    """
    torch.manual_seed(0)


# Op by op a gradient costs dozens of compilations, as one program one.
check = functools.partial(ref.check, compiled=True)


def keywords(dtype="float32", seed=0):
    return {"rngs": nnx.Rngs(seed), "param_dtype": jnp.dtype(dtype)}


def compiled(policy, run):
    """`run(policy)` as one program."""
    graphdef, params = puffer_jax.split(policy)
    return jax.jit(lambda params: run(puffer_jax.merge(graphdef, params)))(params)


def no_state():
    return {"lstm_h": None, "lstm_c": None}


def default(env, action_env=None):
    """Reference and builder of ours."""
    return (
        ref.randomise(theirs.Default(action_env or env, HIDDEN)),
        lambda dtype: puffer_jax.Default(env, HIDDEN, **keywords(dtype)),
    )


def lstm(env, their_env=None, hidden=HIDDEN):
    policy = theirs.Default(their_env or env, hidden)
    return (
        ref.randomise(theirs.LSTMWrapper(their_env or env, policy, hidden, hidden)),
        lambda dtype: wrapped(env, puffer_jax.Default(env, hidden, **keywords(dtype)), dtype),
    )


def wrapped(env, policy, dtype="float32", seed=0):
    size = policy.hidden_size
    return puffer_jax.LSTMWrapper(env, policy, size, size, **keywords(dtype, seed))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def torch_state(policy, h, c, leading=()):
    """A state for the reference; `forward` wants a leading axis for layers."""
    dtype = policy.lstm.bias_ih_l0.dtype
    state = {"lstm_h": torch.from_numpy(h), "lstm_c": torch.from_numpy(c)}
    return {name: x.to(dtype).reshape(*leading, *x.shape) for name, x in state.items()}


def jax_state(h, c):
    return {"lstm_h": jnp.asarray(h), "lstm_c": jnp.asarray(c)}


def squeezed(state):
    """The reference's state after `forward`, without the axis for layers."""
    return {name: x if name == "hidden" else x.squeeze(0) for name, x in state.items()}


def same_arrays(left, right):
    assert list(left) == list(right)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


# --- spaces ------------------------------------------------------------------------------------

SPACES = {
    "box": Box(-1, 1, (5, 3)),
    "uint8": Box(0, 255, (3, 5, 2), np.uint8),
    "bool": Box(0, 1, (7,), np.bool_),
    "discrete": Discrete(6),
    "multidiscrete": MultiDiscrete([3, 1, 5]),
    "multibinary": MultiBinary([2, 3]),
    "dict": Dict(
        image=Box(0, 255, (3, 2), np.uint8),
        number=Discrete(4),
        vector=Box(-1, 1, (3,)),
        flags=MultiBinary(3),
        short=Box(-500, 500, (3,), np.int16),
        wide=Box(-1, 1, (2, 2), np.float64),
        many=MultiDiscrete([3, 2]),
    ),
    "float_dict": Dict(b=Box(-1, 1, (3,)), a=Box(-1, 1, (2, 2)), c=Box(-1, 1, (1,))),
    "tuple": Tuple((Box(-1, 1, (2,)), Discrete(3), Box(0, 255, (3,), np.uint8))),
    "nested": Dict(
        pair=Tuple((Box(-1, 1, (2, 3)), Dict(z=Discrete(5), a=Box(0, 9, (3,), np.uint8)))),
        single=Box(0, 1, (), np.bool_),
        alone=Box(-1, 1, (3,)),
    ),
}
KINDS = [*SPACES, "plain_dict"]
# Heads never see the space: each space comes with one kind of action, and a Box with all.
PAIRS = [
    (kind, action)
    for i, kind in enumerate(KINDS)
    for j, action in enumerate(ACTIONS)
    if i % len(ACTIONS) == j or kind == "box"
]


def concatenated(space, tree):
    """All leaves side by side, in the order of the space."""
    if isinstance(space, Dict | Tuple):
        children = space.items() if isinstance(space, Dict) else enumerate(space)
        return np.concatenate([concatenated(sub, tree[key]) for key, sub in children], axis=1)
    return tree.reshape(len(tree), -1).astype(np.float32)


def setting(kind, action, count):
    """Their env and observations, our env and observations: four times the same thing.

    Dict and Tuple come through the real emulation. For a scalar and for nested structures the
    reference raises or reads nothing, so it gets the same numbers as a flat Box.
    """
    space = SPACES["dict" if kind == "plain_dict" else kind]
    if kind in ("dict", "float_dict", "tuple", "plain_dict"):
        env = ref.emulated(space, action)
        x = ref.emulated_observations(env, count)
        if kind == "plain_dict":
            return env, x, stub_env(space, action), ref.stack(env.env.samples)
        return env, x, env, x
    x, ours = ref.samples(space, count), stub_env(space, action)
    if kind in ("discrete", "nested"):
        flat = concatenated(space, x)
        return stub_env(Box(-np.inf, np.inf, flat.shape[1:]), action), flat, ours, x
    return ours, x, ours, x


def both_precisions(both):
    return ("float64", "float32") if both else ("float64",)


def in_time(tree):
    return jax.tree.map(lambda x: x.reshape(BATCH, TIME, *x.shape[1:]), tree)


@pytest.mark.parametrize("kind, action", PAIRS)
def test_default_on_every_space(kind, action):
    their_env, x, env, our_x = setting(kind, ACTIONS[action], BATCH)
    policy, build = default(env, their_env)
    check(
        policy,
        build,
        lambda p: {
            **named(*p(torch.from_numpy(x))),
            **prefixed("eval", named(*p.forward_eval(torch.from_numpy(x)))),
        },
        lambda p: {**named(*p(our_x)), **prefixed("eval", named(*p.forward_eval(our_x)))},
        dtypes=both_precisions((kind, action) in [("box", "continuous"), PAIRS[-1]]),
    )


@pytest.mark.parametrize(
    "action",
    [
        Discrete(1),
        MultiDiscrete([1]),
        MultiDiscrete([1, 1, 5]),
        Box(-1, 1, (1,)),
        Tuple((Discrete(2), Dict(b=Discrete(1), a=Discrete(4)))),
    ],
    ids=str,
)
def test_default_with_other_actions(action):
    # Emulation turns the Tuple into a MultiDiscrete; the others pass through it.
    env = ref.emulated(BOX.observation_space, action)
    policy, build = default(env)
    x = normal(BATCH, 5, 3)
    check(
        policy,
        build,
        lambda p: named(*p(torch.from_numpy(x))),
        lambda p: named(*p(x)),
        dtypes=("float64",),
        compiled=action != Discrete(1),  # once op by op, gradient included
    )
    ours = nnx.eval_shape(lambda: build("float32"))
    assert ours.is_continuous == policy.is_continuous
    assert ours.is_multidiscrete == policy.is_multidiscrete


@pytest.mark.parametrize(
    "kind, action",
    [pytest.param(*p, marks=[pytest.mark.tree] * (p == ("box", "continuous"))) for p in PAIRS],
)
def test_lstm_on_every_space(kind, action):
    their_env, x, env, our_x = setting(kind, ACTIONS[action], BATCH * TIME)
    policy, build = lstm(env, their_env)
    if kind == "uint8":
        # Bytes make gates of 300, at which torch itself was seen 1.3e-14 from the exact numbers.
        policy.policy.encoder[0].weight.data /= 255
    x, our_x = in_time(x), in_time(our_x)
    first, our_first = x[:, 0], jax.tree.map(lambda leaf: leaf[:, 0], our_x)
    h, c = normal(2, BATCH, HIDDEN)

    def run_theirs(p):
        training, acting = no_state(), torch_state(p, h, c)
        outputs = named(*p(torch.from_numpy(x), training), squeezed(training))
        step = named(*p.forward_eval(torch.from_numpy(first), acting), acting)
        return {**outputs, **prefixed("eval", step)}

    def run_ours(p):
        step = p.forward_eval(our_first, jax_state(h, c))
        return {**named(*p(our_x)), **prefixed("eval", named(*step))}

    both = (kind, action) in [("box", "continuous"), ("dict", "discrete")]
    check(policy, build, run_theirs, run_ours, dtypes=both_precisions(both))


@pytest.mark.parametrize("kind", ["dict", "float_dict"])
def test_emulated_dict_in_every_form(kind):
    env, x, _, _ = setting(kind, ACTIONS["multidiscrete"], BATCH * TIME)
    fields = ref.stack(env.env.samples)
    flat = concatenated(SPACES[kind], fields)
    policy = ref.twin(*lstm(env), "float32")
    expected = named(*policy.forward_eval(x))
    for form in (fields, flat, dict(reversed(fields.items()))):
        same_arrays(named(*policy.forward_eval(form)), expected)
    expected = policy._fold_time(in_time(x))
    assert expected[:2] == (BATCH, TIME)
    np.testing.assert_array_equal(expected[2], x)
    for form in (fields, flat):
        batch, time, folded = policy._fold_time(in_time(form))
        assert (batch, time) == (BATCH, TIME)
        np.testing.assert_array_equal(policy.policy.input_features(folded), flat)


# --- convolutions ------------------------------------------------------------------------------


def images(kind, *shape):
    random = np.random.default_rng(1)
    if kind == "uint8":
        return random.integers(0, 256, shape, dtype=np.uint8)
    x = -255 * random.random(shape, dtype=np.float32)
    x[0] = -100  # one colour: every window of the max pool is a tie
    return x


def convolutional(shape=(3, 45, 52), seed=0, **sizes):
    sizes = {
        "framestack": 3,
        "flat_size": 384,
        "hidden_size": HIDDEN,
        "output_size": HIDDEN,
        **sizes,
    }
    env = stub_env(Box(-255, 255, shape), Discrete(5))
    torch.manual_seed(seed)
    return (
        env,
        ref.randomise(theirs.Convolutional(env, **sizes), 0.01),
        lambda dtype: puffer_jax.Convolutional(env, **sizes, **keywords(dtype)),
    )


def procgen(shape=(13, 18, 3), width=5):
    env = stub_env(Box(-255, 255, shape), Discrete(5))
    return (
        env,
        ref.randomise(theirs.ProcgenResnet(env, width, HIDDEN), 0.02),
        lambda dtype: puffer_jax.ProcgenResnet(env, width, HIDDEN, **keywords(dtype)),
    )


def assert_evaluates_as_it_trains(ours, x):
    """The reference's image policies have no `forward_eval`; ours computes what `forward` does."""
    assert str(jax.make_jaxpr(ours.forward_eval)(x)) == str(jax.make_jaxpr(ours)(x))


@pytest.mark.parametrize(
    "kind, shape, seed, sizes",
    [
        ("uint8", (3, 45, 52), 2, {}),
        (
            "negative",
            (91, 77, 1),
            1,
            {"framestack": 1, "flat_size": 128, "channels_last": True, "downsample": 2},
        ),
    ],
)
def test_convolutional(kind, shape, seed, sizes):
    _, policy, build = convolutional(shape, seed, **sizes)
    x = images(kind, BATCH, *shape)
    check(
        policy,
        build,
        lambda p: named(*p(torch.from_numpy(x))),
        lambda p: named(*p(x)),
        dtypes=both_precisions(kind == "uint8"),
    )
    ours = ref.skeleton(lambda: build("float32"))
    assert_evaluates_as_it_trains(ours, x)
    assert (ours.hidden_size, ours.is_continuous) == (policy.hidden_size, policy.is_continuous)


@pytest.mark.parametrize("kind", ["uint8", "negative"])
def test_procgen_resnet(kind):
    env, policy, build = procgen()
    x = images(kind, BATCH, *env.observation_space.shape)

    def run_theirs(p):
        # It only divides by 255, which keeps float32 images from a float64 policy.
        floats = x.dtype == np.float32
        return named(*p(torch.from_numpy(x).to(p.value.bias.dtype if floats else torch.uint8)))

    dtypes = both_precisions(kind == "uint8")
    check(policy, build, run_theirs, lambda p: named(*p(x)), dtypes=dtypes)
    assert_evaluates_as_it_trains(ref.skeleton(lambda: build("float32")), x)


def as_theirs(x, layer):
    """Images with channels first, in the dtype of a layer."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, 3, 1))).to(layer.bias.dtype)


@pytest.mark.parametrize("shape", [(7, 10, 3), (1, 2, 2)])
def test_conv_sequence(shape):
    height, width, channels = shape
    policy = ref.randomise(theirs.ConvSequence((channels, height, width), 5))
    x = normal(3, *shape) - 1
    check(
        policy,
        lambda dtype: puffer_jax.ConvSequence(shape, 5, **keywords(dtype)),
        lambda p: {"y": p(as_theirs(x, p.conv)).movedim(1, 3)},
        lambda p: {"y": p(jnp.asarray(x, p.conv.bias.dtype))},
        dtypes=both_precisions(shape == (7, 10, 3)),
    )
    channels, height, width = policy.get_output_shape()
    ours = nnx.eval_shape(lambda: puffer_jax.ConvSequence(shape, 5, **keywords()))
    assert ours.get_output_shape() == (height, width, channels)


@pytest.mark.tree
def test_residual_block():
    x = normal(3, 7, 10, 5)
    check(
        ref.randomise(theirs.ResidualBlock(5)),
        lambda dtype: puffer_jax.ResidualBlock(5, **keywords(dtype)),
        lambda p: {"y": p(as_theirs(x, p.conv0)).movedim(1, 3)},
        lambda p: {"y": p(jnp.asarray(x, p.conv0.bias.dtype))},
    )


@pytest.mark.parametrize("shift", [0, -9])
def test_max_pool_ties_and_borders(shift):
    # Small integers are exact in any order of summation, so ties are ties on both sides, and the
    # gradient must choose the same pixel. Below zero, a border padded with zeros would win.
    random = np.random.default_rng(2)
    x = random.integers(-2, 3, (3, 6, 9, 2)).astype(np.float64)
    policy = theirs.ConvSequence((2, 6, 9), 4).double()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter[...] = torch.from_numpy(random.integers(-1, 2, parameter.shape))
            if name == "conv.bias":
                parameter += 20 * shift
    ours = ref.twin(
        policy, lambda d: puffer_jax.ConvSequence((6, 9, 2), 4, **keywords(d)), "float64"
    )
    w = random.integers(-3, 4, (3, 3, 5, 4)).astype(np.float64)
    their_x = as_theirs(x, policy.conv).requires_grad_()
    expected = policy(their_x).movedim(1, 3)
    (expected * torch.from_numpy(w)).sum().backward()

    @jax.jit
    def both(x, w):
        y, back = jax.vjp(ours, x)
        return y, back(w)[0]

    actual, gradient = both(x, w)
    np.testing.assert_array_equal(actual, expected.detach())
    np.testing.assert_array_equal(gradient, their_x.grad.movedim(1, 3))
    assert np.unique(x).size == 5


# --- LSTM --------------------------------------------------------------------------------------


def test_lstm_from_a_state_and_step_by_step():
    policy, build = lstm(BOX)
    x, (h, c) = normal(BATCH, TIME, 5, 3), normal(2, BATCH, HIDDEN)

    def run_theirs(p):
        training, acting = torch_state(p, h, c, (1,)), torch_state(p, h, c)
        outputs = named(*p(torch.from_numpy(x), training), squeezed(training))
        for t in range(TIME):
            step = p.forward_eval(torch.from_numpy(x[:, t]), acting)
            outputs |= prefixed(f"eval{t}", named(*step, acting))
        return outputs

    @functools.partial(jax.jit, static_argnums=0)
    def train(graphdef, params, x, state):
        return puffer_jax.merge(graphdef, params)(x, state)

    @functools.partial(jax.jit, static_argnums=0)
    def act(graphdef, params, x, state):
        return puffer_jax.merge(graphdef, params).forward_eval(x, state)

    exact = ref.run_torch(policy, "float64", run_theirs, gradients=False)
    for dtype, bar in BARS["forward"].items():
        ours = puffer_jax.split(ref.twin(policy, build, dtype))
        start = jax.tree.map(lambda s: s.astype(dtype), jax_state(h, c))  # noqa: B023
        outputs, state = named(*train(*ours, x, start)), start
        for t in range(TIME):
            *step, state = act(*ours, x[:, t], {n: state[n] for n in start})
            outputs |= prefixed(f"eval{t}", named(*step, state))
        ref.assert_results_close(ref.Result(outputs), exact, dtype, "LSTMWrapper")
        # Training is acting: both are the same numbers of the reference.
        y = exact.outputs
        logits = np.stack([y[f"eval{t}.logits"] for t in range(TIME)], axis=1)
        values = np.stack([y[f"eval{t}.values"][:, 0] for t in range(TIME)], axis=1)
        assert relative_error(outputs["logits"].reshape(logits.shape), logits) < bar
        assert relative_error(outputs["values"], values) < bar
        for name in ("lstm_h", "lstm_c"):
            last = y[f"eval{TIME - 1}.state.{name}"]
            assert relative_error(outputs[f"state.{name}"], last) < bar
        # Two segments, the second from the state of the first.
        _, _, state = train(*ours, x[:, :2], start)
        second = named(*train(*ours, x[:, 2:], {n: state[n] for n in start}))
        assert relative_error(second["values"], y["values"][:, 2:]) < bar
        assert relative_error(second["state.lstm_c"], y["state.lstm_c"]) < bar


def test_lstm_without_time_axis():
    policy, build = lstm(BOX)
    x = normal(BATCH, 5, 3)

    def run_theirs(p):
        state = no_state()
        return named(*p(torch.from_numpy(x), state), squeezed(state))

    alone, reset, in_one_step = compiled(
        ref.twin(policy, build, "float64"),
        lambda p: [
            named(*p(x)),
            named(*p(x, done=np.ones(BATCH, bool))),
            named(*p(x[:, None])),
        ],
    )
    expected = ref.run_torch(policy, "float64", run_theirs, gradients=False)
    ref.assert_results_close(ref.Result(alone), expected, "float64", "LSTMWrapper")
    same_arrays(reset, in_one_step)
    assert reset["values"].shape == (BATCH, 1)


DONES = {
    "random": np.random.default_rng(4).random((BATCH, TIME)) < 0.4,
    "first": np.arange(TIME) == np.zeros((BATCH, 1)),
    "last": np.arange(TIME) == np.full((BATCH, 1), TIME - 1),
    "all": np.ones((BATCH, TIME), bool),
    "none": np.zeros((BATCH, TIME), bool),
}


@pytest.fixture(scope="module")
def recurrent():
    """The reference, ours in float64, and compiled (params, done) -> gradients, outputs."""
    torch.manual_seed(0)
    policy, build = lstm(BOX)
    x, (h, c) = normal(BATCH, TIME, 5, 3), normal(2, BATCH, HIDDEN)
    graphdef, params = puffer_jax.split(ref.twin(policy, build, "float64"))

    def whole(params, done):
        logits, values, state = puffer_jax.merge(graphdef, params)(x, jax_state(h, c), done)
        outputs = named(logits, values, {"lstm_h": state["lstm_h"], "lstm_c": state["lstm_c"]})
        return ref.loss_of(outputs), outputs

    def rollout(params, done):
        # What an agent does: it forgets, then it looks.
        def step(state, inputs):
            x_t, done_t = inputs
            state = jax.tree.map(lambda s: jnp.where(done_t[:, None], 0, s), state)
            logits, values, state = puffer_jax.merge(graphdef, params).forward_eval(x_t, state)
            return state, (logits, values)

        start = {**puffer_jax.merge(graphdef, params).initial_state(BATCH), **jax_state(h, c)}
        start = jax.tree.map(lambda s: s.astype(jnp.float64), start)
        state, (logits, values) = jax.lax.scan(step, start, (jnp.asarray(x).swapaxes(0, 1), done.T))
        logits = logits.swapaxes(0, 1).reshape(BATCH * TIME, -1)
        outputs = named(logits, values[..., 0].T, {n: state[n] for n in ("lstm_h", "lstm_c")})
        return ref.loss_of(outputs), outputs

    def stepwise(p, done):
        state = torch_state(p, h, c)
        steps = []
        for t in range(TIME):
            keep = torch.from_numpy(~done[:, t, None])
            state = {name: state[name] * keep for name in ("lstm_h", "lstm_c")}
            steps.append(p.forward_eval(torch.from_numpy(x[:, t]), state))
        logits, values = (torch.stack(y, 1) for y in zip(*steps, strict=True))
        state = {name: state[name] for name in ("lstm_h", "lstm_c")}
        return named(logits.reshape(BATCH * TIME, -1), values[..., 0], state)

    compiled = [jax.jit(jax.grad(f, has_aux=True)) for f in (whole, rollout)]
    return policy, graphdef, params, stepwise, compiled


@pytest.mark.parametrize("done", DONES)
def test_done_is_a_reset_before_the_step(recurrent, done):
    policy, graphdef, params, stepwise, compiled = recurrent
    done = DONES[done]
    expected = ref.run_torch(policy, "float64", lambda p: stepwise(p, done))
    for function in compiled:
        gradients, outputs = function(params, done)
        actual = ref.Result(
            {name: np.asarray(y) for name, y in outputs.items()},
            ref.torch_names(graphdef, gradients),
        )
        ref.assert_results_close(actual, expected, "float64", "LSTMWrapper")


def test_done_changes_what_it_should(recurrent):
    _, graphdef, params, _, (whole, _) = recurrent
    outputs = {name: whole(params, done)[1]["values"] for name, done in DONES.items()}
    # Batch by batch and step by step, a value differs exactly where a reset came at or before it.
    for name, done in DONES.items():
        after = np.logical_or.accumulate(done, axis=1)
        np.testing.assert_array_equal(outputs[name] != outputs["none"], after)
    policy, x = puffer_jax.merge(graphdef, params), normal(BATCH, TIME, 5, 3)
    # After a reset the past is forgotten, also a past of infinities.
    state = jax.tree.map(lambda s: s + np.inf, policy.initial_state(BATCH))
    plain, never, forgotten = compiled(
        policy,
        lambda p: [
            named(*p(x)),
            named(*p(x, done=DONES["none"])),
            named(*p(x, state, DONES["first"])),
        ],
    )
    same_arrays(never, plain)
    same_arrays(forgotten, plain)


def test_permuted_gates_are_noticed(recurrent):
    policy, graphdef, params, stepwise, (whole, _) = recurrent
    weights = {
        name: tensor.reshape(4, HIDDEN, -1)[[0, 2, 1, 3]].reshape(tensor.shape)
        if name.startswith("lstm")
        else tensor
        for name, tensor in policy.state_dict().items()
        if not name.startswith("cell")
    }
    ours, done = puffer_jax.merge(graphdef, params), DONES["none"]
    puffer_jax.load_state_dict(ours, weights)
    outputs = whole(puffer_jax.split(ours)[1], done)[1]
    expected = ref.run_torch(policy, "float64", lambda p: stepwise(p, done), gradients=False)
    assert relative_error(outputs["values"], expected.outputs["values"]) > 1e-3


def test_twenty_steps_of_adam():
    policy, build = lstm(BOX, hidden=11)
    x, rate = normal(BATCH, TIME, 5, 3), 3e-3
    graphdef, params = puffer_jax.split(ref.twin(policy, build, "float64"))
    adam = optax.adam(rate)

    def loss(params):
        return ref.loss_of(named(*puffer_jax.merge(graphdef, params)(x)[:2]))

    @jax.jit
    def update(params, state):
        gradients = jax.grad(loss)(params)
        updates, state = adam.update(gradients, state)
        return optax.apply_updates(params, updates), state, gradients

    state = jax.jit(adam.init)(params)
    start = ref.torch_names(graphdef, params)
    policy = policy.double()
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    with ref.torch_precision("float64"):
        for _ in range(20):
            params, state, gradients = update(params, state)
            optimizer.zero_grad()
            ref.loss_of(named(*policy(torch.from_numpy(x), no_state()))).backward()
            optimizer.step()
    expected = {name: p.detach().numpy() for name, p in policy.named_parameters()}
    actual = ref.torch_names(graphdef, params)
    assert_arrays_close(actual, expected, "update", "float64", "LSTMWrapper")
    lstm_gradients = gradients["lstm"]
    np.testing.assert_array_equal(lstm_gradients["bias_ih_l0"], lstm_gradients["bias_hh_l0"])
    # Both biases moved, each by all of it: the gates see twice Adam's step.
    moved = [actual[name] - start[name] for name in ("lstm.bias_ih_l0", "lstm.bias_hh_l0")]
    assert relative_error(*moved) < 1e-12
    assert np.median(np.abs(moved[0])) > 10 * rate


# --- wrapped CNNs ------------------------------------------------------------------------------


class WrappableResnet(theirs.ProcgenResnet):
    """What the reference's lacks, so that its own LSTMWrapper can put its pieces together."""

    is_continuous = False

    def encode_observations(self, x, state=None):
        return super().encode_observations(x)


@pytest.mark.parametrize("kind", ["Convolutional", "ProcgenResnet"])
def test_wrapped_cnn(kind):
    if kind == "Convolutional":
        env, policy, build_cnn = convolutional((1, 36, 44), framestack=1, flat_size=128)
    else:
        env, _, build_cnn = procgen((9, 6, 2), 2)
        policy = WrappableResnet(env, 2, HIDDEN)
    policy = ref.randomise(theirs.LSTMWrapper(env, policy, HIDDEN, HIDDEN), 0.01)
    x = images("uint8", 3, 2, *env.observation_space.shape)

    def run_theirs(p):
        # Composed by hand: encoder, torch's LSTM, heads.
        encoded = p.policy.encode_observations(torch.from_numpy(x).flatten(0, 1))
        hidden, (h, c) = p.lstm(encoded.unflatten(0, (3, 2)).transpose(0, 1))
        hidden = hidden.transpose(0, 1)
        logits, values = p.policy.decode_actions(hidden.reshape(6, HIDDEN))
        state = {"hidden": hidden, "lstm_h": h.squeeze(0), "lstm_c": c.squeeze(0)}
        return named(logits, values.reshape(3, 2), state)

    def run_wrapper(p):
        state = no_state()
        return named(*p(torch.from_numpy(x), state), squeezed(state))

    by_hand = ref.run_torch(policy, "float64", run_theirs, gradients=False)
    wrapper = ref.run_torch(policy, "float64", run_wrapper, gradients=False)
    same_arrays(by_hand.outputs, wrapper.outputs)
    check(
        policy,
        lambda dtype: wrapped(env, build_cnn(dtype), dtype),
        run_theirs,
        lambda p: named(*p(x)),
        dtypes=("float64",),
        name=f"LSTMWrapper({kind})",
    )


# --- transformations ---------------------------------------------------------------------------


def build_small(name, seed=0, **options):
    """A small policy of ours, initialised."""
    options = {**keywords(seed=seed), **options}
    if name == "Convolutional":
        env = stub_env(Box(0, 255, (1, 36, 36), np.uint8), Discrete(5))
        sizes = {"framestack": 1, "flat_size": 64, "hidden_size": 9, "output_size": 9}
        return puffer_jax.Convolutional(env, **sizes, **options)
    if name == "ProcgenResnet":
        env = stub_env(Box(0, 255, (9, 6, 2), np.uint8), Discrete(5))
        return puffer_jax.ProcgenResnet(env, 2, 9, **options)
    action = ACTIONS["continuous" if name == "Default" else "multidiscrete"]
    env = stub_env(BOX.observation_space, action)
    policy = puffer_jax.Default(env, 9, **options)
    if name == "LSTMWrapper":
        policy = puffer_jax.LSTMWrapper(env, policy, 9, 9, **options)
    return policy


def small(name, seed=0, **options):
    """The same with generic weights, which are there at once; and observations for one step."""
    policy = ref.generic(lambda: build_small(name, seed, **options), seed)
    shapes = {"Convolutional": (3, 1, 36, 36), "ProcgenResnet": (3, 9, 6, 2)}
    return policy, images("uint8", *shapes[name]) if name in shapes else normal(3, 5, 3)


def widened(name, seed=0):
    """The policy of `small`, its weights included, in float64: split, as nothing else is wanted."""
    graphdef, _ = puffer_jax.split(ref.skeleton(lambda: build_small(name, **keywords("float64"))))
    params = puffer_jax.split(small(name, seed)[0])[1]
    return graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


POLICIES = ["Default", "LSTMWrapper", "Convolutional", "ProcgenResnet"]


def evaluate(graphdef, params, x, state):
    """One step of any policy; those without a state return the one they got."""
    policy = puffer_jax.merge(graphdef, params)
    logits, values, *new = policy.forward_eval(x, state)
    return named(logits, values), (new[0] if new else state)


act = jax.jit(evaluate, static_argnums=0)


def first_state(policy, batch=3):
    return policy.initial_state(batch) if isinstance(policy, puffer_jax.LSTMWrapper) else None


def exact_step(name, x, seed=0):
    """The outputs of `small`'s first step, computed in float64."""
    graphdef, params = widened(name, seed)
    policy = puffer_jax.merge(graphdef, params)
    outputs, _ = act(graphdef, params, x, first_state(policy))
    assert {y.dtype for y in outputs.values()} == {np.dtype(np.float64)}
    return outputs


@pytest.mark.tree
@pytest.mark.parametrize("name", POLICIES)
def test_jit_is_eager_and_traces_once(name):
    policy, x = small(name)
    other, _ = small(name, seed=1)
    traces = []

    def act(graphdef, params, x, state):
        traces.append(name)
        return evaluate(graphdef, params, x, state)

    act = jax.jit(act, static_argnums=0)
    graphdef, params = puffer_jax.split(policy)
    first = state = first_state(policy)
    exact = exact_step(name, x)
    eager, _ = evaluate(graphdef, params, x, state)
    for _ in range(3):
        outputs, state = act(graphdef, params, x, state)
        if state is None or first is not None:
            found = {"eager": eager, "compiled": {key: outputs[key] for key in eager}}
            for each in found.values():
                assert_arrays_close(each, exact, "forward", "float32", name)
            first = None
    outputs, _ = act(*puffer_jax.split(other), x, state)
    assert len(traces) == 1
    assert all(y.dtype == jnp.float32 for y in outputs.values())


@pytest.mark.parametrize("name", POLICIES)
def test_vmap_over_three_seeds(name):
    built = [puffer_jax.split(small(name, seed)[0]) for seed in range(3)]
    graphdef, x, state = built[0][0], small(name)[1], first_state(small(name)[0])
    expected = [exact_step(name, x, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(params for _, params in built))
    actual, _ = jax.jit(jax.vmap(lambda params: evaluate(graphdef, params, x, state)))(stacked)
    for seed in range(3):
        outputs = {key: actual[key][seed] for key in expected[seed]}
        assert_arrays_close(outputs, expected[seed], "forward", "float32", name)
    assert relative_error(expected[0]["values"], expected[1]["values"]) > 1e-2


@pytest.mark.parametrize("transform", ["vmap", "jit"])
def test_init_under(transform):
    def build(key):
        options = {"rngs": nnx.Rngs(key), "param_dtype": jnp.float64}
        return puffer_jax.split(build_small("Default", **options))[1]

    # Under vmap rbg keys draw something else.
    impl = "threefry2x32" if transform == "vmap" else "rbg"
    keys = jax.random.split(jax.random.key(0, impl=impl), 2)
    if transform == "vmap":
        stacked = jax.jit(jax.vmap(build))(keys)
        found = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(2)]
        one_by_one = [jax.jit(build)(key) for key in keys]
    else:
        found = [jax.jit(build)(keys[0])]
        one_by_one = [build(keys[0])]
    for ours, expected in zip(found, one_by_one, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(expected)
        errors = jax.tree.map(relative_error, ours, expected)
        # A batched QR rounds otherwise.
        assert max(jax.tree.leaves(errors)) < 1e-14


@pytest.mark.parametrize("name", POLICIES)
def test_bfloat16_compute(name):
    exact, x = small(name)
    policy, _ = small(name, dtype=jnp.bfloat16)
    puffer_jax.load_state_dict(policy, puffer_jax.state_dict(exact))
    graphdef, params = puffer_jax.split(policy)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))

    def loss(params):
        outputs, state = evaluate(graphdef, params, x, first_state(policy))
        return ref.loss_of(outputs), (outputs, state)

    gradients, (outputs, state) = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected, _ = act(*puffer_jax.split(exact), x, first_state(exact))
    assert all(y.dtype == jnp.float32 for y in jax.tree.leaves((outputs, state, gradients)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    for key, value in expected.items():
        error = relative_error(outputs[key], value)
        assert error < BFLOAT16
        assert error > 1e-5 or key == "scale", f"{key}: nothing was computed in bfloat16"


@pytest.mark.tree
def test_scan_over_forward_eval_from_the_initial_state():
    policy, _ = small("LSTMWrapper")
    graphdef, params = puffer_jax.split(policy)
    x = normal(TIME, 3, 5, 3)

    @jax.jit
    def rollout(params, x):
        policy = puffer_jax.merge(graphdef, params)

        def step(state, x_t):
            logits, values, state = policy.forward_eval(x_t, state)
            return state, (named(logits, values))

        return jax.lax.scan(step, policy.initial_state(3), x)

    state, outputs = rollout(params, x)
    initial = policy.initial_state(3)
    assert jax.tree.structure(state) == jax.tree.structure(initial)
    assert list(state) == list(initial)
    assert list(jax.eval_shape(policy.forward_eval, x[0], initial)[2]) == list(initial)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(initial))
    whole = lambda p: named(*p(x.swapaxes(0, 1)))  # noqa: E731
    exact = compiled(puffer_jax.merge(*widened("LSTMWrapper")), whole)
    found = compiled(policy, whole)
    for values, c in (
        (outputs["values"][..., 0].T, state["lstm_c"]),
        (found["values"], found["state.lstm_c"]),
    ):
        assert values.dtype == c.dtype == jnp.float32
        assert relative_error(values, exact["values"]) < 5e-6
        assert relative_error(c, exact["state.lstm_c"]) < 5e-6


@pytest.mark.parametrize("name", POLICIES)
def test_eval_shape(name):
    policy, x = small(name)
    graphdef, params = puffer_jax.split(policy)
    outputs, state = jax.eval_shape(
        lambda params, x: evaluate(graphdef, params, x, first_state(policy)), params, x
    )
    assert outputs["values"].shape == (3, 1)
    assert outputs["values"].dtype == jnp.float32
    assert state is None or state["lstm_h"].shape == (3, 9)
    abstract = nnx.eval_shape(lambda: build_small(name))
    shapes = jax.tree.map(lambda leaf: leaf.shape, puffer_jax.split(abstract)[1])
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, params)


# --- initialisation ----------------------------------------------------------------------------


def assert_orthogonal(weight, gain):
    matrix = weight.reshape(len(weight), -1).astype(np.float64) / gain
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    assert np.abs(gram - np.eye(len(gram))).max() < 1e-6


def assert_uniform(values, bound):
    assert np.abs(values).max() <= np.float32(bound)
    assert scipy.stats.kstest(values.ravel() / bound, "uniform", (-1, 2)).pvalue > 1e-4


def assert_initialised(weights, rules):
    """Every weight is what the first fitting rule says: (part of the name, gain or function)."""
    uniform = []
    for name, weight in weights.items():
        rule = next(rule for part, rule in rules if part in name)
        if isinstance(rule, str):
            bound = 1 / math.sqrt(weights_fan_in(weights, name, rule))
            assert np.abs(weight).max() <= np.float32(bound), name
            uniform.append(weight.ravel() / bound)
            if weight.size > 100:
                assert_uniform(weight, bound)
        elif "bias" in name or weight.ndim < 2 or name.endswith("logstd"):
            np.testing.assert_array_equal(weight, 0 if "logstd" not in name else rule, name)
        else:
            assert_orthogonal(weight, rule)
    if uniform:
        # Small tensors and biases together.
        assert_uniform(np.concatenate(uniform), 1)


def weights_fan_in(weights, name, rule):
    """Bound of torch's uniform: fan-in of the layer, or the width of the LSTM."""
    if rule == "lstm":
        return weights["lstm.weight_hh_l0"].shape[1]
    return math.prod(weights[name.rsplit(".", 1)[0] + ".weight"].shape[1:])


SQRT2 = math.sqrt(2)
INIT = {
    "Default": [("encoder", SQRT2), ("logstd", 0), ("decoder", 0.01), ("value", 1)],
    "Convolutional": [("network", SQRT2), ("actor", 0.01), ("value_fn", 1)],
    "ProcgenResnet": [("network", "fan_in"), ("actor", 0.01), ("value", 1)],
    # The quirk: gain 1 everywhere, heads included, the log-std kept; the LSTM uniform, biases too.
    "LSTMWrapper": [("lstm", "lstm"), ("logstd", -0.5), ("policy", 1)],
    "LSTMWrapper(ProcgenResnet)": [("lstm", "lstm"), ("policy", 1)],
}


def initial_weights(library, name):
    """A freshly built policy's weights, under torch's names."""
    torch.manual_seed(0)
    key = {} if library is theirs else keywords(seed=3)
    inner = "ProcgenResnet" if "Procgen" in name else "Default"
    if name == "Convolutional":
        env = stub_env(Box(0, 255, (3, 45, 52), np.uint8), Discrete(5))
        sizes = {"framestack": 3, "flat_size": 384, "hidden_size": 70, "output_size": 70}
        policy = library.Convolutional(env, **sizes, **key)
    elif inner == "ProcgenResnet":
        env = stub_env(Box(0, 255, (13, 18, 3), np.uint8), Discrete(5))
        wrappable = WrappableResnet if library is theirs else library.ProcgenResnet
        policy = wrappable(env, 5, 70, **key)
    else:
        env = stub_env(Box(-1, 1, (31,)), Box(-1, 1, (6,)))
        policy = library.Default(env, 70, **key)
    if name.startswith("LSTM"):
        if library is theirs and inner == "Default":
            policy.decoder_logstd.data.fill_(-0.5)
        elif inner == "Default":
            policy.decoder_logstd[...] = jnp.asarray(np.full((1, 6), -0.5, np.float32))
        policy = library.LSTMWrapper(env, policy, 70, 70, **key)
    if library is theirs:
        return {key: p.detach().numpy() for key, p in policy.named_parameters()}
    return {key: p for key, p in puffer_jax.state_dict(policy).items() if "cell." not in key}


@pytest.mark.parametrize("library", [theirs, puffer_jax], ids=["theirs", "ours"])
@pytest.mark.parametrize("name", INIT)
def test_init(name, library):
    weights = initial_weights(library, name)
    assert all(weight.dtype == np.float32 for weight in weights.values())
    assert_initialised(weights, INIT[name])
    if "LSTM" in name:
        assert all(np.abs(weights[f"lstm.bias_{part}_l0"]).min() > 0 for part in ("ih", "hh"))
    # The check itself notices another gain, other biases.
    first = next(key for key in weights if key.endswith("weight"))
    for wrong in (2 * weights[first], np.zeros_like(weights[first])):
        with pytest.raises(AssertionError):
            assert_initialised({**weights, first: wrong}, INIT[name])


@pytest.mark.parametrize("library", [theirs, puffer_jax], ids=["theirs", "ours"])
def test_lstm_init_goes_by_its_width_not_its_input(library):
    if library is theirs:
        weights = dict(torch.nn.LSTM(40, 11).named_parameters())
        weights = {name: p.detach().numpy() for name, p in weights.items()}
    else:
        weights = puffer_jax.state_dict(puffer_jax.LSTM(40, 11, rngs=keywords()["rngs"]))
    assert {name: p.shape for name, p in weights.items()} == {
        "weight_ih_l0": (44, 40),
        "weight_hh_l0": (44, 11),
        "bias_ih_l0": (44,),
        "bias_hh_l0": (44,),
    }
    for weight in weights.values():
        assert_uniform(weight, 1 / math.sqrt(11))


@pytest.mark.tree
def test_init_depends_on_the_seed_only():
    first, again, other = (puffer_jax.state_dict(build_small("LSTMWrapper", s)) for s in (0, 0, 1))
    same_arrays(first, again)
    changed = [name for name in first if not np.array_equal(first[name], other[name])]
    assert changed == [n for n in first if not n.startswith("policy") or n.endswith("weight")]
    # No two layers share their numbers.
    ih, hh = first["lstm.bias_ih_l0"], first["lstm.bias_hh_l0"]
    assert not np.isin(ih, hh).any()


class TheirNorms(torch.nn.Module):
    is_continuous, hidden_size = False, 6

    def __init__(self):
        super().__init__()
        self.layer_norm = torch.nn.LayerNorm(6)
        self.layer_norm_projection = torch.nn.Linear(6, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.projection = torch.nn.Linear(6, 6)


class OurNorms(nnx.Module):
    is_continuous, hidden_size = False, 6

    def __init__(self, rngs):
        self.layer_norm = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)
        self.layer_norm_projection = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)
        self.projection = nnx.Linear(6, 6, rngs=rngs)


@pytest.mark.tree
def test_wrapper_skips_layer_norm_by_name():
    policy = ref.randomise(TheirNorms(), 1.0)
    before = {name: p.detach().numpy().copy() for name, p in policy.named_parameters()}
    ours = ref.skeleton(lambda: OurNorms(nnx.Rngs(0)))
    puffer_jax.load_state_dict(ours, before)
    theirs.LSTMWrapper(BOX, policy, 6, 6)
    reset_orthogonal(ours, rngs=keywords(seed=1)["rngs"])
    after = {name: p.detach().numpy() for name, p in policy.named_parameters()}
    actual = puffer_jax.state_dict(ours)
    random = "projection.weight"
    assert_orthogonal(after.pop(random), 1)
    assert_orthogonal(actual.pop(random), 1)
    same_arrays(actual, after)
    kept = {name for name in after if np.array_equal(after[name], before[name])}
    assert kept == {name for name in after if "layer_norm" in name} | {"norm.weight"}


# --- errors ------------------------------------------------------------------------------------


def cnn(shape=(3, 45, 52), action=None, **sizes):
    env = stub_env(Box(0, 255, shape, np.uint8), action or Discrete(5))
    sizes = {
        "framestack": 3,
        "flat_size": 384,
        "hidden_size": 9,
        "output_size": 9,
        **sizes,
    }
    return nnx.eval_shape(lambda: puffer_jax.Convolutional(env, **sizes, **keywords()))


def resnet(space, action):
    return puffer_jax.ProcgenResnet(stub_env(space, action), 2, 9, **keywords())


def box_policy(env=BOX):
    return ref.skeleton(lambda: puffer_jax.Default(env, 9, **keywords()))


class GymnaxLike:
    """Spaces are methods."""

    def observation_space(self, params=None):
        return Box(-1, 1, (4,))

    def action_space(self, params=None):
        return Discrete(2)


def in_lstm(*sizes):
    def build():
        policy = puffer_jax.Default(BOX, 9, **keywords())
        return puffer_jax.LSTMWrapper(BOX, policy, *sizes, **keywords())

    return ref.skeleton(build)


def mis_sized_custom():
    class Custom(nnx.Module):
        is_continuous = False

        def encode_observations(self, observations, state=None):
            return jnp.zeros((3, 8))

    build = lambda: puffer_jax.LSTMWrapper(BOX, Custom(), 7, 7, **keywords())  # noqa: E731
    return ref.skeleton(build)(normal(3, 5, 3))


def stepped(observations=None, h=(3, 9), c=(3, 9)):
    state = jax_state(np.zeros(h, np.float32), np.zeros(c, np.float32))
    x = normal(3, 5, 3) if observations is None else observations
    return in_lstm(9, 9).forward_eval(x, state)


def masked(*shape):
    return in_lstm(9, 9)(normal(3, 2, 5, 3), done=np.zeros(shape, bool))


FRAMES = Box(0, 255, (9, 6, 2), np.uint8)
FIELDS = Dict(a=Box(-1, 1, (3,)), b=Box(-1, 1, (2,)))
ERRORS = [
    (lambda: cnn(output_size=10), "hidden_size is 9 and output_size 10.*output_size=9"),
    (lambda: cnn(flat_size=512), "flat_size is 512 .* give 384; pass flat_size=384"),
    (lambda: cnn(downsample=2), "45x52 with downsample=2 are too small"),
    (lambda: cnn((3, 35, 52)), "35x52 with downsample=1 are too small"),
    (lambda: cnn(framestack=4), r"framestack is 4 .*\(3, 45, 52\) has 3.*pass framestack=3"),
    (lambda: cnn(channels_last=True), r"has 52 channels, read as \(H, W, C\)"),
    (lambda: cnn((45, 52)), r"three dimensions; got shape \(45, 52\)"),
    (lambda: cnn(action=MultiDiscrete([2, 3])), "Convolutional acts in Discrete spaces only"),
    (lambda: cnn(action=Box(-1, 1, (2,))), "Convolutional acts in Discrete spaces only"),
    (lambda: resnet(FRAMES, Box(-1, 1, (2,))), "ProcgenResnet acts in Discrete spaces only"),
    (lambda: resnet(FRAMES, MultiDiscrete([2])), "ProcgenResnet acts in Discrete spaces only"),
    (lambda: resnet(Box(0, 1, (6,)), Discrete(2)), r"three dimensions; got shape \(6,\)"),
    (lambda: box_policy(stub_env(BOX.observation_space, Box(-1, 1, (2, 3)))), "one-dimensional"),
    (
        lambda: box_policy(stub_env(BOX.observation_space, MultiDiscrete([[2, 3]]))),
        "one-dimensional",
    ),
    (lambda: in_lstm(8, 9), "input_size is 8 but Default's hidden_size is 9; pass input_size=9"),
    (lambda: in_lstm(9, 8), "hidden_size is 8 but Default's hidden_size is 9; pass hidden_size=9"),
    (mis_sized_custom, r"encodes to shape \(3, 8\).*input_size is 7.*input_size=8"),
    (lambda: box_policy()(normal(3, 5, 4)), r"\(3, 5, 4\) do not fit .* 15 numbers"),
    (lambda: in_lstm(9, 9)(normal(3, 2, 5, 4)), r"\(3, 2, 5, 4\); expected .*\(5, 3\)"),
    (lambda: in_lstm(9, 9)(normal(5, 3)), r"\(5, 3\); expected"),
    (lambda: in_lstm(9, 9)({"a": normal(3, 5)}), "the observation space is neither"),
    (lambda: stepped(h=(3, 8)), r"lstm_h'\] has shape \(3, 8\); expected .*\(3, 9\)"),
    (lambda: stepped(c=(1, 3, 9)), r"lstm_c'\] has shape \(1, 3, 9\); expected .*\(3, 9\)"),
    (lambda: stepped(normal(4, 5, 3)), r"lstm_[hc]'\] has shape \(3, 9\); expected .*\(4, 9\)"),
    (lambda: masked(2, 3), r"done has shape \(2, 3\); expected \(batch, time\) = \(3, 2\)"),
    (lambda: masked(3), r"done has shape \(3,\)"),
    (
        lambda: box_policy(stub_env(FIELDS, Discrete(2)))({"a": normal(3, 3)}),
        "missing.*b|b.*missing",
    ),
    (lambda: box_policy(stub_env(FIELDS, Discrete(2)))(normal(3, 6)), r"\(3, 6\)"),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_value_errors(number):
    build, message = ERRORS[number]
    with pytest.raises(ValueError, match=message):
        build()


def test_environments_that_are_none():
    with pytest.raises(AttributeError, match="neither `single_action_space` nor `action_space`"):
        box_policy(SimpleNamespace(observation_space=BOX.observation_space))
    with pytest.raises(AttributeError, match="neither `single_observation_space` nor"):
        box_policy(SimpleNamespace(action_space=Discrete(2)))
    with pytest.raises(TypeError, match=r"GymnaxLike.*is a method"):
        box_policy(GymnaxLike())
    with pytest.raises(TypeError, match="unsupported space"):
        box_policy(stub_env(object(), Discrete(2)))


def test_only_spaces_are_touched():
    class Env:
        single_observation_space = BOX.observation_space
        single_action_space = Discrete(3)

        def __getattr__(self, name):
            assert name == "emulated", name
            raise AttributeError(name)

    assert box_policy(Env()).env_spec == box_policy().env_spec
    # A policy's own spec serves as an env.
    assert box_policy(box_policy().env_spec).env_spec == box_policy().env_spec


# --- split and merge ---------------------------------------------------------------------------


class TheirCustom(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.zeta = torch.nn.Linear(4, 3)
        self.scale = torch.nn.Parameter(torch.ones(2))
        self.alpha = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Embedding(5, 2)])
        self.beta = torch.nn.Parameter(torch.ones(1))


class OurCustom(nnx.Module):
    def __init__(self, rngs):
        self.zeta = nnx.Linear(4, 3, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(2))
        self.alpha = nnx.List([nnx.Linear(3, 2, rngs=rngs), nnx.Embed(5, 2, rngs=rngs)])
        self.beta = nnx.Param(jnp.ones(1))


@pytest.mark.tree
def test_merge_keeps_torch_order():
    expected = list(TheirCustom().state_dict())
    ours = OurCustom(keywords()["rngs"])
    for _ in range(2):
        assert list(puffer_jax.state_dict(ours)) == expected
        ours = puffer_jax.merge(*puffer_jax.split(ours))
    # A pure dict comes back from JAX sorted; that must not matter.
    graphdef, params = puffer_jax.split(ours)
    params = jax.tree.map(lambda leaf: leaf, params)
    assert list(puffer_jax.state_dict(puffer_jax.merge(graphdef, params))) == expected


@pytest.mark.tree
@pytest.mark.parametrize("name", POLICIES)
def test_split_and_merge(name):
    policy, _ = small(name)
    graphdef, params = puffer_jax.split(policy)
    other, _ = puffer_jax.split(small(name, seed=1)[0])
    assert graphdef == other
    assert hash(graphdef) == hash(other)
    assert graphdef != puffer_jax.split(small(name, dtype=jnp.bfloat16)[0])[0]
    again = puffer_jax.merge(graphdef, params)
    same_arrays(puffer_jax.state_dict(again), puffer_jax.state_dict(policy))
    assert type(again) is type(policy)
    assert again.env_spec == policy.env_spec
    assert puffer_jax.split(again)[0] == graphdef
    leaves = jax.tree.leaves(params)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == sum(
        p.size for key, p in puffer_jax.state_dict(policy).items() if not key.startswith("cell")
    )


@pytest.mark.tree
def test_merge_names_what_does_not_fit():
    graphdef, params = puffer_jax.split(small("Default")[0])
    missing = {key: value for key, value in params.items() if key != "value"}
    wrong = {**params, "decoder_logstd": jnp.zeros((1, 4)), "value": dict(params["value"])}
    wrong["value"]["weights"] = wrong["value"].pop("kernel")
    for given, parts in (
        (missing, ["missing: ", "value.kernel", "value.bias"]),
        ({**params, "extra": jnp.zeros(2)}, ["unexpected: extra (2,)"]),
        (
            wrong,
            [
                "missing: value.kernel",
                "unexpected: value.weights",
                "decoder_logstd (1, 4) instead of (1, 3)",
            ],
        ),
    ):
        with pytest.raises(ValueError, match="do not fit the policy") as error:
            puffer_jax.merge(graphdef, given)
        for part in parts:
            assert part in str(error.value)


class WithDropout(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(2, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class WithBatchNorm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(2, rngs=rngs)


@pytest.mark.tree
@pytest.mark.parametrize(
    "module, found", [(WithDropout, "dropout.rngs"), (WithBatchNorm, "norm.mean: BatchStat")]
)
def test_split_refuses_what_is_no_parameter(module, found):
    with pytest.raises(TypeError, match=f"only nnx.Param and static values.*{found}"):
        puffer_jax.split(module(nnx.Rngs(0)))


@pytest.mark.tree
@pytest.mark.parametrize("name", ["discrete", "continuous"])
def test_state_dict_order_is_the_reference_s(name):
    env = stub_env(BOX.observation_space, ACTIONS[name])
    policy, build = lstm(env)
    ours = ref.twin(policy, build, "float32")
    expected = {key: tuple(p.shape) for key, p in policy.state_dict().items()}
    for candidate in (ours, puffer_jax.merge(*puffer_jax.split(ours)), nnx.clone(ours)):
        found = puffer_jax.state_dict(candidate)
        assert OrderedDict((key, p.shape) for key, p in found.items()) == OrderedDict(expected)
    parameters = [key for key in found if not key.startswith("cell.")]
    assert parameters == [key for key, _ in policy.named_parameters()]


@pytest.mark.tree
def test_flax_mode_is_what_the_environment_asks_for():
    for name in ("nnx_graph_mode", "nnx_graph_updates"):
        asked = os.environ.get(name.upper(), "true").lower()
        assert getattr(flax.config, name) == (asked in ("true", "1", "yes", "on"))
