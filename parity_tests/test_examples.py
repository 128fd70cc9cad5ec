"""The training examples run as from a user's shell, at a tiny size."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import puffer_jax

# What only warns a user is not an error here.
pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script as `python examples/SCRIPT` does and returns what it printed.

    In this process, since most of a short run are imports; the demo has a process of its own.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [script, *options])
        with jax.enable_x64(False):
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("flag", ["--recurrent", "--no-recurrent"])
def test_ppo(run, tmp_path, flag):
    out = run("ppo.py", flag, "--steps", "512", "--num-envs", "4", "--horizon", "32")
    assert out.count("return") == 4
    policy = puffer_jax.policy_from_checkpoint(tmp_path / "runs" / "ppo.safetensors")
    assert isinstance(policy, puffer_jax.LSTMWrapper) == (flag == "--recurrent")


@pytest.mark.needs_reference
def test_demo(tmp_path):
    result = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", "--steps", "4096", "--episodes", "10"],
        cwd=tmp_path,
        env=os.environ | {"JAX_ENABLE_X64": "0", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        "learning_curve.png",
        "policy.bin",
        "policy.bin.json",
        "policy.pt",
        "policy.safetensors",
        "run",
        "run.pt",
    }
    ours, theirs = (line.split(": ")[1] for line in out.splitlines() if "20 episodes" in line)
    assert ours == theirs
    assert "gradient" in out


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("train_gymnasium.py", "--recurrent", "--steps", "512", "--num-envs", "4"), "model: runs"),
        pytest.param(
            ("train_pufferlib.py", "--steps", "512", "--num-envs", "4"),
            "loads into pufferlib",
            marks=pytest.mark.needs_reference,
        ),
        pytest.param(
            ("train_gymnax.py", "--steps", "2048", "--num-envs", "4"),
            "agent_steps: 2048",
            marks=pytest.mark.needs_gymnax,
        ),
        (
            ("train_v4.py", "--steps", "2048", "--num-envs", "16"),
            "meaning here: [vec] num_threads; [sweep]\nMinGRU, 2 layers of 64\n8 gradient steps",
        ),
        (("sweep_vmap.py", "--seeds", "4", "--steps", "512", "--num-envs", "4"), "rate   1e-02"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_training(run, command, expected):
    assert expected in run(*command)


@pytest.mark.needs_reference  # of torch, which Stable-Baselines3 is made of
def test_sb3(run):
    """SBX's row is in `make sbx`: its tensorflow-probability is a nightly one."""
    small = "--steps 64 --num-envs 4 --horizon 8".split()
    out = run("sb3.py", "--trainers", "ours", "recurrent_ppo", *small)
    header, *rows = (line.split() for line in out.splitlines())
    assert header == ["trainer", "final", "return", "steps/s", "seconds"]
    assert [row[0] for row in rows] == ["ours", "recurrent_ppo"]
    assert all(0 <= float(row[1]) <= 8 and float(row[3]) > 0 for row in rows)


@pytest.mark.needs_reference  # of torch: it writes a .pt file
def test_one_process_of_many(tmp_path):
    """In a process of its own: it joins the others before anything is computed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    small = "--num-processes 1 --steps 512 --num-envs 4 --horizon 16".split()
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_multihost.py", "--coordinator-address", address, *small],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "devices of 1 processes: return" in done.stdout
    assert (tmp_path / "runs" / "multihost_seed0.pt").exists()


@pytest.mark.needs_reference  # of torch: it writes a .pt file
def test_atari(run, tmp_path):
    small = "--steps 800 --num-envs 4 --horizon 16 --update-epochs 1 --hidden-size 16 --frames 20"
    assert "agent: atari/agent.gif, return" in run("train_atari.py", *small.split())
    env = puffer_jax.environments.make("ALE/Breakout-v5", framestack=1)
    policy = puffer_jax.policy_from_checkpoint(tmp_path / "atari" / "run_seed0.pt", env)
    assert isinstance(policy, puffer_jax.LSTMWrapper)
    assert isinstance(policy.policy, puffer_jax.Convolutional)
    assert (tmp_path / "atari" / "curve.png").read_bytes().startswith(b"\x89PNG")
    with Image.open(tmp_path / "atari" / "agent.gif") as image:
        assert (image.format, image.size) == ("GIF", (160, 210))


@pytest.mark.needs_gymnax
def test_learning_table(run, tmp_path):
    tasks = ("CartPole-v1",)
    out = run("learning.py", "--tasks", *tasks, "--seeds", "1", "--scale", "0.05")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [f"| {task}" for task in tasks]
    assert all(10 < float(row[3]) <= 500 for row in rows)
    assert (tmp_path / "learning.png").stat().st_size > 10_000


def test_ppo_learns(optimised):
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
