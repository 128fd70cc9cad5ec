"""Try the wheel where nothing else is installed, far from the checkout: `make dist`."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
from flax import nnx

import puffer_jax
from puffer_jax.spaces import Box, Discrete

sdist, wheel = (Path(path).resolve() for path in sys.argv[1:])
JUNK = {".venv", ".git", "runs", "demo", "build", "dist", "__pycache__", ".pytest_cache"}


def look(names):
    """Both archives hold the C++ sources and the marker for type checkers, and no junk."""
    for name in names:
        assert not JUNK & set(Path(name).parts), name
        assert not name.endswith((".so", ".pyc")), name
    assert any("kernels/cc/" in name and name.endswith(".cc") for name in names)
    assert any(name.endswith("puffer_jax/py.typed") for name in names)
    assert any(name.endswith("puffer_jax/presets/cartpole.ini") for name in names)


look(tarfile.open(sdist).getnames())
look(zipfile.ZipFile(wheel).namelist())

scratch = tempfile.TemporaryDirectory()
os.chdir(scratch.name)
os.environ["XDG_CACHE_HOME"] = scratch.name

assert Path(puffer_jax.__file__).is_relative_to(sys.prefix), puffer_jax.__file__
assert puffer_jax.__version__ == version("puffer_jax")

env = SimpleNamespace(
    single_observation_space=Box(-1.0, 1.0, (4,)), single_action_space=Discrete(2)
)
policy = puffer_jax.LSTMWrapper(env, puffer_jax.Default(env, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
observations = jnp.ones((3, 4))
logits, values, state = policy.forward_eval(observations, policy.initial_state(3))
assert logits.shape == (3, 2) and values.shape == (3, 1)
assert list(Path("puffer_jax").glob("*.so")), "no kernel was built from the sources in the wheel"

for suffix in (".safetensors", ".bin"):
    puffer_jax.save_weights(policy, f"model{suffix}")
    same = puffer_jax.policy_from_checkpoint(f"model{suffix}")
    assert (same.forward_eval(observations, same.initial_state(3))[0] == logits).all(), suffix

help_text = subprocess.run(
    [Path(sys.prefix) / "bin" / "puffer-jax", "--help"], capture_output=True, text=True, check=True
)
assert "train" in help_text.stdout and "convert" in help_text.stdout
assert importlib.util.find_spec("torch") is None
print(f"puffer_jax {puffer_jax.__version__}: {wheel.name} works")
