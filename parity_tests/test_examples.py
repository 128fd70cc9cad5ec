"""The training examples run from a user's shell, at a tiny size."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import puffer_jax

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(folder, *command):
    environment = os.environ | {"JAX_ENABLE_X64": "0", "MPLBACKEND": "agg"}
    result = subprocess.run(
        [sys.executable, EXAMPLES / command[0], *command[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("flag", ["--recurrent", "--no-recurrent"])
def test_ppo(tmp_path, flag):
    out = run(tmp_path, "ppo.py", flag, "--steps", "512", "--num-envs", "4", "--horizon", "32")
    assert out.count("return") == 4
    policy = puffer_jax.policy_from_checkpoint(tmp_path / "runs" / "ppo.safetensors")
    assert isinstance(policy, puffer_jax.LSTMWrapper) == (flag == "--recurrent")


def test_demo(tmp_path):
    out = run(tmp_path, "demo.py", "--steps", "4096", "--episodes", "10")
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        "learning_curve.png",
        "policy.bin",
        "policy.bin.json",
        "policy.pt",
        "policy.safetensors",
    }
    ours, theirs = (line.split(": ")[1] for line in out.splitlines() if "20 episodes" in line)
    assert ours == theirs
    assert "gradient" in out


def test_ppo_learns():
    """The loop is right: CartPole improves far beyond chance (about 22) in a few seconds."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import ppo
    finally:
        sys.path.pop(0)
    _, curve = ppo.train(ppo.Config(steps=65536), report=lambda *row: None)
    assert np.max([value for _, value in curve]) > 120


def test_examples_are_short():
    for path in EXAMPLES.rglob("*.py"):
        assert len(path.read_text().splitlines()) < 120, path
