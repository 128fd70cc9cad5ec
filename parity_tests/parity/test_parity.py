"""The parity report: silent where two policies agree, and pointing at the layer where not."""

import json
import math
import re
import subprocess
import sys
from contextlib import ExitStack

import gymnasium.spaces as gs
import jax
import jax.numpy as jnp
import numpy as np
import pufferlib.models as reference
import pytest
import torch
from flax import nnx
from support.bars import stub_env

import puffer_jax
from puffer_jax.kernels import OPERATIONS, replace, use
from puffer_jax.kernels.cpu import native
from puffer_jax.kernels.perceptron import gelu
from puffer_jax.nn.cores.lstm import LSTM
from puffer_jax.nn.images import flatten_channels_first
from puffer_jax.nn.torch_layout import torch_parameters
from puffer_jax.parity import comparison
from puffer_jax.parity.comparison import compare
from puffer_jax.parity.reference import reference_policy
from puffer_jax.parity.report import BARS, MAX_RATIO, PRECISIONS, Errors, Report, Row

pytestmark = pytest.mark.usefixtures("quick")

IMAGE = gs.Box(0, 255, (2, 36, 44), np.uint8)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def default(action, shape=(5, 3), hidden=24):
    return puffer_jax.Default(
        stub_env(gs.Box(-1, 1, shape), action), hidden_size=hidden, rngs=nnx.Rngs(0)
    )


def lstm(policy, hidden=24):
    return puffer_jax.LSTMWrapper(policy.env_spec, policy, hidden, hidden, rngs=nnx.Rngs(1))


def state(batch, hidden=24):
    return {name: normal(batch, hidden, seed=i) for i, name in enumerate(("lstm_h", "lstm_c"))}


def twins(policy):
    """PufferLib's policy and ours, with PufferLib's weights."""
    torch.manual_seed(0)
    original = reference_policy(policy)
    puffer_jax.load_state_dict(policy, original.state_dict())
    return original, policy


def convolutional(**options):
    env = stub_env(IMAGE, gs.Discrete(4))
    sizes = {"framestack": 2, "flat_size": 128, "hidden_size": 24, "output_size": 24}
    return puffer_jax.Convolutional(env, **sizes, **options, rngs=nnx.Rngs(0))


def resnet():
    env = stub_env(gs.Box(0, 255, (9, 12, 3), np.uint8), gs.Discrete(4))
    return puffer_jax.ProcgenResnet(env, cnn_width=2, mlp_width=12, rngs=nnx.Rngs(0))


# --- policies that agree -----------------------------------------------------------------------

PAIRS = {
    "Discrete": (lambda: default(gs.Discrete(5)), lambda: (normal(32, 5, 3),)),
    "MultiDiscrete": (lambda: default(gs.MultiDiscrete([2, 1, 4])), lambda: (normal(32, 5, 3),)),
    "Box": (lambda: default(gs.Box(-1, 1, (3,))), lambda: (normal(32, 5, 3),)),
    "LSTM": (lambda: lstm(default(gs.Discrete(5))), lambda: (normal(16, 6, 5, 3),)),
    "LSTM, state, one step": (
        lambda: lstm(default(gs.Box(-1, 1, (3,)))),
        lambda: (normal(32, 5, 3), state(32)),
    ),
    "LSTM, state, done": (
        lambda: lstm(default(gs.MultiDiscrete([2, 3]))),
        lambda: (normal(16, 6, 5, 3), state(16), normal(16, 6) > 0.5),
    ),
    "Convolutional": (convolutional, lambda: (images(16, 2, 36, 44),)),
    "ProcgenResnet": (resnet, lambda: (images(16, 9, 12, 3),)),
}


@pytest.fixture(scope="module")
def reports():
    made = {}

    def report(name):
        if name not in made:
            build, inputs = PAIRS[name]
            made[name] = compare(*twins(build()), *inputs())
        return made[name]

    return report


@pytest.mark.parametrize("name", PAIRS)
def test_our_policies_are_close_to_pufferlibs(reports, name):
    report = reports(name)
    report.assert_close()
    assert report.first_difference is None
    assert report.weights_differ == report.not_compared == ()
    assert all(0 < ratio <= MAX_RATIO for ratio in report.ratios.values())
    outputs, gradients, layers = ({r.name for r in report.of(k)} for k in BARS)
    original = reference_policy(PAIRS[name][0]())
    assert gradients == dict(original.named_parameters()).keys()
    ran = {n for n, _ in original.named_modules() if n not in ("", "cell", "policy")}
    assert layers == ran
    assert "values" in outputs
    has_eval = hasattr(original, "forward_eval")
    assert ("eval.values" in outputs) == has_eval
    # float32 cannot be this close to float64 by accident: it would mean that one was run twice.
    assert max(row.float32.relative for row in report.rows) > 1e-9


def test_outputs_have_names_and_torchs_shapes(reports):
    def shapes(name):
        return {row.name: row.shape for row in reports(name).of("output")}

    assert shapes("Discrete")["logits"] == (32, 5)
    assert [shapes("MultiDiscrete")[f"logits[{i}]"] for i in range(3)] == [
        (32, 2),
        (32, 1),
        (32, 4),
    ]
    assert shapes("Box")["eval.logits.loc"] == shapes("Box")["logits.scale"] == (32, 3)
    for name, time in (("LSTM", 6), ("LSTM, state, done", 6)):
        batch = {"values": (16, time), "state.lstm_h": (16, 24), "state.lstm_c": (16, 24)}
        batch |= {"state.hidden": (16, time, 24), "eval.values": (16, 1)}
        assert shapes(name).items() >= batch.items()


def test_layers_come_in_torchs_order_of_execution(reports):
    expected = ["policy.encoder.0", "policy.encoder.1", "policy.encoder", "lstm"]
    for name in ("LSTM", "LSTM, state, done"):
        assert [row.name for row in reports(name).of("layer")][:4] == expected


def test_nothing_but_the_float64_run_sees_a_float32_step():
    """The reference's `.float()` would leave 1e-8 in every row."""
    report = compare(*twins(default(gs.Discrete(3))), normal(8, 5, 3).astype(np.float64))
    assert max(row.float64.relative for row in report.rows) < 1e-14


@pytest.mark.parametrize("wrapped", [puffer_jax.Convolutional, puffer_jax.ProcgenResnet])
def test_reference_policy_also_wraps_image_policies(wrapped):
    def build():
        inner = convolutional() if wrapped is puffer_jax.Convolutional else resnet()
        return lstm(inner, inner.hidden_size)

    policy = nnx.eval_shape(build)
    original = reference_policy(policy)
    shapes = {name: tuple(parameter.shape) for name, parameter in original.named_parameters()}
    assert shapes == {p.name: p.shape for p in torch_parameters(policy)}
    observations = torch.zeros(2, 3, *policy.env_spec.single_observation_space.shape)
    _, values = original(observations, {"lstm_h": None, "lstm_c": None})
    assert values.shape == (2, 3)


def test_reference_policy_knows_no_custom_class():
    with pytest.raises(ValueError, match="no policy of the class Linear"):
        reference_policy(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


# --- custom policies -----------------------------------------------------------------------------


class TorchCustom(torch.nn.Module):
    """Two inputs, a layer norm, an in-place activation that is used twice, casts to float32."""

    def __init__(self):
        super().__init__()
        self.left = torch.nn.Linear(4, 8)
        self.right = torch.nn.Linear(3, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.act = torch.nn.ReLU(inplace=True)
        self.trunk = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        self.actor = torch.nn.Linear(8, 3)
        self.critic = torch.nn.Linear(8, 1)

    def encode_observations(self, observations, state=None):
        left = self.act(self.left(observations["left"].to(torch.float32)))
        right = self.act(self.right(observations["right"].type(dtype=torch.float32)))
        return self.trunk(self.norm(left + right))

    def decode_actions(self, hidden):
        return self.actor(hidden), self.critic(hidden)


class Custom(nnx.Module):
    def __init__(self, activation=jnp.tanh, critic_bias=True, norm_epsilon=1e-5, trunk=True):
        rngs = nnx.Rngs(0)
        self.left = nnx.Linear(4, 8, rngs=rngs)
        self.right = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, epsilon=norm_epsilon, use_fast_variance=False, rngs=rngs)
        self.trunk = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), activation)
        self.actor = nnx.Linear(8, 3, rngs=rngs)
        self.critic = nnx.Linear(8, 1, use_bias=critic_bias, rngs=rngs)

    def encode_observations(self, observations, state=None):
        left = jax.nn.relu(self.left(observations["left"]))
        right = jax.nn.relu(self.right(observations["right"]))
        return self.trunk(self.norm(left + right))

    def decode_actions(self, hidden):
        return self.actor(hidden), self.critic(hidden)


def custom(strict=True, **options):
    torch.manual_seed(0)
    original, port = TorchCustom(), Custom(**options)
    puffer_jax.load_state_dict(port, original.state_dict(), strict=strict)
    return original, port


OBSERVATIONS = {"left": normal(64, 4), "right": images(64, 3)}


@pytest.mark.tree
def test_custom_policies_with_encode_and_decode_and_dict_observations():
    report = compare(*custom(), OBSERVATIONS)
    report.assert_close()
    assert [row.name for row in report.of("layer")] == [
        *("left", "right", "norm", "trunk.0", "trunk.1", "trunk", "actor", "critic")
    ]
    assert set(report.not_compared) == {"act (torch only)", "act (call 2) (torch only)"}
    assert "not compared: act (torch only)" in str(report)


class TorchForward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)])
        self.scale = torch.nn.Parameter(torch.full((4,), 0.3))

    def forward(self, pair):
        first, second = (layer(x) for layer, x in zip(self.layers, pair, strict=True))
        return torch.sigmoid(first * second) * self.scale


class Forward(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs) for _ in range(2)])
        self.scale = nnx.Param(jnp.zeros(4))

    def __call__(self, pair):
        def one(_, x):  # the first layer runs where its output has no value outside
            return None, self.layers[0](x)

        first = jax.lax.scan(one, None, pair[0])[1]
        return jax.nn.sigmoid(first * self.layers[1](pair[1])) * self.scale[...]


def test_custom_policies_with_forward_only_and_tuple_observations():
    original, port = TorchForward(), Forward()
    puffer_jax.load_state_dict(port, original.state_dict())
    report = compare(original, port, (normal(64, 3), normal(64, 3, seed=1)))
    report.assert_close()
    assert [row.name for row in report.of("output")] == ["output"]
    assert [row.name for row in report.of("layer")] == ["layers.1"]
    assert report.not_compared == ("layers.0 (torch only)",)


# --- ports that are wrong ------------------------------------------------------------------------


def assert_found(report, layer, *messages):
    assert report.first_difference == layer
    with pytest.raises(AssertionError) as caught:
        report.assert_close()
    for message in (f"first in layer {layer}", *messages):
        assert message in str(caught.value)
    assert f"First layer that differs: {layer}" in str(report)
    assert not str(report).startswith("CLOSE")


class Attention(nnx.Module):
    def __init__(self):
        self.is_continuous = False
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))

    def forward(self, x, state=None):
        y = self.attention(x)[:, 0]
        return y, y[:, :1]


class TorchAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x, state=None):
        y = self.attention(x, x, x, need_weights=False)[0][:, 0]
        return y, y[:, :1]


def test_a_layer_that_computes_in_float32_is_named():
    torch.manual_seed(0)
    theirs, ours = TorchAttention(), Attention()
    puffer_jax.load_state_dict(ours, theirs.state_dict())
    assert_found(
        compare(theirs, ours, normal(32, 4, 6)), "attention", "nnx.MultiHeadAttention does unless"
    )


class Between(nnx.Module):
    """Two layers, and something between them."""

    def __init__(self, between):
        self.is_continuous, self.between = False, between
        options = {"rngs": nnx.Rngs(0), "param_dtype": jnp.float32}
        self.first, self.out = nnx.Linear(6, 6, **options), nnx.Linear(6, 6, **options)

    def forward(self, x, state=None):
        y = self.out(self.between(x, self.first(x)))
        return y, y[:, :1]


class TorchBetween(torch.nn.Module):
    def __init__(self, between):
        super().__init__()
        self.between, self.first = between, torch.nn.Linear(6, 6)
        self.out = torch.nn.Linear(6, 6)

    def forward(self, x, state=None):
        y = self.out(self.between(x, self.first(x)))
        return y, y[:, :1]


@pytest.mark.parametrize(
    "theirs, ours, said",
    [
        (lambda x, y: torch.relu(y), lambda x, y: jnp.tanh(y), "ReLU to the output of first, ours"),
        (
            lambda x, y: torch.nn.functional.gelu(y),
            lambda x, y: jax.nn.gelu(y),
            "applies GELU to the output of first, ours GELU in its tanh form",
        ),
        (lambda x, y: x + torch.relu(y), lambda x, y: x, "look between first and out)"),
        (lambda x, y: y + x, lambda x, y: x, "torch adds the output of first, ours does not"),
        (lambda x, y: y.flip(1), lambda x, y: y, "the same numbers stand in another order"),
        (lambda x, y: 255 * y + x, lambda x, y: y + x / 255, "torch's is 255 times ours"),
    ],
)
def test_a_fault_between_layers_is_not_the_next_layers(theirs, ours, said):
    torch.manual_seed(0)
    theirs, ours = TorchBetween(theirs), Between(ours)
    puffer_jax.load_state_dict(ours, theirs.state_dict())
    report = compare(theirs, ours, normal(32, 6))
    assert report.hint.startswith("its input differs already: look between first and out")
    assert_found(report, "out", report.hint)
    assert said.rstrip(")") in report.hint
    assert not said.endswith(")") or report.hint.endswith("out")


def test_swapped_lstm_gates_are_found():
    def swapped(weights):
        return tuple(jnp.roll(array, array.shape[0] // 4, axis=0) for array in weights)

    class Swapped(LSTM):
        @classmethod
        def layer_step(cls, weights, *arguments):
            return super().layer_step(swapped(weights), *arguments)

        @classmethod
        def layer_scan(cls, weights, *arguments):
            return super().layer_scan(swapped(weights), *arguments)

    policy = lstm(default(gs.Discrete(2), hidden=8), 8)
    policy.lstm = Swapped(8, 8, rngs=nnx.Rngs(0))
    report = compare(*twins_of(policy), normal(4, 3, 5, 3))
    assert not report.weights_differ
    assert_found(report, "lstm", "output eval.state.lstm_c: float64 error")
    names = [row.name for row in report.of("layer") if row.float64.relative > 1e-14]
    assert names == ["lstm", "policy.decoder", "policy.value"]


def twins_of(policy):
    """As `twins`, for a policy that `reference_policy` takes by its sizes only."""
    original = reference.LSTMWrapper(
        stub_env(gs.Box(-1, 1, (5, 3)), gs.Discrete(2)),
        reference.Default(stub_env(gs.Box(-1, 1, (5, 3)), gs.Discrete(2)), 8),
        8,
        8,
    )
    puffer_jax.load_state_dict(policy, original.state_dict())
    return original, policy


def test_tanh_gelu_is_found():
    original, policy = twins(default(gs.Discrete(2)))
    policy.encoder = nnx.Sequential(policy.encoder.layers[0], jax.nn.gelu)
    report = compare(original, policy, normal(16, 5, 3))
    assert_found(report, "encoder.1", "output logits: float64 error", "gradient encoder.0.weight")
    (row,) = (row for row in report.of("layer") if row.name == "encoder.1")
    grid = jnp.linspace(-6, 6, 1000)
    largest = float(jnp.abs(jax.nn.gelu(grid) - gelu(grid)).max())
    assert 0.5 * largest < row.float64.absolute < 1.01 * largest


def test_missing_bias_is_found():
    original, port = custom(strict=False, critic_bias=False)
    report = compare(original, port, OBSERVATIONS)
    assert report.weights_differ == ("critic.bias (missing in JAX)",)
    assert_found(report, "critic", "weights differ: critic.bias (missing in JAX)")
    assert not any("logits" in failure for failure in report.failures)


def test_transposed_weight_is_found():
    original, port = custom()
    kernel = port.trunk.layers[0].kernel
    kernel[...] = kernel[...].T
    report = compare(original, port, OBSERVATIONS)
    assert report.weights_differ == ("trunk.0.weight",)
    assert_found(report, "trunk.0", "weights differ: trunk.0.weight")


def test_a_wrong_epsilon_is_found():
    report = compare(*custom(norm_epsilon=1e-6), OBSERVATIONS)
    assert_found(report, "norm", "layer norm: float64 error")


class Images(nnx.Module):
    """Convolution, flatten, Linear."""

    def __init__(self, flatten):
        rngs = nnx.Rngs(0)
        self.network = nnx.Sequential(
            nnx.Conv(3, 4, (2, 2), padding="VALID", rngs=rngs),
            jax.nn.relu,
            flatten,
            nnx.Linear(4 * 3 * 2, 2, rngs=rngs),
        )

    def forward(self, x):
        return self.network(x)


class TorchImages(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(24, 2)
        )

    def forward(self, x):
        return self.network(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize("channels_first", [True, False])
def test_channels_last_flatten_is_found(channels_first):
    wrong = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
    torch.manual_seed(0)
    original, port = TorchImages(), Images(flatten_channels_first if channels_first else wrong)
    puffer_jax.load_state_dict(port, original.state_dict())
    report = compare(original, port, normal(16, 4, 3, 3))
    if channels_first:
        report.assert_close()
    else:
        assert_found(report, "network.2", "output output: float64 error")


def test_weights_that_were_not_loaded_are_said_first():
    policy = default(gs.Discrete(2))
    report = compare(reference_policy(policy), policy, normal(4, 5, 3))
    assert set(report.weights_differ) == {"encoder.0.weight", "decoder.weight", "value.weight"}
    first, hint = str(report).splitlines()[:2]
    assert first.startswith("THE WEIGHTS DIFFER: encoder.0.weight, ")
    assert "puffer_jax.load_state_dict(jax_policy, torch_policy.state_dict())" in hint
    assert_found(report, "encoder.0", "weights differ: value.weight")


def test_outputs_of_another_shape_are_a_failure_not_an_error():
    original = reference_policy(default(gs.Discrete(3)))
    report = compare(original, default(gs.Discrete(2)), normal(4, 5, 3))
    assert "decoder.weight ((3, 24) in torch, (2, 24) in JAX)" in report.weights_differ
    failures = "\n".join(report.failures)
    assert "output logits: shape (4, 2), torch has (4, 3)" in failures
    assert "gradient decoder.bias: shape (2,), torch has (3,)" in failures
    assert "\n✗ logits: shape (4, 2), torch has (4, 3)\n" in str(report)


def test_missing_outputs_are_a_failure():
    original = reference_policy(default(gs.MultiDiscrete([2, 3])))
    report = compare(original, default(gs.Discrete(5)), normal(4, 5, 3))
    failures = "\n".join(report.failures)
    assert "output logits[0]: missing in JAX" in failures
    assert "output logits: missing in torch" in failures


@pytest.mark.parametrize("side", ["torch", "JAX"])
def test_an_exception_says_whose_it_is(side):
    original, policy = twins(default(gs.Discrete(2)))

    def broken(observations, state=None):
        raise RuntimeError("out of order")

    if side == "torch":
        original.encode_observations = broken
    else:
        # An attribute would not survive split and merge.
        policy = type("Broken", (puffer_jax.Default,), {"encode_observations": broken})(
            policy.env_spec, 24, rngs=nnx.Rngs(0)
        )
        policy.forward = broken
    with pytest.raises(RuntimeError, match="out of order") as caught:
        compare(original, policy, normal(4, 5, 3))
    assert caught.value.__notes__[-1] == f"raised by the {side} policy in float64"


# --- gradients that are wrong, of every implementation ------------------------------------------

# What no policy's forward pass computes: draws, advantages, the optimizer's step. And MinGRU's
# layers, which PufferLib 3 does not have.
NOT_IN_POLICIES = {
    *("threefry", "categorical", "sample", "score", "outcome", "recurrence", "recurrence_onwards"),
    *("mingru_layer", "sums", "norm", "first_nonfinite", "adam", "orthogonalize"),
}


def doubled(function):
    """The same values, with twice the gradient."""

    def double(x):
        return 2 * x - jax.lax.stop_gradient(x)

    return lambda *arrays, **options: jax.tree.map(double, function(*arrays, **options))


@pytest.fixture(scope="module")
def operations_of():
    """The operations that a policy of `PAIRS` computes with these implementations."""
    found = {}

    def operations(name, implementation):
        if (name, implementation) in found:
            return found[name, implementation]
        ran = found[name, implementation] = set()

        def spy(operation):
            function = OPERATIONS[operation].implementations[implementation]

            def call(*arrays, **options):
                ran.add(operation)
                return function(*arrays, **options)

            return call

        build, inputs = PAIRS[name]
        policy, inputs = build(), inputs()
        with ExitStack() as stack:
            stack.enter_context(use(implementation))
            for operation in OPERATIONS.values():
                if implementation in operation.implementations:
                    stack.enter_context(
                        replace(operation.name, implementation, spy(operation.name))
                    )
            jax.eval_shape(policy.forward, *inputs[:1])
            first = jax.tree.map(lambda x: x[:, 0], inputs[0]) if "LSTM" in name else inputs[0]
            jax.eval_shape(policy.forward_eval, first)
        return ran

    return operations


IMPLEMENTATIONS = [
    (name, implementation)
    for name, operation in OPERATIONS.items()
    if name not in NOT_IN_POLICIES
    for implementation in operation.implementations
    if implementation in ("xla", "cpu", jax.default_backend())  # others do not run here
]


@pytest.mark.parametrize("operation, implementation", IMPLEMENTATIONS)
def test_a_wrong_gradient_is_found(operations_of, operation, implementation):
    if implementation == "cpu":
        assert native.is_available("float64"), "the tests need a C++ compiler"
    policies = ("Discrete", "LSTM", "Convolutional", "ProcgenResnet")
    name = next(n for n in policies if operation in operations_of(n, implementation))
    build, inputs = PAIRS[name]
    function = OPERATIONS[operation].implementations[implementation]
    with use(implementation), replace(operation, implementation, doubled(function)):
        report = compare(*twins(build()), *inputs())
    wrong = [row for row in report.of("gradient") if row.float64.relative > 1e-3]
    assert wrong
    for row in wrong:
        assert f"gradient {row.name}: float64 error" in "\n".join(report.failures)
    # Values and layers are right: what differs is only what the policy itself differentiates.
    assert report.first_difference is None
    assert not any(row.failures for row in report.of("output"))
    assert "So do the outputs. Look at gradients that are written out" in str(report)


# --- nothing else changes ------------------------------------------------------------------------


def test_policies_and_global_settings_are_left_alone():
    original, policy = custom()
    original.critic.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    ours = puffer_jax.state_dict(policy)
    classes = [type(module) for _, module in nnx.iter_modules(policy)]
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    try:
        with jax.enable_x64(False), jax.default_matmul_precision("bfloat16"):
            compare(original, policy, OBSERVATIONS)
            assert not jax.config.jax_enable_x64
            assert jax.config.jax_default_matmul_precision == "bfloat16"
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    assert jax.config.jax_enable_x64
    after = original.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(parameter.grad is None for parameter in original.parameters())
    assert not original.critic.bias.requires_grad
    assert not any("forward" in vars(module) for module in original.modules())
    assert all(np.array_equal(a, ours[n]) for n, a in puffer_jax.state_dict(policy).items())
    assert policy.left.kernel.dtype == jnp.float32
    assert [type(module) for _, module in nnx.iter_modules(policy)] == classes
    assert policy.trunk.layers[1] is jnp.tanh
    assert policy.left.param_dtype == jnp.float32


def test_settings_are_restored_after_an_error():
    with pytest.raises(RuntimeError) as caught:
        compare(*custom(), {"left": normal(4, 3), "right": normal(4, 3)})
    assert caught.value.__notes__ == ["raised by the torch policy in float64"]
    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(1).double().float().dtype == torch.float32


def test_importing_needs_no_torch_and_comparing_says_how_to_get_it():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from puffer_jax.parity import compare, reference_policy\n"
        "try: compare(None, None, None)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "comparing with torch needs torch: pip install 'torch>=2.10'\n"


# --- numbers and presentation --------------------------------------------------------------------


def test_errors_by_hand():
    there = np.array([1.0, -4.0, 0.0])
    here = np.array([1.0 + 2**-52, -4.0, 2**-60])
    errors = comparison._errors(here, there, np.dtype(np.float64))
    # Zero counts as one unit of the last place of 4, which is 2**-50.
    assert errors == Errors(2**-52, 2**-54, 2**-60 / 2**-102)
    assert comparison._errors(there, there, np.dtype(np.float32)) == Errors(0.0, 0.0, 0.0)
    one = np.float32([1, 2])
    assert comparison._errors(np.nextafter(one, 3), one, np.dtype(np.float32)).ulp == 1


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ([np.nan, 1], [np.nan, 1], 0),
        ([np.inf, 1], [np.inf, 1], 0),
        ([np.nan, 1], [2, 1], math.inf),
        ([2, 1], [np.inf, 1], math.inf),
        ([-np.inf, 1], [np.inf, 1], math.inf),
        ([1e-3, 0], [0, 0], 1e-3),
        ([], [], 0),
    ],
)
def test_errors_of_numbers_that_are_none(here, there, expected):
    errors = comparison._errors(np.float64(here), np.float64(there), np.dtype(np.float64))
    assert errors.relative == expected


def row(kind="output", float64=0.0, float32=0.0, torch_rms=1e-7, jax_rms=1e-7, name="x"):
    errors = (Errors(error, error, 1.0) for error in (float64, float32))
    return Row(name, kind, (2,), *errors, torch_rms, jax_rms)


def test_bars():
    for kind, bars in BARS.items():
        for precision, bar in bars.items():
            assert Report((row(kind, **{precision: bar}),), (), ()).failures == []
            (failure,) = Report((row(kind, **{precision: 2 * bar}),), (), ()).failures
            assert failure == f"{kind} x: {precision} error {2 * bar:.1e} > {bar:.0e}"


def test_float32_errors_are_judged_together():
    twice = row("gradient", torch_rms=1e-7, jax_rms=3e-7)
    four = [row("gradient", torch_rms=3e-7, jax_rms=2e-7) for _ in range(4)]
    assert Report((twice, *four), (), ()).failures == []
    report = Report((*[twice] * 50, row("output")), (), ())
    assert report.failures == ["float32 errors of all gradients: 3.00 times torch's own > 2"]
    assert report.ratios == {"output": 1.0, "gradient": pytest.approx(3.0)}
    assert row(torch_rms=0.0, jax_rms=1e-9).ratio == 1.0
    assert Report((*[twice] * 49, row("output")), (), ()).failures == []  # too few numbers


def test_report_is_readable(reports):
    text = str(reports("LSTM"))
    lines = text.splitlines()
    assert lines[:2] == ["CLOSE.", "All 6 layers agree."]
    assert max(map(len, lines)) <= 100
    for word in ("outputs", "gradients", "layers", "abs", "rel", "ulp", "torch", "JAX", "ratio"):
        assert word in text
    for name in ("eval.state.lstm_c", "policy.encoder.0.weight", "policy.decoder"):
        assert re.search(rf"^  {re.escape(name)} .*e-", text, re.MULTILINE)
    assert re.search(r"float32 errors of all gradients: \d\.\d\d times torch's own \(bar 2\)", text)
    bad = str(Report((row(float64=1e-3, name="logits[0]"), row(name="values")), (), ("a", "b")))
    assert "DIFFERENT, 1 failures." in bad
    assert re.search(r"^✗ logits\[0\] +1\.0e-03 1\.0e-03 1e\+00", bad, re.MULTILINE)
    assert "Look at what is done between and after them." in bad
    assert bad.endswith("layers not compared: a, b")


def test_json(reports, tmp_path):
    report = reports("Discrete")
    report.to_json(tmp_path / "new" / "report.json")
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["close"] is True
    assert content["failures"] == []
    assert content["first_difference"] is None
    assert content["bars"] == {**BARS, "ratio": 2.0}
    assert content["ratios"] == report.ratios
    rows = [
        Row(**{**r, "shape": tuple(r["shape"]), **{p: Errors(**r[p]) for p in PRECISIONS}})
        for r in content["rows"]
    ]
    assert Report(tuple(rows), (), ()) == report


def test_json_has_no_infinity(tmp_path):
    Report((row(float64=math.inf),), ("w",), ()).to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["close"] is False
    assert content["rows"][0]["float64"]["relative"] is None
    assert content["weights_differ"] == ["w"]


def test_plot(reports, tmp_path):
    reports("Discrete").plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    Report((row("layer", float64=math.inf), row("layer")), (), ()).plot(tmp_path / "errors.svg")
    assert b"<svg" in (tmp_path / "errors.svg").read_bytes()


def test_plot_says_what_it_needs(reports, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        reports("Discrete").plot(tmp_path / "errors.png")


def test_what_is_no_number_proves_nothing():
    env = stub_env(gs.Box(-1, 1, (4,)), gs.Discrete(3))
    policy = puffer_jax.Default(env, 8, rngs=nnx.Rngs(0))
    reference = reference_policy(policy)
    puffer_jax.load_state_dict(policy, reference.state_dict())
    observations = np.ones((8, 4), np.float32)
    assert compare(reference, policy, observations).failures == []
    observations[3] = np.nan
    report = compare(reference, policy, observations)
    assert "output logits: torch's array has a NaN; equal_nan=True lets ours have it, too" in (
        report.failures
    )
    assert compare(reference, policy, observations, equal_nan=True).failures == []
    policy.decoder.bias[...] = jnp.full(3, jnp.inf)
    reference.decoder.bias.data[:] = math.inf
    infinite = compare(reference, policy, np.ones((8, 4), np.float32))
    assert "output logits: nothing to compare: all of torch's are infinite" in infinite.failures
