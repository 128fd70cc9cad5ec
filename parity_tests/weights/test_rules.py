"""The registry of layers' rules: Flax's against torch's in float64, and rules of one's own."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import puffer_jax
from puffer_jax import load_state_dict, load_weights, save_weights, state_dict
from puffer_jax.nn import torch_rules
from puffer_jax.nn.torch_layout import torch_layout
from puffer_jax.parity import compare
from puffer_jax.weights import Constant, Layout, rule

pytestmark = pytest.mark.usefixtures("quick")

DOUBLE = {"param_dtype": jnp.float64, "dtype": jnp.float64}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A copy of the registry, so that no test sees another's rules."""
    monkeypatch.setattr(torch_rules, "RULES", copy := dict(torch_rules.RULES))
    monkeypatch.setattr("puffer_jax.nn.torch_layout.RULES", copy)


def same(ours, theirs):
    """Whether both are the same tensors, bit for bit and in the same order."""
    theirs = {name: tensor.detach().numpy() for name, tensor in theirs.items()}
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert ours[name].tobytes() == np.ascontiguousarray(tensor).tobytes()


def randomised(module, seed=0):
    """Parameters and statistics that are neither round nor zero; variances are positive."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) - 0.5)
        for name, tensor in module.named_buffers():
            if name.endswith("var"):
                tensor += 1
    return module


# --- Flax's layers ------------------------------------------------------------------------------


def batch_norm(size, **options):
    norm = nnx.BatchNorm(
        size, use_running_average=True, epsilon=1e-5, rngs=nnx.Rngs(0), **options, **DOUBLE
    )
    for name in ("mean", "var"):  # Flax's are float32 whatever it is told
        getattr(norm, name).set_value(jnp.ones(size, jnp.float64))
    return norm


@pytest.mark.tree
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_images(affine):
    theirs = randomised(torch.nn.BatchNorm2d(3, affine=affine)).double().eval()
    ours = batch_norm(3, use_bias=affine, use_scale=affine)
    load_state_dict(ours, theirs.state_dict())
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    y = np.moveaxis(np.asarray(ours(np.moveaxis(x, 1, -1))), -1, 1)
    np.testing.assert_allclose(y, theirs(torch.from_numpy(x)).detach(), rtol=0, atol=1e-13)

    # Back: without the count, which torch has another idea of and fills in.
    found = state_dict(ours)
    same(found, {n: t for n, t in theirs.state_dict().items() if n != "num_batches_tracked"})
    fresh = torch.nn.BatchNorm2d(3, affine=affine).double()
    fresh.load_state_dict({name: torch.from_numpy(a) for name, a in found.items()})
    assert torch.equal(fresh.running_var, theirs.running_var)


@pytest.mark.tree
def test_prelu():
    theirs = randomised(torch.nn.PReLU()).double()
    ours = nnx.PReLU(**DOUBLE)
    load_state_dict(ours, theirs.state_dict())
    same(state_dict(ours), theirs.state_dict())
    x = np.random.default_rng(0).standard_normal((4, 3))
    assert np.array_equal(ours(x), theirs(torch.from_numpy(x)).detach())
    with pytest.raises(ValueError, match=r"wrong shape: weight \(3,\) instead of \(1,\)"):
        load_state_dict(ours, torch.nn.PReLU(3).state_dict())


def gru_cells():
    theirs = randomised(torch.nn.GRUCell(3, 5)).double()
    with torch.no_grad():
        theirs.bias_hh.zero_()
    return theirs, nnx.GRUCell(3, 5, rngs=nnx.Rngs(0), **DOUBLE)


@pytest.mark.tree
def test_gru_cell(tmp_path):
    theirs, ours = gru_cells()
    load_state_dict(ours, theirs.state_dict())
    same(state_dict(ours), theirs.state_dict())
    rng = np.random.default_rng(0)
    x, h = rng.standard_normal((4, 3)), rng.standard_normal((4, 5))
    y = theirs(torch.from_numpy(x), torch.from_numpy(h)).detach()
    np.testing.assert_allclose(ours(h, x)[0], y, rtol=0, atol=1e-14)

    for suffix in (".pt", ".safetensors", ".bin"):
        save_weights(ours, path := tmp_path / f"x{suffix}")
        load_weights(back := nnx.GRUCell(3, 5, rngs=nnx.Rngs(1), **DOUBLE), path)
        # .bin is float32.
        np.testing.assert_allclose(back(h, x)[0], y, rtol=0, atol=1e-6)
    theirs.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))


def test_a_bias_that_flax_has_no_place_for_is_an_error():
    theirs, ours = gru_cells()
    before = state_dict(ours)
    with torch.no_grad():
        theirs.bias_hh[-1] = 0.1  # the one inside r * (W_hn h + b_hn)
    with pytest.raises(ValueError, match=r"bias_hh must be 0 throughout: .*puffer_jax\.GRU does"):
        load_state_dict(ours, theirs.state_dict())
    assert all(np.array_equal(state_dict(ours)[name], before[name]) for name in before)
    # The house's core has it.
    core = puffer_jax.GRU(3, 5, rngs=nnx.Rngs(0), **DOUBLE)
    load_state_dict(core, {f"{name}_l0": t for name, t in theirs.state_dict().items()})
    x, h = np.ones((1, 3)), np.full((1, 5), 0.3)
    y = theirs(torch.from_numpy(x), torch.from_numpy(h)).detach()
    np.testing.assert_allclose(
        core.step(jnp.asarray(x), {"gru_h": jnp.asarray(h)})[0], y, rtol=0, atol=1e-14
    )
    assert np.abs(ours(h, x)[0] - y.numpy()).max() > 1e-3


def test_optimizers_see_parameters_only():
    to_torch, from_torch = torch_layout(gru_cells()[1])
    tree = puffer_jax.split(gru_cells()[1])[1]
    tensors = to_torch(tree)
    assert list(tensors) == ["weight_ih", "weight_hh", "bias_ih"]
    jax.tree.map(np.testing.assert_array_equal, from_torch(tensors), tree)


class Port(nnx.Module):
    """A custom policy of all of them, and of a layer with a rule of its own."""

    def __init__(self, rngs):
        self.body = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_running_average=True, epsilon=1e-5, rngs=rngs)
        self.act = nnx.PReLU()
        self.cell = nnx.GRUCell(3, 5, rngs=rngs)
        self.head = Scaled(5, 2, rngs)
        self.value = nnx.Linear(5, 1, rngs=rngs)

    def forward(self, x):
        x = self.act(self.norm(self.body(x)))
        hidden = self.cell(jnp.ones((x.shape[0], 5), x.dtype), x)[0]
        return self.head(hidden), self.value(hidden)


class Original(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.act = torch.nn.PReLU()
        self.cell = torch.nn.GRUCell(3, 5)
        self.head = TorchScaled(5, 2)
        self.value = torch.nn.Linear(5, 1)

    def forward(self, x):
        x = self.act(self.norm(self.body(x)))
        hidden = self.cell(x, torch.ones(len(x), 5, dtype=x.dtype))
        return self.head(hidden), self.value(hidden)


class Scaled(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)))
        self.gain = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return x @ self.kernel[...] * self.gain[...]


class TorchScaled(torch.nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.weight = torch.nn.Parameter(torch.ones(outputs, inputs))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight) * self.gain


SWAPPED = Layout("kernel", lambda kernel: kernel.T, lambda weight, shape: weight.T)
GAIN = Layout("gain", lambda gain: gain.reshape(1), lambda gain, shape: gain.reshape(shape))


@pytest.mark.tree
def test_a_custom_policy_is_close_to_its_original(tmp_path):
    rule(Scaled, {"gain": GAIN, "weight": SWAPPED})
    original = randomised(Original()).eval()
    with torch.no_grad():
        original.cell.bias_hh.zero_()
    port = Port(nnx.Rngs(0))
    load_state_dict(port, original.state_dict())
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    report = compare(original, port, x)
    report.assert_close()
    assert not report.weights_differ
    layers = {row.name for row in report.of("layer")}
    assert layers == {"body", "norm", "act", "cell", "head", "value"}
    gradients = {row.name for row in report.of("gradient")}
    assert gradients == dict(original.named_parameters()).keys() - {"cell.bias_hh"}

    for suffix in (".pt", ".safetensors", ".bin"):
        save_weights(port, path := tmp_path / f"x{suffix}")
        load_weights(back := Port(nnx.Rngs(1)), path)
        for name, tensor in state_dict(port).items():
            assert np.array_equal(state_dict(back)[name], tensor), (suffix, name)
    fresh = Original().eval()
    fresh.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    for ours, theirs in zip(fresh(torch.from_numpy(x)), original(torch.from_numpy(x)), strict=True):
        assert torch.equal(ours, theirs)

    port.norm.mean[...] += 0.1
    report = compare(original, port, x)
    assert report.weights_differ == ("norm.running_mean",)
    assert any(failure.startswith("layer norm") for failure in report.failures)


# --- rules that are wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "tensors", "error", "message"),
    [
        (nnx.PReLU(), {"a": "b"}, TypeError, "derives from nnx.Module; got an object of PReLU"),
        (int, {"a": "b"}, TypeError, "got int"),
        (nnx.Module, {"a": "b"}, TypeError, "got Module"),
        (nnx.Linear, {"a": "b"}, ValueError, "there is a rule for Linear; replace=True"),
        (Scaled, {}, ValueError, "the rule of Scaled names no tensors"),
        (Scaled, {"a": "gain", "b": "gain"}, ValueError, "uses twice: gain"),
        (
            Scaled,
            {"a": ("kernel",), "b": 1, "c": "kernel"},
            TypeError,
            r"a Constant or None; got 'a': \('kernel',\), 'b': 1$",
        ),
    ],
)
def test_rules_that_say_nothing(layer, tensors, error, message):
    before = dict(torch_rules.RULES)
    with pytest.raises(error, match=message):
        inspect.unwrap(rule)(layer, tensors)  # past the tests' own check of types
    assert before == torch_rules.RULES


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": "kernle", "gain": "gain"}, "weight: there is no attribute kernle"),
        ({"weight": "kernel"}, "leaves out gain"),
        ({"weight": "__call__", "gain": "gain"}, "__call__ is no nnx.Variable but method"),
        (
            {"weight": Layout("kernel", SWAPPED.to_torch, lambda w, shape: w), "gain": "gain"},
            r"from_torch is not the inverse of to_torch: of kernel of shape \(3, 3\) it makes "
            r"\(3, 3\), in another order",
        ),
        (
            {"weight": Layout("kernel", lambda k: 2 * k, lambda w, shape: w / 2), "gain": "gain"},
            "to_torch must only rearrange the numbers of kernel",
        ),
        (
            {"weight": Layout("kernel", lambda k: k.T, lambda w: w.T), "gain": "gain"},
            r"its functions fail on \(3, 3\): TypeError",
        ),
    ],
)
def test_rules_that_do_not_fit(tensors, message):
    rule(Scaled, tensors)
    policy = nnx.Sequential(Scaled(3, 3, nnx.Rngs(0)))
    with pytest.raises(TypeError, match=rf"^0: the torch rule of Scaled .*{message}"):
        state_dict(policy)


def test_a_rule_may_be_replaced_and_holds_for_subclasses():
    class Wider(Scaled):
        pass

    layer = Wider(2, 3, nnx.Rngs(0))
    rule(Scaled, {"gain": "gain", "weight": "kernel"})
    assert state_dict(layer)["weight"].shape == (2, 3)
    one = Constant(lambda layer: np.ones((1, 2)), "it scales by nothing else")
    rule(Scaled, {"weight": SWAPPED, "gain": GAIN, "shift": one}, replace=True)
    assert {name: t.shape for name, t in state_dict(layer).items()} == {
        **{"weight": (3, 2), "gain": (1,), "shift": (1, 2)},
    }
    with pytest.raises(ValueError, match="shift must be 1 throughout: it scales by nothing else"):
        load_state_dict(layer, state_dict(layer) | {"shift": np.zeros((1, 2))})
