"""Ours against the golden files, which need no reference; and the reference against them."""

import os
import subprocess
import sys
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file
from support.bars import assert_arrays_close

import puffer_jax

HERE = Path(__file__).parent


def ours(name, weights):
    def build():
        return golden.build(name, puffer_jax, rngs=nnx.Rngs(0), param_dtype=jnp.float64)

    # Built without drawing weights, which would take most of the time.
    graphdef, params = puffer_jax.split(nnx.eval_shape(build))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    policy = puffer_jax.merge(graphdef, zeros)
    assert puffer_jax.load_state_dict(policy, weights) == ([], [])
    return policy


@pytest.mark.parametrize("name", golden.NAMES)
def test_ours(name):
    file = golden.load(name)
    policy = ours(name, file.weights)
    outputs = golden.run_ours(policy, file.inputs)
    assert {str(y.dtype) for y in outputs.values()} == {"float64"}
    assert_arrays_close(outputs, file.outputs, "forward", "float64", f"golden {name}")
    # The weights are exact, also on the way back.
    for key, tensor in puffer_jax.state_dict(policy).items():
        if not key.startswith("cell."):
            np.testing.assert_array_equal(tensor, file.weights[key])


@pytest.mark.parametrize("name", golden.NAMES)
def test_a_wrong_weight_is_noticed(name):
    file = golden.load(name)
    key = next(key for key in file.weights if key.endswith("weight"))
    mirrored = np.ascontiguousarray(file.weights[key][::-1])
    outputs = golden.run_ours(ours(name, {**file.weights, key: mirrored}), file.inputs)
    with pytest.raises(AssertionError, match="bar"):
        assert_arrays_close(outputs, file.outputs, "forward", "float64")


@pytest.mark.parametrize("name", golden.NAMES)
def test_files_are_small_and_say_where_they_come_from(name):
    assert golden.path_of(name).stat().st_size < 100 * 1024
    file = golden.load(name)
    assert set(file.versions) == {"torch", "pufferlib-core", "numpy"}
    assert file.versions["pufferlib-core"] == "3.0.23"
    assert {y.dtype for y in file.outputs.values()} == {np.dtype(np.float64)}
    assert all(np.ptp(y) > 1e-3 for key, y in file.outputs.items() if not key.endswith("logits.1"))
    with safe_open(golden.path_of(name), framework="np") as tensors:
        prefixes = {key.split("/")[0] for key in tensors.keys()}
    assert prefixes == {"weights", "inputs", "outputs"}


@pytest.mark.needs_reference
@pytest.mark.parametrize("name", golden.NAMES)
def test_the_reference_still_says_so(name):
    file = golden.load(name)
    outputs = golden.reference_outputs(name, file.weights, file.inputs)
    assert_arrays_close(outputs, file.outputs, "forward", "float64")


@pytest.mark.needs_reference
def test_generating_anew():
    tensors, metadata = golden.generate("procgen")
    file = golden.load("procgen")
    with safe_open(golden.path_of("procgen"), framework="np") as stored:
        assert set(stored.keys()) == set(tensors)
        for key in tensors:
            if not key.startswith("outputs/"):
                np.testing.assert_array_equal(stored.get_tensor(key), tensors[key])
    assert metadata.keys() == {"exponents", "order", "versions"}
    found = {key: tensors[f"outputs/{key}"] for key in file.outputs}
    assert_arrays_close(found, file.outputs, "forward", "float64")


def v4_is_golden(policy, name):
    file = load_file(golden.V4 / "outputs.safetensors")
    logits, values, _ = policy.forward(file["observations"].astype(np.float64))
    found = {"logits": logits, "values": values}
    expected = {key: file[f"{name}/{key}"] for key in found}
    assert_arrays_close(found, expected, "forward", "float64", f"golden v4 {name}")
    for key, tensor in puffer_jax.state_dict(policy).items():
        np.testing.assert_array_equal(tensor, golden.v4_weights(name == "native")[key])


def test_a_native_file_of_pufferlib_4(tmp_path):
    path = golden.V4 / "native.bin"
    with pytest.warns(UserWarning, match="no sidecar"):
        policy = puffer_jax.policy_from_checkpoint(path, golden.v4_env(), param_dtype=jnp.float64)
    v4_is_golden(policy, "native")
    puffer_jax.save_weights(policy, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == path.read_bytes()


@pytest.mark.needs_reference
def test_a_python_file_of_pufferlib_4():
    path = golden.V4 / "python.pt"
    policy = puffer_jax.policy_from_checkpoint(path, param_dtype=jnp.float64)
    assert type(policy) is puffer_jax.v4.Policy
    v4_is_golden(policy, "python")


def pytest_without_reference(*arguments, golden_only):
    """A session on a machine where torch and pufferlib cannot be imported."""
    code = "import sys; sys.modules['torch'] = sys.modules['pufferlib'] = None; import pytest; "
    code += "sys.exit(pytest.main(sys.argv[1:]))"
    environment = {key: value for key, value in os.environ.items() if "GOLDEN_ONLY" not in key}
    if golden_only:
        environment["PUFFER_JAX_GOLDEN_ONLY"] = "1"
    command = [sys.executable, "-c", code, "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.needs_reference
def test_without_the_reference_golden_files_are_tested_and_what_imports_it_is_named():
    """All that can be collected without it is; of that the golden files' tests are run, and one."""
    chosen = "test_golden and not wrong_weight or test_jaxenv and is_no_jax_environment"
    run = pytest_without_reference("parity_tests", "-vv", "-k", chosen, golden_only=True)
    assert run.returncode == 0, run.stdout + run.stderr
    done, _, left_out = run.stdout.partition("not run, as they import the reference: ")
    # Of the golden files' the ones that need the reference are left out, as are these two.
    assert f" {2 * len(golden.NAMES) + 2} passed, " in run.stdout
    assert "test_jaxenv.py::" in done and "test_models.py::" not in done
    assert "test_models.py" in left_out and "test_jaxenv.py" not in left_out


@pytest.mark.needs_reference
def test_without_the_reference_the_rest_says_how_to_get_it():
    run = pytest_without_reference("parity_tests", "--collect-only", golden_only=False)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "pip install --no-deps pufferlib-core==3.0.23" in run.stderr
    assert "PUFFER_JAX_GOLDEN_ONLY=1" in run.stderr
