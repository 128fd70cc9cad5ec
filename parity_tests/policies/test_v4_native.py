"""The network of PufferLib 4's native trainer and its `.bin` files.

The judges are a twin in torch and a reader that walks a file as the C code does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from support.bars import BARS, relative_error, stub_env

import puffer_jax
from puffer_jax import v4
from puffer_jax.nn.distributions import Normal

pytestmark = pytest.mark.usefixtures("quick")

BATCH, TIME, HIDDEN, OBS, LAYERS = 3, 4, 6, 5, 2
FORWARD, GRADIENT = BARS["forward"]["float64"], BARS["gradient"]["float64"]
SPACES = {
    "discrete": Discrete(3),
    "multidiscrete": MultiDiscrete([2, 3]),
    "box": Box(-1, 1, (3,)),
}
NATIVE = {"encoder": "NativeEncoder", "decoder": "NativeDecoder"}


def env(kind):
    return stub_env(Box(-1, 1, (OBS,)), SPACES[kind])


def policy(kind, seed=0, dtype=jnp.float32, hidden=HIDDEN):
    options = {"rngs": nnx.Rngs(seed), "param_dtype": dtype}
    ours = v4.Policy.for_env(env(kind), hidden, LAYERS, **NATIVE, **options)
    if kind == "box":
        ours.decoder.logstd[...] += 0.25 * jnp.arange(1, 4)
    return ours


def outputs(kind):
    return 5 if kind == "multidiscrete" else 3


def twin(weights, kind, x):
    """Logits and values of segments (batch, time, obs) from the zero state, step by step."""
    logstd = weights.get("decoder.logstd")
    states = [torch.zeros(BATCH, HIDDEN, dtype=x.dtype) for _ in range(LAYERS)]
    rows = []
    for t in range(x.shape[1]):
        y = x[:, t] @ weights["encoder.weight"].T
        for i in range(LAYERS):
            u, gate, p = (y @ weights[f"network.layers.{i}.weight"].T).chunk(3, -1)
            candidate = torch.where(u >= 0, u + 0.5, u.sigmoid())
            states[i] = states[i] + gate.sigmoid() * (candidate - states[i])
            y = p.sigmoid() * states[i] + (1 - p.sigmoid()) * y
        rows.append(y @ weights["decoder.weight"].T)
    flat = torch.stack(rows, 1).flatten(0, 1)
    values = flat[:, -1].reshape(BATCH, -1)
    if kind == "box":
        return (flat[:, :-1], logstd.exp().expand(len(flat), -1)), values
    logits = flat[:, :-1]
    return (logits.split((2, 3), 1) if kind == "multidiscrete" else logits), values


@pytest.mark.parametrize("kind", SPACES)
def test_it_is_its_torch_twin(kind):
    ours = policy(kind, dtype=jnp.float64)
    x = np.random.default_rng(0).standard_normal((BATCH, TIME, OBS))
    graphdef, params = puffer_jax.split(ours)

    def run(params):
        logits, values, _ = puffer_jax.merge(graphdef, params).forward(x)
        if isinstance(logits, Normal):
            logits = logits.loc, logits.scale
        found = *jax.tree.leaves(logits), values
        return sum((part**2).sum() for part in found), found

    gradients, found = jax.jit(jax.grad(run, has_aux=True))(params)
    weights = {
        name: torch.from_numpy(w).requires_grad_()
        for name, w in puffer_jax.state_dict(ours).items()
    }
    logits, values = twin(weights, kind, torch.from_numpy(x))
    expected = [*(logits if isinstance(logits, tuple) else (logits,)), values]
    for ours_part, part in zip(found, expected, strict=True):
        assert relative_error(ours_part, part.detach()) <= FORWARD
    sum((part**2).sum() for part in expected).backward()
    by_name = puffer_jax.state_dict(puffer_jax.merge(graphdef, gradients))
    for name, weight in weights.items():
        assert relative_error(by_name[name], weight.grad) <= GRADIENT, name


def test_initial_weights():
    options = {"rngs": nnx.Rngs(0)}
    encoder = v4.NativeEncoder(200, 100, **options)
    decoder = v4.NativeDecoder((1,) * 40, 100, **options)
    # The native trainer's: uniform, gain sqrt(2) for the encoder and 1 for all others.
    for weight, bound in ((encoder.weight, np.sqrt(2 / 200)), (decoder.weight, 1 / np.sqrt(100))):
        largest = np.abs(weight[...]).max()
        assert 0.99 * bound < largest <= bound
        # Of thousands of uniform numbers; five standard errors are 4 %.
        assert abs(np.std(weight[...]) * np.sqrt(3) / bound - 1) < 0.04
    np.testing.assert_array_equal(decoder.logstd[...], np.zeros((1, 40)))


def walk(numbers, kind, hidden, align):
    """The tensors, taken one after the other from starts that are multiples of `align`."""
    at, a = 0, outputs(kind)
    logstd = {"decoder.logstd": (1, a)} if kind == "box" else {}
    shapes = {"encoder.weight": (hidden, OBS), "decoder.weight": (a + 1, hidden), **logstd}
    shapes |= {f"network.layers.{i}.weight": (3 * hidden, hidden) for i in range(LAYERS)}
    for name, shape in shapes.items():
        yield name, numbers[at : at + np.prod(shape)].reshape(shape)
        at = -(-(at + np.prod(shape)) // align) * align


@pytest.mark.parametrize(("kind", "align"), [("discrete", 8), ("box", 8), ("multidiscrete", 4)])
def test_native_files_both_ways(kind, align, tmp_path):
    ours, path = policy(kind), tmp_path / "x.bin"
    tensors = puffer_jax.state_dict(ours)
    puffer_jax.save_weights(ours, path, **({} if align == 8 else {"padding": align}))
    numbers = np.fromfile(path, "<f4")
    assert len(numbers) > sum(tensor.size for tensor in tensors.values())  # there is padding
    for name, tensor in walk(numbers, kind, HIDDEN, align):
        np.testing.assert_array_equal(tensor, tensors[name])
    hints = {"nvec": (2, 3)} if kind == "multidiscrete" else {}
    for other in (
        puffer_jax.policy_from_checkpoint(path),
        puffer_jax.policy_from_checkpoint(tensors, **hints),
    ):
        assert type(other.decoder) is v4.NativeDecoder and type(other.encoder) is v4.NativeEncoder
        assert other.env_spec.single_action_space == ours.env_spec.single_action_space
        for name, tensor in puffer_jax.state_dict(other).items():
            np.testing.assert_array_equal(tensor, tensors[name])
    # The trainer's own file has no sidecar, and perhaps zeros behind the last tensor.
    bare = tmp_path / "bare.bin"
    for tail in (0, -len(numbers) % align):
        np.concatenate([numbers, np.zeros(tail, "<f4")]).tofile(bare)
        fresh = policy(kind, seed=1)
        with pytest.warns(UserWarning, match="no sidecar"):
            puffer_jax.load_weights(fresh, bare, padding=align)
        for name, tensor in puffer_jax.state_dict(fresh).items():
            np.testing.assert_array_equal(tensor, tensors[name])


def test_a_bare_native_file_tells_its_width(tmp_path):
    ours, path = policy("discrete", hidden=24), tmp_path / "x.bin"
    puffer_jax.save_weights(ours, path)
    (tmp_path / "x.bin.json").unlink()
    with pytest.warns(UserWarning, match="no sidecar"):
        found = puffer_jax.policy_from_checkpoint(path, env("discrete"))
    assert (found.hidden_size, found.network.num_layers) == (24, LAYERS)
    for name, tensor in puffer_jax.state_dict(found).items():
        np.testing.assert_array_equal(tensor, puffer_jax.state_dict(ours)[name])
    with pytest.raises(
        ValueError, match=r"x\.bin: no sidecar, .* nvec=\(1, 1, 1\), .* none; build"
    ):
        puffer_jax.policy_from_checkpoint(path, env("box"))


def test_what_does_not_fit_is_said(tmp_path):
    ours, path = policy("discrete"), tmp_path / "x.bin"
    puffer_jax.save_weights(ours, path, padding=4)
    (tmp_path / "x.bin.json").unlink()
    with pytest.raises(ValueError, match=r"parameters, 276 with padding=8; padding=4 would fit"):
        puffer_jax.load_weights(ours, path)
    with pytest.raises(ValueError, match=r"only \.bin files have a padding; got padding=4"):
        puffer_jax.save_weights(ours, tmp_path / "x.safetensors", padding=4)
    with pytest.raises(ValueError, match="padding is 0; it must be at least 1"):
        puffer_jax.save_weights(ours, path, padding=0)
    with pytest.raises(ValueError, match=r"no such network: MinGru \(did you mean MinGRU\?\)"):
        v4.Policy.for_env(env("discrete"), network="MinGru", rngs=nnx.Rngs(0))
