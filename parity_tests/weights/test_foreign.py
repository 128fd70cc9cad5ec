"""Other libraries' files: the message names what a file is, and what to do."""

import io
import pickle
import re

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.utils.prune
from flax import nnx

import puffer_jax
from puffer_jax import load_state_dict, load_weights, policy_from_checkpoint, save_weights


class Policy(nnx.Module):
    """An encoder and torch's LSTM by name; no numbers are computed with it."""

    def __init__(self):
        self.encoder = nnx.Param(np.zeros((3, 2), np.float32))
        for name, shape in {"weight_ih_l0": (8, 2), "bias_ih_l0": (8,)}.items():
            setattr(self, name, nnx.Param(np.zeros(shape, np.float32)))


def tensors():
    return {n: torch.from_numpy(x) for n, x in puffer_jax.state_dict(Policy()).items()}


def torch_bytes(content, legacy=False):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def refusal(path):
    """What both ways of loading say."""
    said = []
    for load in (lambda: load_weights(Policy(), path), lambda: policy_from_checkpoint(path)):
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            load()
        said.append(str(caught.value))
        assert "\x1b" not in said[-1] and "trust" not in said[-1]
    assert said[0] == said[1] and said[0].count(str(path)) == 1
    return said[0]


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        (
            "x.bin",
            torch_bytes(tensors()),
            "it is a torch file by its first bytes; rename it to x.pt",
        ),
        ("x.bin", torch_bytes(tensors(), legacy=True), "rename it to x.pt"),
        ("x.pth", torch_bytes(tensors()), ".bin; it is a torch file by its first bytes; rename it"),
        ("x.ckpt", torch_bytes(tensors(), legacy=True), "rename it to x.pt"),
        ("x.safetensors", torch_bytes(tensors()), "rename it to x.pt"),
        ("x.pt", safetensors.torch.save(tensors()), "it is a safetensors file by its first bytes;"),
        ("x.bin", safetensors.torch.save(tensors()), "rename it to x.safetensors"),
        ("x.bin", pickle.dumps(tensors(), 4), "it is a pickle by its first bytes, which is not"),
    ],
)
def test_files_under_another_formats_name(tmp_path, name, content, advice):
    (tmp_path / name).write_bytes(content)
    assert advice in refusal(tmp_path / name)


def test_numbers_that_look_like_a_header(tmp_path):
    """A .bin file may begin with any bytes."""
    policy = Policy()
    policy.encoder[...] = np.frombuffer(
        b"\x80\x02\0\0" + b"\0" * 4 + b"{\0\0\0" * 4, "<f4"
    ).reshape(3, 2)
    save_weights(policy, tmp_path / "x.bin")
    load_weights(other := Policy(), tmp_path / "x.bin")
    assert np.asarray(other.encoder[...]).tobytes()[:4] == b"\x80\x02\0\0"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (
            {"model": tensors(), "lr": 0.1},
            "name tensors: model, lr; the state_dict is one level down, under 'model'; save it by "
            "itself, `torch.save(checkpoint['model'], path)`",
        ),
        (
            {"lr": np.float64(0.1), "model": tensors()},
            "multiarray.scalar. If it is a training check",
        ),
        ({"steps": np.arange(3)} | tensors(), "save only its state_dict"),
        (torch.nn.Linear(1, 1), "save module.state_dict() instead"),
        ({"epoch": 3} | tensors(), "these do not name tensors: epoch"),
    ],
)
def test_training_checkpoints(tmp_path, content, advice, legacy):
    (tmp_path / "x.pt").write_bytes(torch_bytes(content, legacy))
    assert advice in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("strict", [True, False])
def test_layers_that_are_not_folded(strict):
    for name, wrap, undo in (
        ("a", torch.nn.utils.parametrizations.weight_norm, "remove_parametrizations"),
        ("b", torch.nn.utils.spectral_norm, "remove_spectral_norm"),
        ("c", lambda layer: torch.nn.utils.prune.identity(layer, "weight"), "prune.remove"),
    ):
        module = torch.nn.ModuleDict({name: wrap(torch.nn.Linear(2, 3))})
        policy = Layers(name)
        before = puffer_jax.state_dict(policy)
        with pytest.raises(ValueError, match=rf"{name}\..*fold them first with .*{undo}"):
            load_state_dict(policy, module.state_dict(), strict)
        np.testing.assert_equal(puffer_jax.state_dict(policy), before)
        with pytest.raises(ValueError, match="fold them first"):
            policy_from_checkpoint(module.state_dict())
    old = {"a.weight_g": torch.ones(3, 1), "a.weight_v": torch.ones(3, 2), "a.bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"a\.weight_g, a\.weight_v: .*remove_weight_norm"):
        load_state_dict(Layers("a"), old, strict)


class Layers(nnx.Module):
    def __init__(self, name):
        setattr(self, name, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 2}, "weight_ih_l1, weight_hh_l1, .* has more layers"),
        ({"bidirectional": True}, "weight_ih_l0_reverse, .* has a way back"),
    ],
)
def test_cores_that_are_more_than_ours(options, message, strict):
    foreign = tensors() | dict(torch.nn.LSTM(2, 2, **options).state_dict())
    foreign = {name: tensor for name, tensor in foreign.items() if "_hh_l0" not in name}
    with pytest.raises(ValueError, match=message):
        load_state_dict(Policy(), foreign, strict)
    with pytest.raises(ValueError, match=message):
        policy_from_checkpoint(foreign)


def test_what_is_not_the_policys_is_no_obstacle():
    """With strict=False other modules' keys are left out, whatever they are."""
    more = {"other.weight_g": torch.ones(1), "lstm.weight_ih_l1": torch.ones(1)}
    result = load_state_dict(Policy(), tensors() | more, strict=False)
    assert result.unexpected_keys == list(more)
