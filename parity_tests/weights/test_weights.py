"""Weights in and out: against the reference, in every format, and from broken or hostile files."""

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import pickle
import resource
import struct
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pufferlib.models
import pufferlib.pufferl
import pytest
import safetensors.torch
import scipy.special
import torch
from flax import nnx
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bars import BARS, relative_error
from support.bars import stub_env as env
from support.reference import skeleton

import puffer_jax
from puffer_jax import load_state_dict, load_weights, policy_from_checkpoint, save_weights
from puffer_jax.base.files import write_atomically
from puffer_jax.nn.torch_layout import torch_parameters

pytestmark = pytest.mark.usefixtures("quick")

SUFFIXES = [".pt", ".safetensors", ".bin"]


# --- policies, ours and the reference's ---------------------------------------------------------


VECTOR = Box(-1, 1, (5,))
ENVS = {
    "discrete": env(VECTOR, Discrete(5)),
    "multidiscrete": env(VECTOR, MultiDiscrete([2, 1, 3])),
    "continuous": env(VECTOR, Box(-1, 1, (3,))),
    "lstm": env(VECTOR, Discrete(3)),
    "convolutional": env(Box(0, 255, (2, 37, 45), np.uint8), Discrete(4)),
    "procgen": env(Box(0, 255, (7, 9, 3), np.uint8), Discrete(5)),
}
NAMES = list(ENVS)
HIDDEN = 8


def build(name, package, **more):
    """The policy `name` of either package; `more` is for ours only."""
    spaces = ENVS[name]
    if name == "convolutional":
        sizes = {"framestack": 2, "flat_size": 128, "hidden_size": 6, "output_size": 6}
        return package.Convolutional(spaces, **sizes, **more)
    if name == "procgen":
        return package.ProcgenResnet(spaces, 2, 6, **more)
    policy = package.Default(spaces, HIDDEN, **more)
    if name == "lstm":
        return package.LSTMWrapper(spaces, policy, HIDDEN, HIDDEN, **more)
    return policy


def fill(policy, seed):
    """Give every parameter new values, none of them zero or round."""
    rng = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(policy, nnx.Param)):
        variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), variable.dtype))
    return policy


@functools.cache
def _original(name):
    # Initialised: a skeleton's graphdef lists attributes in another order.
    return puffer_jax.split(build(name, puffer_jax, rngs=nnx.Rngs(0)))


def ours(name, seed=0):
    """A fresh policy; the same seed gives the same weights."""
    return fill(puffer_jax.merge(*_original(name)), seed)


def theirs(name):
    torch.manual_seed(3)
    policy = build(name, pufferlib.models)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return policy


def bits(policy):
    params = flax.traverse_util.flatten_dict(puffer_jax.split(policy)[1])
    return {path: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for path, x in params.items()}


def tensor_bits(tensors):
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in arrays.items()}


@contextlib.contextmanager
def refused(policy, *parts, error=ValueError):
    """A failure that names all `parts` and leaves `policy` bit for bit as it was."""
    before = bits(policy)
    with pytest.raises(error) as caught:
        yield caught
    assert caught.type is error
    for part in parts:
        assert str(part) in str(caught.value)
    assert bits(policy) == before


def observations(name, batch=3):
    shape = ENVS[name].single_observation_space.shape
    numbers = np.random.default_rng(1).integers(0, 200, (batch, *shape))
    return jnp.asarray(numbers, jnp.float32) / 100


def leaves(policy, name):
    return [np.asarray(x) for x in jax.tree.leaves(policy.forward_eval(observations(name)))]


# --- names, order, layout -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_the_references(name):
    reference, policy = theirs(name), ours(name)
    expected = reference.state_dict()
    assert tensor_bits(puffer_jax.state_dict(policy)) != tensor_bits(expected)
    assert load_state_dict(policy, expected) == ([], [])
    found = puffer_jax.state_dict(policy)
    # Names, order, dtypes, shapes and values.
    assert list(tensor_bits(found).items()) == list(tensor_bits(expected).items())
    assert all(array.flags.c_contiguous for array in found.values())
    parameters = [parameter.name for parameter in torch_parameters(policy)]
    assert parameters == [name for name, _ in reference.named_parameters()]
    assert ("cell.weight_ih" in found) == (name == "lstm")


def test_state_dict_is_a_copy_that_shares_tied_keys():
    policy = ours("lstm")
    before = bits(policy)
    found = puffer_jax.state_dict(policy)
    assert found["cell.weight_hh"] is found["lstm.weight_hh_l0"]
    for array in found.values():
        array += 1
    assert bits(policy) == before
    # And the policy keeps a copy of what it loads: torch goes on training in place.
    reference = theirs("lstm")
    load_state_dict(policy, reference.state_dict())
    before = bits(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 1
    assert bits(policy) == before


@pytest.mark.tree
@pytest.mark.parametrize("name", ["continuous", "lstm", "procgen"])
@pytest.mark.parametrize("copy", [nnx.clone, lambda p: nnx.merge(*nnx.split(p))])
def test_order_survives_flax_sorting_attributes(name, copy):
    expected = [name for name, _ in theirs(name).named_parameters()]
    assert [parameter.name for parameter in torch_parameters(copy(ours(name)))] == expected


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_parameters_of_other_widths(dtype, tmp_path):
    build_ours = lambda: build("lstm", puffer_jax, rngs=nnx.Rngs(0), param_dtype=dtype)  # noqa: E731
    policy = fill(skeleton(build_ours), 0)
    assert puffer_jax.state_dict(policy)["lstm.bias_hh_l0"].dtype == dtype
    for suffix in SUFFIXES:
        save_weights(policy, tmp_path / f"x{suffix}")
        loaded = fill(puffer_jax.merge(*puffer_jax.split(policy)), 1)
        load_weights(loaded, tmp_path / f"x{suffix}")
        if suffix == ".bin" and dtype == jnp.float64:  # .bin is float32
            for ours, theirs in zip(
                puffer_jax.state_dict(loaded).values(),
                puffer_jax.state_dict(policy).values(),
                strict=True,
            ):
                np.testing.assert_array_equal(ours, theirs.astype(np.float32))
        else:
            assert bits(loaded) == bits(policy)
    stored = torch.load(tmp_path / "x.pt", weights_only=True)["policy.value.weight"].dtype
    assert str(stored) == f"torch.{np.dtype(dtype).name}"


# --- round trips --------------------------------------------------------------------------------


def reference_checkpoint(policy, folder):
    """What the reference's own `save_checkpoint` writes."""
    optimizer = torch.optim.Adam(policy.parameters())
    trainer = SimpleNamespace(
        logger=SimpleNamespace(run_id="run"),
        config={"data_dir": str(folder)},
        epoch=7,
        global_step=0,
        uncompiled_policy=policy,
        optimizer=optimizer,
    )
    return Path(pufferlib.pufferl.PuffeRL.save_checkpoint(trainer))


@pytest.mark.tree
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_the_reference(name, tmp_path):
    policy, reference = ours(name), theirs(name)
    save_weights(policy, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(loaded) == list(reference.state_dict())
    assert str(reference.load_state_dict(loaded, strict=True)) == "<All keys matched successfully>"
    back = ours(name, 1)
    assert bits(back) != bits(policy)
    load_weights(back, reference_checkpoint(reference, tmp_path))
    assert bits(back) == bits(policy)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_a_file(name, suffix, tmp_path):
    policy, back = ours(name), ours(name, 1)
    path = tmp_path / f"new/folder/x{suffix}"
    save_weights(policy, str(path))
    assert load_weights(back, str(path)) == ([], [])
    assert bits(back) == bits(policy)
    extra = [path.with_name("x.bin.json")] if suffix == ".bin" else []
    assert sorted(path.parent.iterdir()) == sorted([path, *extra])


def test_pt_stores_tied_tensors_once(tmp_path):
    policy, reference = ours("lstm"), theirs("lstm")
    path = tmp_path / "x.pt"
    save_weights(policy, path)
    with zipfile.ZipFile(path) as archive:
        stored = [i.file_size for i in archive.infolist() if "/data/" in i.filename]
    assert len(stored) == len(list(reference.parameters()))
    assert sum(stored) == sum(4 * p.numel() for p in reference.parameters())
    tensors = torch.load(path, weights_only=True)
    reference.load_state_dict(tensors, strict=True, assign=True)
    # assign=True makes two Parameters of a tied pair; they still are one memory.
    assert reference.cell.bias_hh.data_ptr() == reference.lstm.bias_hh_l0.data_ptr()
    assert tensor_bits(reference.state_dict()) == tensor_bits(puffer_jax.state_dict(policy))


def test_safetensors_leaves_tied_keys_out(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(ours("lstm"), path)
    stored = safetensors.torch.load_file(path)
    full = puffer_jax.state_dict(ours("lstm"))
    assert set(stored) == {name for name in full if not name.startswith("cell.")}
    assert tensor_bits(stored) == tensor_bits({name: full[name] for name in stored})


# --- the C reader of .bin -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bin_is_what_the_reference_exports(name, tmp_path, monkeypatch, capsys):
    policy, reference = ours(name), theirs(name)
    load_state_dict(policy, reference.state_dict())
    save_weights(policy, tmp_path / "x.bin")
    monkeypatch.chdir(tmp_path)
    pufferlib.pufferl.export({"env_name": "theirs"}, vecenv=object(), policy=reference)
    assert "Saved" in capsys.readouterr().out
    assert (tmp_path / "x.bin").read_bytes() == (tmp_path / "theirs_weights.bin").read_bytes()
    fresh = ours(name, 1)  # theirs comes without a sidecar
    with pytest.warns(UserWarning, match="no sidecar"):
        load_weights(fresh, tmp_path / "theirs_weights.bin")
    assert bits(fresh) == bits(policy)


class CReader:
    """`extensions/puffernet.h` in NumPy: takes weights off the file layer by layer.

    It computes in float64, which is the same on every machine.
    """

    def __init__(self, path):
        self.weights = np.fromfile(path, "<f4").astype(np.float64)

    def take(self, *shape):
        values, self.weights = np.split(self.weights, [math.prod(shape)])
        return values.reshape(shape)

    def linear(self, inputs, outputs):
        weight, bias = self.take(outputs, inputs), self.take(outputs)
        return lambda x: x @ weight.T + bias

    def lstm(self, inputs, hidden):
        from_input, from_state = self.take(4 * hidden, inputs), self.take(4 * hidden, hidden)
        bias_input, bias_state = self.take(4 * hidden), self.take(4 * hidden)

        def sigmoid(x):
            return 1 / (1 + np.exp(-x))

        def step(x, h, c):
            buffer = x @ from_input.T + bias_input + h @ from_state.T + bias_state
            i, f, g, o = np.split(buffer, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            return sigmoid(o) * np.tanh(c), c

        return step


def c_relu(x):
    return np.maximum(x, 0)


C_GELU = 0.6628526501011142  # its tanh form has this factor where the textbook has sqrt(2 / pi)


def c_gelu(x):
    return 0.5 * x * (1 + np.tanh(C_GELU * (x + 0.044715 * x * x * x)))


def exact_gelu(x):
    return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


def c_default(path, x, activation):
    reader = CReader(path)
    encoder = reader.linear(5, HIDDEN)
    actor, value = reader.linear(HIDDEN, 5), reader.linear(HIDDEN, 1)
    assert reader.weights.size == 0
    hidden = activation(encoder(x))
    return actor(hidden), value(hidden)


def c_linear_lstm(path, x, activation):
    """Two steps, the second from the state of the first."""
    reader = CReader(path)
    encoder = reader.linear(5, HIDDEN)
    actor, value = reader.linear(HIDDEN, 3), reader.linear(HIDDEN, 1)
    lstm = reader.lstm(HIDDEN, HIDDEN)
    assert reader.weights.size == 0
    h = c = np.zeros((len(x), HIDDEN))
    for step in (x, -x):
        h, c = lstm(activation(encoder(step)), h, c)
    return actor(h), value(h)


def as_jax(activation):
    form = {c_relu: jax.nn.relu, exact_gelu: lambda x: jax.nn.gelu(x, approximate=False)}
    return form.get(activation, lambda x: 0.5 * x * (1 + jnp.tanh(C_GELU * (x + 0.044715 * x**3))))


@pytest.mark.parametrize("activation", [exact_gelu, c_relu, c_gelu])
@pytest.mark.parametrize("name", ["discrete", "lstm"])
def test_c_reader_computes_our_logits(name, activation, tmp_path):
    # The reader's own activations differ from the policy's (next test), so ours are exchanged;
    # what is compared is every weight in its place.
    policy, path, x = ours(name), tmp_path / "x.bin", observations(name)
    save_weights(policy, path)
    encoder = (policy.policy if name == "lstm" else policy).encoder
    encoder.layers[1] = as_jax(activation)
    if name == "lstm":
        exact = c_linear_lstm(path, np.float64(x), activation)
        _, _, state = policy.forward_eval(x)
        logits, values, _ = policy.forward_eval(-x, state)
    else:
        exact = c_default(path, np.float64(x), activation)
        logits, values = policy.forward_eval(x)
    for found, expected in zip((logits, values), exact, strict=True):
        assert (found.dtype, expected.dtype) == (np.float32, np.float64)
        assert relative_error(found, expected) < BARS["forward"]["float32"]


def test_c_reader_has_other_activations(tmp_path):
    header = Path(pufferlib.__file__).parent / "extensions/puffernet.h"
    source = header.read_text()
    assert f"tanhf({C_GELU} *" in source and "0.7978845" not in source
    default = source[source.index("void forward_default") : source.index("typedef struct LinearL")]
    assert "relu(net->relu1" in default and "gelu" not in default
    x = np.linspace(-8, 8, 4001)
    difference = np.abs(c_gelu(x) - exact_gelu(x)).max()
    assert 0.05 < difference < 0.052
    # So C inference of an exported policy is close to it only; it is not the weights.
    policy, path = ours("lstm"), tmp_path / "x.bin"
    save_weights(policy, path)
    x = np.float64(observations("lstm"))
    apart = np.abs(c_linear_lstm(path, x, c_gelu)[0] - c_linear_lstm(path, x, exact_gelu)[0]).max()
    assert apart > 1e-4


# --- what load_state_dict accepts and refuses ---------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, torch.from_numpy])
def test_arrays_of_every_library(kind):
    policy, source = ours("lstm", 1), ours("lstm")
    tensors = {name: kind(array) for name, array in puffer_jax.state_dict(source).items()}
    load_state_dict(policy, tensors)
    assert bits(policy) == bits(source)
    parameters = {
        name: torch.nn.Parameter(torch.tensor(np.asarray(x))) for name, x in tensors.items()
    }
    load_state_dict(fill(policy, 1), parameters)  # they require gradients
    assert bits(policy) == bits(source)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float64"])
@pytest.mark.parametrize("library", ["torch", "numpy", ".pt", ".safetensors"])
def test_other_widths_are_converted(dtype, library, tmp_path):
    policy = ours("discrete")
    rng = np.random.default_rng(0)
    tensors = {
        name: torch.from_numpy(rng.standard_normal(array.shape)).to(getattr(torch, dtype))
        for name, array in puffer_jax.state_dict(policy).items()
    }
    expected = {name: tensor.to(torch.float32).numpy() for name, tensor in tensors.items()}
    if dtype == "float64":
        assert any((t.numpy() != expected[name]).any() for name, t in tensors.items())
    elif library == "numpy":
        tensors = {name: jnp.asarray(a).astype(dtype) for name, a in expected.items()}
        tensors = {name: np.asarray(array) for name, array in tensors.items()}
        assert str(tensors["value.bias"].dtype) == dtype
    if library == ".pt":
        torch.save(tensors, tmp_path / "x.pt")
        load_weights(policy, tmp_path / "x.pt")
    elif library == ".safetensors":
        path = tmp_path / "x.safetensors"
        safetensors.torch.save_file(tensors, path)
        if dtype.startswith("float8"):
            with refused(policy, path, "float8_e4m3fn"):
                load_weights(policy, path)
            return
        load_weights(policy, path)
    else:
        load_state_dict(policy, tensors)
    assert tensor_bits(puffer_jax.state_dict(policy)) == tensor_bits(expected)


WRONG = {
    "int64": torch.ones(5, dtype=torch.int64),
    "int16": torch.ones(5, dtype=torch.int16),
    "uint8": np.ones(5, np.uint8),
    "bool": jnp.ones(5, bool),
    "complex64": np.ones(5, np.complex64),
    "complex128": torch.ones(5, dtype=torch.complex128),
    "object": np.array([1.0] * 5, object),
    "sparse": torch.ones(5).to_sparse(),
    "meta": torch.ones(5, device="meta"),
    "list of strings": ["x"] * 5,
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_numbers_are_refused(kind):
    policy = ours("discrete")
    tensors = puffer_jax.state_dict(ours("discrete", 1)) | {"decoder.bias": WRONG[kind]}
    dtype = getattr(WRONG[kind], "dtype", "list")
    with refused(policy, "no floating-point numbers", f"decoder.bias ({dtype})"):
        load_state_dict(policy, tensors)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_integer_weights_in_a_file_are_refused(suffix, tmp_path):
    policy, path = ours("discrete"), tmp_path / f"x{suffix}"
    tensors = {k: torch.ones(v.shape).int() for k, v in puffer_jax.state_dict(policy).items()}
    torch.save(tensors, path) if suffix == ".pt" else safetensors.torch.save_file(tensors, path)
    with refused(policy, path, "value.weight (", "decoder.bias (", "int32"):
        load_weights(policy, path)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrappers_prefixes_are_stripped(prefix, tmp_path):
    source = puffer_jax.state_dict(ours("lstm"))
    policy = ours("lstm", 1)
    load_state_dict(policy, {prefix + name: array for name, array in source.items()})
    assert bits(policy) == bits(ours("lstm"))
    renamed = {prefix + name: torch.from_numpy(array) for name, array in source.items()}
    torch.save(renamed, tmp_path / "x.pt")
    found = policy_from_checkpoint(tmp_path / "x.pt")
    assert bits(found) == bits(ours("lstm"))


def test_inner_compiled_module():
    policy = ours("lstm", 1)
    source = puffer_jax.state_dict(ours("lstm"))
    inner = {name.replace("policy.", "policy._orig_mod."): x for name, x in source.items()}
    assert "policy._orig_mod.encoder.0.weight" in inner
    load_state_dict(policy, inner)
    assert bits(policy) == bits(ours("lstm"))


def test_real_wrappers_of_torch():
    reference = theirs("discrete")
    compiled = torch.compile(reference)
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    policy = ours("discrete")
    load_state_dict(policy, torch.nn.DataParallel(compiled).state_dict())
    assert tensor_bits(puffer_jax.state_dict(policy)) == tensor_bits(reference.state_dict())


class HasModule(nnx.Module):
    """A custom policy with an attribute called like DDP's prefix."""

    def __init__(self, seed=0):
        self.module = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
        self.value = nnx.Linear(3, 1, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_attribute_called_module(prefix):
    source, policy = HasModule(), HasModule(1)
    tensors = puffer_jax.state_dict(source)
    assert list(tensors) == ["module.weight", "module.bias", "value.weight", "value.bias"]
    load_state_dict(policy, {prefix + name: array for name, array in tensors.items()})
    assert bits(policy) == bits(source)


def test_two_keys_for_one_tensor():
    policy = ours("discrete")
    tensors = puffer_jax.state_dict(ours("discrete", 1))
    with refused(policy, "'value.bias'"):
        load_state_dict(policy, tensors | {"module.value.bias": tensors["value.bias"]})


def test_of_tied_keys_one_is_enough():
    source = puffer_jax.state_dict(ours("lstm"))
    for unused in ("cell.", "lstm."):
        policy = ours("lstm", 1)
        tensors = {name: x for name, x in source.items() if not name.startswith(unused)}
        assert load_state_dict(policy, tensors) == ([], [])
        assert bits(policy) == bits(ours("lstm"))
        assert bits(policy_from_checkpoint(tensors)) == bits(ours("lstm"))
    mixed = dict(source)
    del mixed["cell.weight_ih"], mixed["lstm.bias_hh_l0"]
    load_state_dict(policy := ours("lstm", 1), mixed)
    assert bits(policy) == bits(ours("lstm"))

    policy = ours("lstm", 1)
    differing = source | {"cell.bias_ih": source["cell.bias_ih"] + 1}
    for strict in (True, False):
        with refused(policy, "cell.bias_ih and lstm.bias_ih_l0 are one tensor"):
            load_state_dict(policy, differing, strict)
    with refused(policy, "cell.bias_ih (3,) instead of (32,)"):
        load_state_dict(policy, source | {"cell.bias_ih": np.zeros(3)})
    neither = {
        name: x for name, x in source.items() if not name.endswith(("bias_ih", "bias_ih_l0"))
    }
    with refused(policy, "missing: lstm.bias_ih_l0 (32,)"):
        load_state_dict(policy, neither)


def test_everything_wrong_is_in_one_message():
    policy = ours("lstm")
    tensors = puffer_jax.state_dict(ours("lstm", 1))
    del tensors["policy.value.weight"], tensors["policy.encoder.0.bias"]
    tensors |= {"extra": np.zeros((2, 7)), "policy.other": torch.ones(3)}
    tensors["policy.decoder.bias"] = np.zeros(9)
    tensors["lstm.weight_hh_l0"] = tensors["cell.weight_hh"] = np.zeros((4, 8))
    tensors["policy.value.bias"] = np.array([np.nan])
    tensors["policy.encoder.0.weight"] = np.zeros((8, 5), np.int32)
    with refused(
        policy,
        "missing: policy.encoder.0.bias (8,), policy.value.weight (1, 8)",
        "unexpected: extra (2, 7), policy.other (3,)",
        "policy.decoder.bias (9,) instead of (3,)",
        "lstm.weight_hh_l0 (4, 8) instead of (32, 8)",
        "cell.weight_hh (4, 8) instead of (32, 8)",
        "no floating-point numbers: policy.encoder.0.weight (int32)",
        "NaN or infinity (allow_non_finite=True lets them in): policy.value.bias",
    ):
        load_state_dict(policy, tensors)


def test_not_strict():
    policy, source = ours("lstm"), puffer_jax.state_dict(ours("lstm", 1))
    # An integer among the unexpected keys, such as BatchNorm's counter, is no obstacle.
    tensors = {name: x for name, x in source.items() if "decoder" not in name}
    tensors |= {"num_batches_tracked": torch.tensor(3), "extra": np.zeros(2)}
    before = puffer_jax.state_dict(policy)
    result = load_state_dict(policy, tensors, strict=False)
    assert result.missing_keys == ["policy.decoder.weight", "policy.decoder.bias"]
    assert result.unexpected_keys == ["num_batches_tracked", "extra"]
    expected = source | {name: before[name] for name in result.missing_keys}
    assert tensor_bits(puffer_jax.state_dict(policy)) == tensor_bits(expected)
    with refused(policy, "policy.value.bias (2,) instead of (1,)"):
        load_state_dict(policy, tensors | {"policy.value.bias": np.zeros(2)}, strict=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values(value, tmp_path):
    policy, broken = ours("continuous"), ours("continuous", 1)
    broken.decoder_logstd.set_value(broken.decoder_logstd[...].at[0, 1].set(value))
    with refused(policy, "decoder_logstd", "allow_non_finite"):
        load_state_dict(policy, puffer_jax.state_dict(broken))
    for suffix in SUFFIXES:
        path = tmp_path / f"x{suffix}"
        save_weights(broken, path)
        with refused(policy, path, "decoder_logstd", "allow_non_finite"):
            load_weights(policy, path)
        with pytest.raises(ValueError, match=r"NaN or infinity.*decoder_logstd"):
            policy_from_checkpoint(path)
        assert bits(policy_from_checkpoint(path, allow_non_finite=True)) == bits(broken)
        load_weights(fill(policy, 0), path, allow_non_finite=True)
        assert bits(policy) == bits(broken)


def test_overflow_is_refused():
    policy, tensors = ours("discrete"), puffer_jax.state_dict(ours("discrete", 1))
    tensors["value.bias"] = np.array([1e39])
    with refused(policy, "NaN or infinity", "value.bias"):
        load_state_dict(policy, tensors)
    load_state_dict(policy, tensors, allow_non_finite=True)
    assert puffer_jax.state_dict(policy)["value.bias"] == np.inf


# --- rules per layer type -----------------------------------------------------------------------


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def attend(query, key, value, **options):
    """Flax's own function computes in float32."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


DOUBLE = {"param_dtype": jnp.float64, "dtype": jnp.float64}
ATTENTION = {"num_heads": 2, "in_features": 6, "decode": False, "attention_fn": attend}
LAYERS = {
    # name: ours, theirs, shape of the input (None: indices)
    "linear": (
        lambda r: nnx.Linear(3, 4, rngs=r, **DOUBLE),
        lambda: torch.nn.Linear(3, 4),
        (2, 3),
    ),
    "linear without bias": (
        lambda r: nnx.Linear(3, 4, use_bias=False, rngs=r, **DOUBLE),
        lambda: torch.nn.Linear(3, 4, bias=False),
        (2, 3),
    ),
    "conv1d": (
        lambda r: nnx.Conv(3, 4, (3,), padding="VALID", rngs=r, **DOUBLE),
        lambda: torch.nn.Conv1d(3, 4, 3),
        (2, 3, 7),
    ),
    "conv2d": (
        lambda r: nnx.Conv(3, 4, (3, 2), (2, 1), padding="VALID", rngs=r, **DOUBLE),
        lambda: torch.nn.Conv2d(3, 4, (3, 2), (2, 1)),
        (2, 3, 7, 6),
    ),
    "conv2d of groups": (
        lambda r: nnx.Conv(4, 6, (3, 2), padding="VALID", feature_group_count=2, rngs=r, **DOUBLE),
        lambda: torch.nn.Conv2d(4, 6, (3, 2), groups=2),
        (2, 4, 5, 6),
    ),
    "conv3d": (
        lambda r: nnx.Conv(2, 3, (3, 2, 1), padding="VALID", use_bias=False, rngs=r, **DOUBLE),
        lambda: torch.nn.Conv3d(2, 3, (3, 2, 1), bias=False),
        (2, 2, 5, 4, 3),
    ),
    "embedding": (
        lambda r: nnx.Embed(5, 3, rngs=r, **DOUBLE),
        lambda: torch.nn.Embedding(5, 3),
        None,
    ),
    "layer norm": (
        lambda r: nnx.LayerNorm(6, epsilon=1e-5, rngs=r, **DOUBLE),
        lambda: torch.nn.LayerNorm(6),
        (4, 6),
    ),
    "layer norm without bias": (
        lambda r: nnx.LayerNorm(6, epsilon=1e-5, use_bias=False, rngs=r, **DOUBLE),
        lambda: torch.nn.LayerNorm(6, bias=False),
        (4, 6),
    ),
    "group norm": (
        lambda r: nnx.GroupNorm(6, 3, epsilon=1e-5, rngs=r, **DOUBLE),
        lambda: torch.nn.GroupNorm(3, 6),
        (4, 6, 5),
    ),
    "rms norm": (
        lambda r: nnx.RMSNorm(6, epsilon=1e-5, rngs=r, **DOUBLE),
        lambda: torch.nn.RMSNorm(6, eps=1e-5),
        (4, 6),
    ),
    "attention": (
        lambda r: nnx.MultiHeadAttention(**ATTENTION, rngs=r, **DOUBLE),
        lambda: torch.nn.MultiheadAttention(6, 2, batch_first=True),
        (3, 4, 6),
    ),
    "attention without bias": (
        lambda r: nnx.MultiHeadAttention(**ATTENTION, use_bias=False, rngs=r, **DOUBLE),
        lambda: torch.nn.MultiheadAttention(6, 2, bias=False, batch_first=True),
        (3, 4, 6),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_rules(kind):
    make_ours, make_theirs, shape = LAYERS[kind]
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    layer, reference = make_ours(nnx.Rngs(0)), make_theirs().double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += torch.randn(parameter.shape)
    expected = reference.state_dict()
    load_state_dict(layer, expected)
    assert list(tensor_bits(puffer_jax.state_dict(layer)).items()) == list(
        tensor_bits(expected).items()
    )
    x = rng.integers(0, 5, (2, 3)) if shape is None else rng.standard_normal(shape)
    if "attention" in kind:
        y, z = layer(x), reference(*3 * [torch.from_numpy(x)])[0]
    elif "conv" in kind or "group" in kind:
        y = np.moveaxis(layer(channels_last(x)), -1, 1)
        z = reference(torch.from_numpy(x))
    else:
        y, z = layer(x), reference(torch.from_numpy(x))
    assert np.asarray(y).dtype == np.float64
    np.testing.assert_allclose(y, z.detach().numpy(), rtol=0, atol=1e-13 * np.abs(y).max())


class Nested(nnx.Module):
    """Every container, own names, a bare and a scalar parameter, a layer under two names."""

    hidden_size, is_continuous = 6, False
    torch_names: ClassVar = {"gain": "scale", "blocks": "layers"}
    torch_aliases: ClassVar = {"copy.weight": "body.0.weight"}

    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(6, 6, rngs=rngs, **DOUBLE) for _ in range(2)])
        self.body = nnx.Sequential(
            nnx.Linear(5, 6, use_bias=False, rngs=rngs, **DOUBLE),
            jax.nn.relu,
            nnx.Sequential(jnp.tanh, nnx.Linear(6, 6, rngs=rngs, **DOUBLE)),
        )
        self.heads = nnx.Dict(
            value=nnx.Linear(6, 1, rngs=rngs, **DOUBLE), actor=nnx.Linear(6, 3, rngs=rngs, **DOUBLE)
        )
        self.gain = nnx.Param(jnp.ones((), jnp.float64))
        self.offset = nnx.Param(jnp.ones((1, 6), jnp.float64))

    def encode_observations(self, observations, state=None):
        x = self.body(jnp.asarray(observations, jnp.float64)) * self.gain[...] + self.offset[...]
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return x

    def decode_actions(self, hidden):
        return self.heads["actor"](hidden), self.heads["value"](hidden)


class TorchNested(torch.nn.Module):
    hidden_size, is_continuous = 6, False

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(2)])
        self.body = torch.nn.Sequential(
            torch.nn.Linear(5, 6, bias=False),
            torch.nn.ReLU(),
            torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(6, 6)),
        )
        self.heads = torch.nn.ModuleDict(
            {"value": torch.nn.Linear(6, 1), "actor": torch.nn.Linear(6, 3)}
        )
        self.offset = torch.nn.Parameter(torch.ones(1, 6))
        self.copy = torch.nn.Linear(5, 6, bias=False)
        self.copy.weight = self.body[0].weight

    def encode_observations(self, observations, state=None):
        x = self.body(observations) * self.scale + self.offset
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def decode_actions(self, hidden):
        return self.heads["actor"](hidden), self.heads["value"](hidden)


@pytest.mark.tree
@pytest.mark.parametrize("recurrent", [False, True])
def test_custom_policy(recurrent, tmp_path):
    torch.manual_seed(0)
    reference, policy = TorchNested(), Nested(nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((4, 5))
    if recurrent:
        spaces = env(VECTOR, Discrete(3))
        reference = pufferlib.models.LSTMWrapper(spaces, reference, 6, 6)
        policy = puffer_jax.LSTMWrapper(spaces, policy, 6, 6, rngs=nnx.Rngs(0), **DOUBLE)
    reference = reference.double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    load_state_dict(policy, reference.state_dict())
    found = puffer_jax.state_dict(policy)
    assert tensor_bits(found) == tensor_bits(reference.state_dict())
    assert [p.name for p in torch_parameters(policy)] == [
        n for n, _ in reference.named_parameters()
    ]
    assert found["policy.scale" if recurrent else "scale"].shape == ()

    if recurrent:
        state = {"lstm_h": torch.ones(4, 6).double(), "lstm_c": -torch.ones(4, 6).double()}
        ours = policy.forward_eval(x, {name: jnp.asarray(s) for name, s in state.items()})[:2]
        expected = reference.forward_eval(torch.from_numpy(x), state)
    else:
        ours = policy.decode_actions(policy.encode_observations(x))
        expected = reference.decode_actions(reference.encode_observations(torch.from_numpy(x)))
    for y, z in zip(ours, expected, strict=True):
        np.testing.assert_allclose(y, z.detach().numpy(), rtol=0, atol=1e-13)

    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        save_weights(policy, path)
        back = fill(puffer_jax.merge(*puffer_jax.split(policy)), 1)
        load_weights(back, path)
        assert bits(back) == bits(policy)
    reference.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True), strict=True)
    with pytest.raises(ValueError, match=r"x\.safetensors: .*custom policy.*Nested.*load_weights"):
        policy_from_checkpoint(tmp_path / "x.safetensors")


class Shared(nnx.Module):
    def __init__(self, seed=0):
        self.first = nnx.Linear(2, 2, rngs=nnx.Rngs(seed))
        self.second = self.first


@pytest.mark.tree
def test_a_layer_under_two_names_is_tied_as_in_torch(tmp_path):
    reference = torch.nn.Module()
    reference.first = reference.second = torch.nn.Linear(2, 2)
    policy = Shared()
    load_state_dict(policy, reference.state_dict())
    found = puffer_jax.state_dict(policy)
    assert tensor_bits(found) == tensor_bits(reference.state_dict())
    save_weights(policy, tmp_path / "x.bin")  # named_parameters() has it once
    assert (tmp_path / "x.bin").stat().st_size == sum(4 * p.numel() for p in reference.parameters())
    load_weights(back := Shared(1), tmp_path / "x.bin")
    assert tensor_bits(puffer_jax.state_dict(back)) == tensor_bits(found)
    with pytest.raises(ValueError, match=r"second.bias and first.bias are one tensor"):
        load_state_dict(policy, found | {"second.bias": np.ones(2)})
    assert tensor_bits(puffer_jax.state_dict(policy)) == tensor_bits(found)


class Holder(nnx.Module):
    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


RNGS = nnx.Rngs(0)
UNKNOWN = {
    "ConvTranspose": lambda: nnx.ConvTranspose(2, 2, (3,), rngs=RNGS),
    "MultiHeadAttention": lambda: nnx.MultiHeadAttention(**ATTENTION, normalize_qk=True, rngs=RNGS),
    "LSTMCell": lambda: nnx.LSTMCell(2, 2, rngs=RNGS),
    "LinearGeneral": lambda: nnx.LinearGeneral(2, (2, 2), rngs=RNGS),
    "BatchStat": lambda: nnx.BatchStat(jnp.ones(2)),
    "odd.buffer": lambda: Holder(buffer=jnp.ones(2)),
    "odd.0.kernel": lambda: nnx.data((nnx.Linear(2, 2, rngs=RNGS),)),
    "odd.deep.1": lambda: Holder(deep=nnx.data((0, nnx.Param(jnp.ones(2))))),
}


@pytest.mark.parametrize("named", UNKNOWN)
def test_a_layer_without_rule_is_refused(named, tmp_path):
    policy = Holder(good=nnx.Linear(2, 2, rngs=RNGS), odd=UNKNOWN[named]())
    for action in (
        lambda: puffer_jax.state_dict(policy),
        lambda: load_state_dict(policy, {}),
        lambda: load_state_dict(policy, {}, strict=False),
        *(lambda s=suffix: save_weights(policy, tmp_path / f"x{s}") for suffix in SUFFIXES),
    ):
        with pytest.raises(TypeError, match=named) as caught:
            action()
        assert "odd" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- a policy from its checkpoint ---------------------------------------------------------------


def same_policy(found, name):
    policy = ours(name)
    assert type(found) is type(policy)
    assert bits(found) == bits(policy)
    for x, y in zip(leaves(found, name), leaves(policy, name), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("with_env", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("name", NAMES)
def test_policy_from_our_file(name, suffix, with_env, tmp_path):
    path = tmp_path / f"x{suffix}"
    save_weights(ours(name), path)
    found = policy_from_checkpoint(path, ENVS[name] if with_env else None)
    same_policy(found, name)
    assert puffer_jax.split(found)[0] == puffer_jax.split(ours(name))[0]  # sizes, spaces, order


HINTS = {
    "discrete": {"nvec": 5},
    "multidiscrete": {"nvec": (2, 1, 3)},
    "continuous": {},
    "lstm": {},
    "convolutional": {},
    "procgen": {"image_shape": (7, 9, 3)},
}


@pytest.mark.parametrize("source", ["pt", "safetensors", "mapping"])
@pytest.mark.parametrize("name", NAMES)
def test_policy_from_keys_and_shapes(name, source, tmp_path):
    checkpoint = puffer_jax.state_dict(ours(name))
    if source == "pt":
        checkpoint = tmp_path / "x.pt"
        save_weights(ours(name), checkpoint)
    elif source == "safetensors":  # another program's, without our description
        once = {k: torch.from_numpy(x) for k, x in checkpoint.items() if not k.startswith("cell.")}
        checkpoint = tmp_path / "x.safetensors"
        safetensors.torch.save_file(once, checkpoint)
    same_policy(policy_from_checkpoint(checkpoint, ENVS[name]), name)
    same_policy(policy_from_checkpoint(checkpoint, **HINTS[name]), name)


def test_sizes_of_the_inferred_policy():
    policy = policy_from_checkpoint(puffer_jax.state_dict(ours("convolutional")))
    assert (policy.framestack, policy.flat_size, policy.hidden_size) == (2, 128, 6)
    policy = policy_from_checkpoint(
        puffer_jax.state_dict(ours("convolutional")), channels_last=True, downsample=2
    )
    assert (policy.channels_last, policy.downsample) == (True, 2)
    policy = policy_from_checkpoint(
        puffer_jax.state_dict(ours("lstm")), param_dtype=jnp.float64, dtype=jnp.bfloat16
    )
    assert policy.lstm.bias_hh_l0.dtype == np.float64 and policy.policy.dtype == jnp.bfloat16


def test_what_shapes_cannot_tell():
    fused = puffer_jax.state_dict(ours("multidiscrete"))
    with pytest.raises(ValueError, match=r"6 rows.*env, nvec=6 or nvec=\(\.\.\.\) with sum 6"):
        policy_from_checkpoint(fused)
    with pytest.raises(ValueError, match=r"sums to 7, decoder.weight has 6 rows"):
        policy_from_checkpoint(fused, nvec=(3, 4))
    with pytest.raises(ValueError, match=r"nvec=5, but decoder.weight has 6 rows"):
        policy_from_checkpoint(fused, nvec=5)
    with pytest.raises(ValueError, match=r"decoder.weight \(6, 8\) instead of \(5, 8\)"):
        policy_from_checkpoint(fused, ENVS["discrete"])
    assert len(policy_from_checkpoint(fused, nvec=(3, 3)).forward(observations("discrete"))[0]) == 2
    images = puffer_jax.state_dict(ours("procgen"))
    with pytest.raises(ValueError, match=r"ProcgenResnet.*env or image_shape=\(H, W, C\)"):
        policy_from_checkpoint(images)
    with pytest.raises(ValueError, match=r"network.5.weight \(6, 8\) instead of \(6, 16\)"):
        policy_from_checkpoint(images, image_shape=(15, 9, 3))
    with pytest.raises(ValueError, match="flat_size is 128"):
        policy_from_checkpoint(
            puffer_jax.state_dict(ours("convolutional")), image_shape=(2, 100, 100)
        )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"foo": (2,), "bar": (3,)}, "none of Default.*load_weights. Found: bar, foo"),
        ({}, "none of Default"),
        ({"encoder.0.weight": (2, 3), "value.weight": (1, 2)}, "neither decoder.weight nor"),
        ({"encoder.0.weight": (2,), "value.weight": (1, 2)}, r"\(2,\); expected 2 dimensions"),
        (
            {
                "lstm.weight_ih_l0": (32,),
                "policy.encoder.0.weight": (8, 3),
                "policy.value.weight": (1, 8),
                "policy.decoder.weight": (2, 8),
            },
            r"lstm.weight_ih_l0 has shape \(32,\); expected 2 dimensions",
        ),
        ({"lstm.weight_ih_l0": (32, 8)}, "none of Default"),
        ({"policy." * i + "lstm.weight_ih_l0": (32, 8) for i in range(1500)}, "none of Default"),
        (
            {"encoder.0.weight": (0, 3), "value.weight": (1, 0), "decoder.weight": (2, 0)},
            "hidden_size is 0",
        ),
    ],
)
def test_keys_of_no_known_policy(tensors, message):
    with pytest.raises(ValueError, match=message):
        policy_from_checkpoint({name: np.ones(shape) for name, shape in tensors.items()})


def test_emulated_observations_survive_the_metadata(tmp_path):
    inner = np.dtype([("x", "u1"), ("y", "f4", (2, 3))], align=True)
    structured = np.dtype([("a", inner), ("b", "i4", (2,)), ("c", "?"), ("d", "f8")], align=True)
    emulated = {"observation_dtype": np.dtype("u1"), "emulated_observation_dtype": structured}
    spaces = env(Box(0, 255, (structured.itemsize,), np.uint8), Discrete(2), emulated=emulated)
    policy = fill(skeleton(lambda: puffer_jax.Default(spaces, HIDDEN, rngs=nnx.Rngs(0))), 0)
    x = np.zeros(4, structured)
    x["a"]["y"] = np.random.default_rng(0).standard_normal((4, 2, 3))
    x["a"]["x"], x["b"], x["d"] = 3, [[1, -2]], 0.25
    flat = x.view(np.uint8).reshape(4, -1)
    for suffix in (".safetensors", ".bin"):
        save_weights(policy, tmp_path / f"x{suffix}")
        found = policy_from_checkpoint(tmp_path / f"x{suffix}")
        layout = found.env_spec.single_observation_space
        assert layout == policy.env_spec.single_observation_space
        # Equality of dtypes does not see the padding.
        assert layout.structured.itemsize == structured.itemsize
        assert layout.structured["a"].fields["y"][1] == inner.fields["y"][1] == 4
        np.testing.assert_array_equal(found.forward(flat)[0], policy.forward(flat)[0])


def test_sizes_may_be_numpy_integers(tmp_path):
    policy = ours("convolutional")
    policy.flat_size = np.prod((64, 1, 2))
    save_weights(policy, tmp_path / "x.safetensors")
    same_policy(policy_from_checkpoint(tmp_path / "x.safetensors"), "convolutional")


class Default(puffer_jax.Default):
    """A user's own class with a known name."""


def test_custom_class_is_named(tmp_path):
    policy = fill(skeleton(lambda: Default(ENVS["discrete"], HIDDEN, rngs=nnx.Rngs(0))), 0)
    for suffix in (".safetensors", ".bin"):
        save_weights(policy, path := tmp_path / f"x{suffix}")
        with pytest.raises(ValueError, match=rf"custom policy, {__name__}\.Default; build it"):
            policy_from_checkpoint(path)
        load_weights(loaded := ours("discrete", 1), path)
        assert bits(loaded) == bits(ours("discrete"))


# --- broken and hostile .pt ---------------------------------------------------------------------


def pt_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def good_tensors():
    tensors = puffer_jax.state_dict(ours("discrete"))
    return {name: torch.from_numpy(array) for name, array in tensors.items()}


@functools.cache
def good_pt():
    return pt_bytes(good_tensors())


@functools.cache
def good_safetensors():
    return safetensors.torch.save(good_tensors())


def check_refused(path, data, *parts, policy=None):
    """Loading and rebuilding both fail with a ValueError that names the file."""
    path.write_bytes(data)
    policy = ours("discrete", 1) if policy is None else policy
    with refused(policy, path, *parts):
        load_weights(policy, path)
    with pytest.raises(ValueError, match="x") as caught:
        policy_from_checkpoint(path, ENVS["discrete"])
    assert caught.type is ValueError and str(path) in str(caught.value)


class Evil:
    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


def test_pickles_that_run_code(tmp_path):
    flag = tmp_path / "flag"
    tensors = {"value.bias": torch.zeros(1), "evil": Evil(flag)}
    files = [pt_bytes(tensors), pt_bytes(tensors, _use_new_zipfile_serialization=False)]
    files.append(pickle.dumps(Evil(flag)))
    for data in files[:2]:  # the bait works where anything may be unpickled
        torch.load(io.BytesIO(data), weights_only=False)
        flag.rmdir()
    for data in files:
        check_refused(tmp_path / "x.pt", data, "weights_only=True")
        assert not flag.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.nn.Linear(2, 2), "module.state_dict()"),
        ([torch.zeros(1)], "holds a list, not a state_dict"),
        (torch.zeros(3), "holds a Tensor, not a state_dict"),
        (
            {"value.bias": torch.zeros(1), "epoch": 3, "optimizer": {}},
            "these do not name tensors: epoch, optimizer",
        ),
        ({3: torch.zeros(1)}, "not a state_dict; these do not name tensors: 3"),
    ],
)
def test_pt_that_holds_something_else(content, message, legacy, tmp_path):
    data = pt_bytes(content, _use_new_zipfile_serialization=not legacy)
    check_refused(tmp_path / "x.pt", data, message)


@pytest.mark.parametrize("kind", ["expanded", "expanded half", "meta", "sparse"])
def test_pt_tensors_without_numbers(kind, tmp_path):
    make = {
        "expanded": lambda: torch.zeros(1).expand(10**7, 10**6),
        "expanded half": lambda: torch.zeros(1).half().expand(10**7, 10**6),
        "meta": lambda: torch.empty(10**7, 10**6, device="meta"),
        "sparse": lambda: torch.zeros(10, 10).to_sparse(),
    }[kind]
    data = pt_bytes(good_tensors() | {"encoder.0.weight": make()})
    assert len(data) < 10**5
    check_refused(tmp_path / "x.pt", data)


@pytest.mark.parametrize("good", [good_pt, good_safetensors])
def test_truncated_files(good, tmp_path):
    data = good()
    path = tmp_path / ("x.pt" if good is good_pt else "x.safetensors")
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 23, len(data) - 1):
        check_refused(path, data[:length])
    path.write_bytes(data)
    load_weights(policy := ours("discrete", 1), path)
    assert bits(policy) == bits(ours("discrete"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_bytes(suffix, tmp_path):
    for size in (1, 10, 1000, 10_000):
        data = np.random.default_rng(size).bytes(size)
        (tmp_path / f"x{suffix}").write_bytes(data)
        check_refused(tmp_path / f"x{suffix}", data)


def test_pt_of_a_hollow_policy(tmp_path):
    """All shapes fit each other, in a file of a few kilobytes; loading it would take terabytes."""
    wide = {"encoder.0.weight": (10**6, 10**6), "encoder.0.bias": (10**6,)}
    heads = {"decoder.weight": (5, 10**6), "value.weight": (1, 10**6)}
    tensors = {name: torch.ones(1).expand(shape) for name, shape in (wide | heads).items()}
    tensors |= {"decoder.bias": torch.ones(5), "value.bias": torch.ones(1)}
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"x\.pt.*their own numbers: encoder.0.weight, enc"
    ) as error:
        policy_from_checkpoint(tmp_path / "x.pt", nvec=5)
    assert "bias, decoder.weight, value.weight" in str(error.value)


def test_legacy_pt_loads(tmp_path):
    tensors = torch.load(io.BytesIO(good_pt()), weights_only=True)
    (tmp_path / "x.pt").write_bytes(pt_bytes(tensors, _use_new_zipfile_serialization=False))
    assert not zipfile.is_zipfile(tmp_path / "x.pt")
    load_weights(policy := ours("discrete", 1), tmp_path / "x.pt")
    assert bits(policy) == bits(ours("discrete"))


# --- broken and hostile .safetensors ------------------------------------------------------------


def craft(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BROKEN = {
    "huge length": craft({}, length=2**40),
    "negative length": craft({}, length=2**64 - 1),
    "length past the end": craft({}, length=50),
    "length within the header": craft({"a": entry(0, 4, [1])}, bytes(4), length=5),
    "not JSON": craft(b'{"a": '),
    "not UTF-8": craft(b"\xff\xfe\x00\x80"),
    "a list": craft([1, 2]),
    "entries that are none": craft({"a": 3}),
    "nested": craft(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "offsets out of range": craft({"a": entry(0, 400, [100])}, bytes(8)),
    "offsets backwards": craft({"a": entry(8, 0, [2])}, bytes(8)),
    "negative offsets": craft({"a": entry(-4, 4, [2])}, bytes(8)),
    "overlap": craft({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "hole": craft({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "data left over": craft({"a": entry(0, 4, [1])}, bytes(8)),
    "shape that lies": craft({"a": entry(0, 8, [3])}, bytes(8)),
    "shape that overflows": craft({"a": entry(0, 8, [2**33, 2**33])}, bytes(8)),
    "negative shape": craft({"a": entry(0, 8, [-1, -2])}, bytes(8)),
    "dtype of no library": craft({"a": entry(0, 8, [2], "F31")}, bytes(8)),
    "metadata that is no map": craft({"__metadata__": "x", "a": entry(0, 4, [1])}, bytes(4)),
    "metadata of numbers": craft({"__metadata__": {"a": 3}}, b""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_safetensors(kind, tmp_path):
    check_refused(tmp_path / "x.safetensors", BROKEN[kind], "not a readable safetensors file")


def with_description(description):
    text = description if isinstance(description, str) else json.dumps(description)
    return safetensors.torch.save(good_tensors(), {"puffer_jax": text})


GOOD = {
    "class": "Default",
    "sizes": {"hidden_size": HIDDEN},
    "observation": {"shape": [5], "structured": None, "sample_dtype": None},
    "action": {"class": "Discrete", "n": 5},
}


def changed(path, value):
    description = json.loads(json.dumps(GOOD))
    *parents, last = path.split(".")
    place = functools.reduce(lambda d, key: d[key], parents, description)
    if value is None:
        del place[last]
    else:
        place[last] = value
    return description


HUGE = 10**8
WRAPPER = GOOD | {"class": "LSTMWrapper", "sizes": {"input_size": HIDDEN, "hidden_size": HIDDEN}}
DESCRIPTIONS = {
    "not JSON": '{"class": ',
    "a list": [1, 2],
    "a number": 3,
    "a string": '"Default"',
    "true": "true",
    "empty": {},
    "nested lists": "[" * 50_000 + "]" * 50_000,
    # Each wrapper would initialise all below it once more.
    "nested policies": functools.reduce(lambda p, _: WRAPPER | {"policy": p}, range(150), GOOD),
    "a wrapper of a wrapper": WRAPPER | {"policy": WRAPPER | {"policy": GOOD}},
    "a wrapper of nothing": WRAPPER,
    "class of another type": changed("class", ["Default"]),
    "unknown class": changed("class", "Foo"),
    "no class": changed("class", None),
    "no sizes": changed("sizes", None),
    "no size": changed("sizes.hidden_size", None),
    "a string for a size": changed("sizes.hidden_size", "8"),
    "a float for a size": changed("sizes.hidden_size", 8.0),
    "NaN for a size": changed("sizes.hidden_size", math.nan),
    "zero size": changed("sizes.hidden_size", 0),
    "negative size": changed("sizes.hidden_size", -8),
    "another size": changed("sizes.hidden_size", 9),
    "a large size": changed("sizes.hidden_size", HUGE),
    "a huge size": changed("sizes.hidden_size", 10**12),
    "an absurd size": changed("sizes.hidden_size", 10**40),
    "many actions": changed("action.n", HUGE),
    "absurdly many actions": changed("action.n", 10**30),
    "negative actions": changed("action.n", -5),
    "no actions": changed("action.n", None),
    "actions of no class": changed("action.class", "os.system"),
    "actions with more": changed("action.more", 3),
    "no action": changed("action", None),
    "large observations": changed("observation.shape", [HUGE]),
    "absurd observations": changed("observation.shape", [10**20, 10**20]),
    "observations of strings": changed("observation.shape", ["5"]),
    "an observation that is none": changed("observation", 3),
    "unknown shape": changed("observation.shape", None),
    "fields of no dtype": changed("observation.structured", {"dtype": "xyz", "shape": []}),
    "fields of nothing": changed("observation.structured", {"fields": 3}),
    "large fields": changed(
        "observation.structured", {"fields": [["a", {"dtype": "<f4", "shape": [10**12]}]]}
    ),
    "fields twice": changed(
        "observation.structured", {"fields": [["a", {"dtype": "<f4", "shape": []}]] * 2}
    ),
    "a convolution": changed("class", "Convolutional")
    | {
        "sizes": dict.fromkeys(
            ["framestack", "flat_size", "input_size", "hidden_size", "output_size", "downsample"], 8
        )
        | {"channels_last": "no"}
    },
}


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_descriptions_that_lie(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_description(DESCRIPTIONS[kind]))
    before = peak_memory()
    with pytest.raises(ValueError, match="x") as caught:
        policy_from_checkpoint(path)
    assert caught.type is ValueError and str(path) in str(caught.value)
    # The large sizes are 3 to 4 GB of parameters that a machine could well allocate.
    assert peak_memory() - before < 5e8
    if kind == "a large size":
        assert f"encoder.0.weight (8, 5) instead of ({HUGE}, 5)" in str(caught.value)
    if kind == "another size":
        assert "wrong shape: encoder.0.weight (8, 5) instead of (9, 5)" in str(caught.value)


def test_the_description_that_does_not_lie(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_description(GOOD))
    same_policy(policy_from_checkpoint(path), "discrete")
    # load_weights is told the policy, so it does not care what the file says it is.
    path.write_bytes(with_description('{"class": '))
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        policy_from_checkpoint(path)


def test_a_large_size_would_be_noticed():
    """The measure of the test above sees an allocation of that size."""
    before = peak_memory()
    block = np.ones(int(6e8 + before - current_memory()), np.uint8)
    assert peak_memory() - before > 5e8
    del block


def current_memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- broken .bin --------------------------------------------------------------------------------


def bin_pair(tmp_path, name="discrete"):
    path = tmp_path / "x.bin"
    save_weights(ours(name), path)
    sidecar = tmp_path / "x.bin.json"
    return path, sidecar, json.loads(sidecar.read_text())


def test_sidecar_content(tmp_path):
    path, _, content = bin_pair(tmp_path, "lstm")
    reference = theirs("lstm")
    assert content["parameters"] == {n: list(p.shape) for n, p in reference.named_parameters()}
    assert list(content["parameters"]) == [n for n, _ in reference.named_parameters()]
    assert content["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert content["policy"]["class"] == "LSTMWrapper"


@pytest.mark.parametrize("change", [-4, -1, 1, 4, 400])
def test_bin_of_another_length(change, tmp_path):
    path, sidecar, _ = bin_pair(tmp_path)
    data = path.read_bytes()
    data = data[:change] if change < 0 else data + bytes(change)
    policy = ours("discrete", 1)
    count = sum(array.size for array in puffer_jax.state_dict(policy).values())
    path.write_bytes(data)
    with refused(policy, path, "checksum", "x.bin.json"):
        load_weights(policy, path)
    sidecar.unlink()
    with refused(policy, path, f"{len(data)} bytes, {len(data) / 4:g} float32", f"{count} param"):
        load_weights(policy, path)


def test_bin_without_sidecar(tmp_path):
    path, sidecar, _ = bin_pair(tmp_path)
    sidecar.unlink()
    with pytest.warns(UserWarning, match=r"x\.bin has no sidecar x\.bin\.json: .* cannot be known"):
        load_weights(policy := ours("discrete", 1), path)
    assert bits(policy) == bits(ours("discrete"))
    with pytest.raises(ValueError, match=r"x\.bin: no sidecar x\.bin\.json.*use load_weights"):
        policy_from_checkpoint(path)


def test_bin_of_one_flipped_bit(tmp_path):
    path, _, _ = bin_pair(tmp_path)
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    check_refused(path, bytes(data), "checksum")


SIDECARS = {
    # what is done to the sidecar: (function, what the error says)
    "wrong sha": (lambda c: c | {"sha256": "0" * 64}, "checksum"),
    "sha of another type": (lambda c: c | {"sha256": 3}, "checksum"),
    "no sha": (lambda c: {k: v for k, v in c.items() if k != "sha256"}, "sha256"),
    "renamed": (
        lambda c: (
            c | {"parameters": {k.replace("value", "v"): s for k, s in c["parameters"].items()}}
        ),
        "missing: value.weight (1, 8), value.bias (1,); unexpected: v.weight (1, 8), v.bias (1,)",
    ),
    "reshaped": (
        lambda c: c | {"parameters": c["parameters"] | {"decoder.weight": [8, 5]}},
        "wrong shape: decoder.weight (8, 5) instead of (5, 8)",
    ),
    "reordered": (
        lambda c: c | {"parameters": dict(sorted(c["parameters"].items()))},
        "the order ['decoder.bias', 'decoder.weight'",
    ),
    "no parameters": (lambda c: c | {"parameters": {}}, "missing: encoder.0.weight"),
    "parameters in a list": (lambda c: c | {"parameters": [1]}, "not a sidecar"),
    "absurd shapes": (
        lambda c: c | {"parameters": {name: [10**12, 10**12] for name in c["parameters"]}},
        "wrong shape",
    ),
    "negative shapes": (
        lambda c: c | {"parameters": {name: [-1, -8] for name in c["parameters"]}},
        "not a sidecar",
    ),
    "shapes of strings": (
        lambda c: c | {"parameters": {name: ["8"] for name in c["parameters"]}},
        "not a sidecar",
    ),
    "numbers for shapes": (
        lambda c: c | {"parameters": dict.fromkeys(c["parameters"], 8)},
        "not a sidecar",
    ),
    "a list": (lambda c: [c], "not a sidecar"),
    "null": (lambda c: None, "not a sidecar"),
}


@pytest.mark.parametrize("kind", SIDECARS)
def test_wrong_sidecar(kind, tmp_path):
    change, message = SIDECARS[kind]
    path, sidecar, content = bin_pair(tmp_path)
    sidecar.write_text(json.dumps(change(content)))
    policy = ours("discrete", 1)
    with refused(policy, path, "x.bin.json", message):
        load_weights(policy, path)
    with pytest.raises(ValueError, match="x") as caught:
        policy_from_checkpoint(path)
    assert caught.type is ValueError and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "\udcff", "[" * 50_000, '{"sha256": ' + "9" * 5000 + "}"]
)
def test_sidecar_that_is_no_json(text, tmp_path):
    path, sidecar, _ = bin_pair(tmp_path)
    sidecar.write_bytes(text.encode(errors="surrogateescape"))
    policy = ours("discrete", 1)
    with refused(policy, path, "x.bin.json is not a sidecar"):
        load_weights(policy, path)


def test_sidecar_describing_another_policy(tmp_path):
    path, sidecar, content = bin_pair(tmp_path)
    for value in (3, {}, changed("sizes.hidden_size", HUGE), changed("class", "Foo")):
        sidecar.write_text(json.dumps(content | {"policy": value}))
        with pytest.raises(ValueError, match=r"x\.bin: "):
            policy_from_checkpoint(path)


# --- files that are none ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_file_and_directory(suffix, tmp_path):
    policy, path = ours("discrete"), tmp_path / f"x{suffix}"
    for load in (lambda: load_weights(policy, path), lambda: policy_from_checkpoint(path)):
        with refused(policy, path, error=FileNotFoundError):
            load()
    path.mkdir()
    for load in (lambda: load_weights(policy, path), lambda: policy_from_checkpoint(path)):
        with refused(policy, path, error=IsADirectoryError):
            load()
    with refused(policy, error=IsADirectoryError):
        save_weights(policy, path)
    assert [p for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


@pytest.mark.parametrize("name", ["x.pth", "x", "x.PT", ".pt", "x.pt.tmp"])
def test_unknown_suffix(name, tmp_path):
    policy, path = ours("discrete"), tmp_path / name
    path.write_bytes(good_pt())
    for action in (
        lambda: load_weights(policy, path),
        lambda: save_weights(policy, path),
        lambda: policy_from_checkpoint(path),
    ):
        with refused(policy, path, ".pt, .safetensors, .bin"):
            action()
    assert path.read_bytes() == good_pt()


# --- fuzzing ------------------------------------------------------------------------------------


@st.composite
def damage(draw):
    """A function that flips, inserts, overwrites or removes a few bytes."""
    edits = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "insert", "delete", "truncate", "number"]),
                st.one_of(st.floats(0, 1), st.floats(0, 0.1), st.floats(0.9, 1)),
                st.integers(1, 255),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def apply(data):
        data = bytearray(data)
        for kind, where, value in edits:
            i = int(where * max(len(data) - 1, 0))
            if kind == "flip" and data:
                data[i] ^= value
            elif kind == "insert":
                data[i:i] = bytes([value]) * (value % 9)
            elif kind == "delete":
                del data[i : i + value % 9]
            elif kind == "truncate":
                del data[i:]
            elif kind == "number":  # a plausible but wrong size or offset
                data[i : i + 8] = struct.pack("<Q", 2 ** (value % 64))
        return bytes(data)

    return apply


@pytest.mark.parametrize("good", [good_pt, good_safetensors])
def test_damaged_files_never_half_load(good, tmp_path):
    path = tmp_path / ("x.pt" if good is good_pt else "x.safetensors")
    outcomes = set()

    @settings(max_examples=60, derandomize=True, deadline=None)
    @given(damage())
    def check(apply):
        policy = ours("discrete", 1)
        before = bits(policy)
        path.write_bytes(apply(good()))
        try:
            load_weights(policy, path)
        except ValueError as error:
            assert type(error) is ValueError and str(path) in str(error)
            assert bits(policy) == before
            outcomes.add("refused")
        else:
            tensors = puffer_jax.state_dict(policy)
            assert all(np.isfinite(array).all() for array in tensors.values())
            # All of the file's: at most a few bytes differ, nothing is left of the old weights.
            old, new = puffer_jax.state_dict(ours("discrete", 1)), puffer_jax.state_dict(policy)
            assert all((new[name] != old[name]).any() for name in new)
            if good is good_pt:  # which has checksums; these of safetensors are another library's
                assert bits(policy) == bits(ours("discrete"))
            outcomes.add("loaded")

    check()
    assert outcomes == {"refused", "loaded"}


# --- without torch, and what is imported --------------------------------------------------------


def test_pt_without_torch(tmp_path, monkeypatch):
    policy, path = ours("discrete"), tmp_path / "x.pt"
    path.write_bytes(good_pt())
    for version in (None, "2.9.1+cpu", "1.13.0"):
        module = None if version is None else SimpleNamespace(__version__=version)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch", module)
            for action in (
                lambda: load_weights(policy, path),
                lambda: save_weights(policy, tmp_path / "new.pt"),
                lambda: policy_from_checkpoint(path),
            ):
                with refused(policy, "pip install 'torch>=2.10'", error=ImportError) as caught:
                    action()
                assert version is None or version in str(caught.value)
    assert not (tmp_path / "new.pt").exists()
    for version in ("2.10.0", "2.13.0+cpu", "3.0.0a0+git1234"):
        monkeypatch.setattr(torch, "__version__", version)
        load_weights(policy, path)


def run_script(script, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_and_formats_without_torch(tmp_path):
    run_script(
        """
        import sys
        from types import SimpleNamespace

        def loaded(*names):
            return sorted(set(names) & set(sys.modules))

        import puffer_jax
        assert loaded("torch", "pufferlib", "gymnasium", "jax", "flax") == []
        puffer_jax.Default, puffer_jax.save_weights
        from flax import nnx
        import numpy as np

        space = SimpleNamespace(shape=(4,), low=0, high=1, dtype=np.float32)
        env = SimpleNamespace(observation_space=space, action_space=SimpleNamespace(n=2))
        policy = puffer_jax.Default(env, 8, rngs=nnx.Rngs(0))
        policy.forward(np.ones((1, 4), np.float32))
        sys.modules["torch"] = None
        for suffix in (".safetensors", ".bin"):
            path = sys.argv[1] + "/x" + suffix
            puffer_jax.save_weights(policy, path)
            found = puffer_jax.policy_from_checkpoint(path)
            puffer_jax.load_weights(found, path)
            for name, array in puffer_jax.state_dict(policy).items():
                assert puffer_jax.state_dict(found)[name].tobytes() == array.tobytes()
        try:
            puffer_jax.save_weights(policy, sys.argv[1] + "/x.pt")
        except ImportError as error:
            assert "pip install" in str(error)
        else:
            raise AssertionError
        del sys.modules["torch"]
        assert loaded("torch", "pufferlib", "gymnasium") == []
        """,
        tmp_path,
    )
    assert (tmp_path / "x.bin").exists() and not (tmp_path / "x.pt").exists()


# --- atomic writes ------------------------------------------------------------------------------


class Blob(nnx.Module):
    def __init__(self, value):
        self.weight = nnx.Param(np.full((1 << 14,), value, np.float32))
        self.bias = nnx.Param(np.full((3,), value, np.float32))


# Forks writers and kills them. JAX is imported but never started, so forking is safe: the
# parameters stay NumPy arrays.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np, torch
from flax import nnx
from puffer_jax import weights
from puffer_jax.base import files

OURS = (str(Path(weights.__file__).parent), files.__file__)

class Blob(nnx.Module):
    def __init__(self, value):
        self.weight = nnx.Param(np.full((1 << 14,), value, np.float32))
        self.bias = nnx.Param(np.full((3,), value, np.float32))

torch.set_num_threads(1)
random = random.Random(0)
old, new = Blob(1), Blob(2)

def fork(function):
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child

def dying_at(line, path):
    # SIGKILL before the given line that saving executes.
    lines = 0
    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            lines += 1
            if lines == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    weights.save_weights(new, path)

def writing(path, ready):
    while True:
        for blob in (new, old):
            weights.save_weights(blob, path)
            os.write(ready, b"x")

def kill_writers_of(suffix, folder):
    work = folder / "work"
    path = work / f"x{suffix}"
    line, status = 0, -1
    while status != 0:
        weights.save_weights(old, path)
        line += random.randint(2, 8)
        child = fork(lambda: dying_at(line, path))
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        work.rename(folder / f"line-{line:03d}")
    for i in range(7):
        weights.save_weights(old, path)
        read, write = os.pipe()
        child = fork(lambda: writing(path, write))
        os.read(read, 1)
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        work.rename(folder / f"time-{i:03d}")

for suffix in (".pt", ".safetensors", ".bin"):
    kill_writers_of(suffix, Path(sys.argv[1]) / suffix[1:])
"""


@pytest.fixture(scope="module")
def after_kills():
    # In memory where there is such a place: hundreds of syncs of a disk take a minute.
    shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared_memory) as folder:
        run_script(KILLER, folder)
        yield Path(folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(suffix, after_kills):
    found = {}
    for folder in sorted((after_kills / suffix[1:]).iterdir()):
        policy = Blob(0)
        load_weights(policy, folder / f"x{suffix}")
        tensors = np.concatenate(list(puffer_jax.state_dict(policy).values()))
        values = set(np.unique(tensors).tolist())
        assert values in ({1.0}, {2.0}), folder
        found[folder.name] = values.pop()
    by_line = [value for name, value in found.items() if name.startswith("line")]
    # Killed at later and later lines: first the old file, from some line on the new one.
    assert len(by_line) >= 10 and by_line == sorted(by_line) and set(by_line) == {1.0, 2.0}
    assert sum(name.startswith("time") for name in found) == 7
    # Some died with the temporary file half-way, and the completed save leaves none.
    temporary = [
        len(list((after_kills / suffix[1:] / name).glob(".*.tmp")))
        for name in found
        if name.startswith("line")
    ]
    assert max(temporary) == (2 if suffix == ".bin" else 1) and temporary[-1] == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_the_old_file(suffix, tmp_path):
    path, policy = tmp_path / f"x{suffix}", Blob(1.0)
    save_weights(policy, path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_weights(Blob(2.0), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after[path.name] == before[path.name]
    assert set(after) <= set(before)  # no temporary file
    load_weights(loaded := Blob(0.0), path)
    assert float(loaded.bias[0]) == 1.0


def test_an_interrupted_write_leaves_nothing(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    for error in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):

        def write(file, error=error):
            file.write(b"ne")
            raise error

        with pytest.raises(type(error)):
            write_atomically(path, write)
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(mask, tmp_path):
    previous = os.umask(mask)
    try:
        for suffix in SUFFIXES:
            save_weights(ours("discrete"), tmp_path / f"x{suffix}")
    finally:
        os.umask(previous)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert set(modes.values()) == {0o666 & ~mask} and len(modes) == 4


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    target, link = tmp_path / "model_000001.pt", tmp_path / "latest.pt"
    save_weights(ours("discrete"), target)
    link.symlink_to(target)
    save_weights(ours("discrete", 1), link)
    assert not link.is_symlink()
    for path, seed in ((target, 0), (link, 1)):
        load_weights(policy := ours("discrete", 2), path)
        assert bits(policy) == bits(ours("discrete", seed))
