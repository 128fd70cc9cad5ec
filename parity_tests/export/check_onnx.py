"""Every policy leaves as ONNX: `make onnx`, where jax2onnx is installed.

`export_step` compares what onnxruntime computes with what the policy does, and raises otherwise.
"""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import onnx as onnx_files
import pytest
from flax import nnx

import puffer_jax
from puffer_jax import v4
from puffer_jax.export import export_step, onnx
from puffer_jax.policies.recurrent import with_core
from puffer_jax.spaces import Box, Dict, Discrete, MultiDiscrete

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "policies"
VECTOR, BYTES = Box(-1, 1, (4,)), Box(0, 255, (16, 16, 3), np.uint8)
TREE = Dict(
    {"a": VECTOR, "b": SimpleNamespace(spaces=(Discrete(4), BYTES)), "m": Box(0, 1, (3,), np.int8)}
)


def env(observation, action):
    return SimpleNamespace(observation_space=observation, action_space=action)


THREE = Discrete(3)


def default(observation=VECTOR, action=THREE, **options):
    return puffer_jax.Default(env(observation, action), 8, rngs=nnx.Rngs(0), **options)


def with_memory(core):
    return with_core(core, env(VECTOR, THREE), default(), rngs=nnx.Rngs(1))


def of_v4(observation=VECTOR, **options):
    return v4.Policy.for_env(env(observation, THREE), 8, 2, rngs=nnx.Rngs(0), **options)


POLICIES = {
    "Default": default,
    "Default, components": lambda: default(action=MultiDiscrete((2, 3))),
    "Default, continuous": lambda: default(action=Box(-1, 1, (2,))),
    "Default, a tree": lambda: default(TREE),
    "Default, a mask": lambda: default(TREE, action_mask="m"),
    "Default, a number": lambda: default(Discrete(5)),
    "MLP": lambda: puffer_jax.MLP(env(VECTOR, Box(-1, 1, (2,))), rngs=nnx.Rngs(0)),
    "Convolutional": lambda: puffer_jax.Convolutional(
        env(Box(0, 255, (2, 36, 44), np.uint8), THREE),
        hidden_size=8,
        output_size=8,
        rngs=nnx.Rngs(0),
    ),
    "ProcgenResnet": lambda: puffer_jax.ProcgenResnet(env(BYTES, THREE), 4, 8, rngs=nnx.Rngs(0)),
    **{core: lambda core=core: with_memory(core) for core in ("lstm", "gru", "mingru")},
    **{f"v4 {n}": lambda n=n: of_v4(network=n) for n in ("MinGRU", "LSTM", "GRU", "MLP")},
    "v4 native": lambda: of_v4(encoder="NativeEncoder", decoder="NativeDecoder"),
    "v4 nature": lambda: of_v4(Box(0, 255, (1, 84, 84), np.uint8), encoder="NatureEncoder"),
    "v4 impala": lambda: of_v4(Box(0, 255, (64, 64, 3), np.uint8), encoder="ImpalaEncoder"),
}


@pytest.fixture(autouse=True)
def narrow(unoptimised):
    with jax.enable_x64(False):
        yield


def names(path):
    graph = onnx_files.load(path).graph
    return [[value.name for value in values] for values in (graph.input, graph.output)]


@pytest.mark.parametrize("name", POLICIES)
def test_our_policies(name, tmp_path):
    batch = 2 if name == "Default" else None
    export_step(POLICIES[name](), tmp_path / "step.onnx", format="onnx", batch=batch)


@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem != "toy"))
def test_the_examples_policies(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module(name)
    if name == "recurrent":
        make, spaces = module.recurrent, module.ENV
    elif name == "efficient_cnn":
        make, spaces = module.Policy, module.image_env(15, 11, 1)
    else:
        make, spaces = module.Policy, module.ENV
    policy, path = make(spaces, rngs=nnx.Rngs(0)), tmp_path / "step.onnx"
    if name == "structured":  # it reads bytes as numbers, for which ONNX has an operation since 26
        with pytest.raises(ValueError, match=r"^Policy cannot be exported: .*BitCast"):
            export_step(policy, path, format="onnx", env=spaces)
    else:
        export_step(policy, path, format="onnx", env=spaces)
        assert path.exists()


def test_what_inputs_and_outputs_are_called(tmp_path):
    export_step(default(TREE, MultiDiscrete((2, 3))), tmp_path / "step", format="onnx")
    inputs, outputs = names(tmp_path / "step")
    assert inputs == [f"observations.{part}" for part in ("a", "b.0", "b.1", "m")]
    assert outputs == ["logits.0", "logits.1", "values"]
    export_step(with_memory("gru"), tmp_path / "step", format="onnx", output="action")
    inputs, outputs = names(tmp_path / "step")
    assert inputs == ["observations", "state.gru_h"]
    assert outputs == ["action", "values", "new_state.gru_h"]


class Twice(nnx.Module):
    """A state that holds one array under two names, as `Recurrent` does for those who look."""

    def initial_state(self, batch_size):
        return {"a": jnp.zeros((batch_size, 2)), "b": jnp.zeros((batch_size, 2))}

    def forward_eval(self, x, state):
        new = jnp.tanh(x + state["a"])
        return new * 2, new[:, :1], {"a": new, "b": new}


def test_one_value_under_two_names(tmp_path):
    options = {"format": "onnx", "observations": np.ones((3, 2), np.float32)}
    export_step(Twice(), tmp_path / "step", **options)
    assert names(tmp_path / "step")[1] == ["logits", "values", "new_state.a", "new_state.b"]


def test_what_cannot_be_expressed_run_or_trusted_is_named(tmp_path, monkeypatch):
    class Sorting(nnx.Module):
        def __call__(self, x):
            return jax.lax.top_k(jnp.fft.fft(x).real, 1)[0], x[:, :1]

    options = {"format": "onnx", "observations": np.ones((2, 3), np.float32)}
    path = tmp_path / "step"
    with pytest.raises(
        ValueError, match=r"^Sorting cannot be exported: onnxruntime cannot run it: .*complex"
    ):
        export_step(Sorting(), path, **options)
    with pytest.raises(ValueError, match=r"^Default .*: onnxruntime cannot run it"):
        export_step(default(dtype=jnp.bfloat16), path, format="onnx")
    run = onnx._run
    wrong = lambda *given: {n: y + (n == "values") for n, y in run(*given).items()}  # noqa: E731
    monkeypatch.setattr(onnx, "_run", wrong)
    with pytest.raises(ValueError, match=r"^Default .*: in onnxruntime, values differs by \d"):
        export_step(default(), path, format="onnx")
    assert not path.exists()


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "puffer_jax" / "export" / "README.md").read_text()
    python, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    onnx_part, *_ = re.findall(r"```py\n(.*?)```", page, re.DOTALL)  # the other is RLlib's
    exec(compile(python + onnx_part, "README.md", "exec"), {})
