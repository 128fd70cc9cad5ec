"""The `puffer-jax` command: what it prints, writes and returns."""

import json
import os
import re
import subprocess
import sys

import gymnasium
import jax
import numpy as np
import pufferlib.emulation
import pufferlib.models as reference
import pytest
import torch
from flax import nnx
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from support.bars import stub_env

import puffer_jax
from puffer_jax import environments, vector
from puffer_jax.cli.command import main
from puffer_jax.export import load_step

pytestmark = pytest.mark.usefixtures("quick")

FORMATS = (".pt", ".safetensors", ".bin")


class Packed(gymnasium.Env):
    observation_space = Dict(
        {"a": Box(-1, 1, (3,)), "b": Discrete(5), "c": Box(0, 255, (2, 2), np.uint8)}
    )
    action_space = Box(-1, 1, (2,))


gymnasium.register("PuffPacked-v0", Packed)


CARTPOLE = stub_env(Box(-np.inf, np.inf, (4,)), Discrete(2))


def default(env=CARTPOLE):
    return reference.Default(env, 8)


def recurrent(env=CARTPOLE):
    return reference.LSTMWrapper(env, default(env), 8, 8)


def convolutional(**options):
    env = stub_env(Box(0, 255, (2, 36, 44), np.uint8), Discrete(3))
    sizes = {"framestack": 2, "flat_size": 128, "hidden_size": 8, "output_size": 8}
    return reference.Convolutional(env, **sizes, **options)


@pytest.fixture
def save(tmp_path):
    def save(policy, name="model.pt", prefix=""):
        torch.manual_seed(0)
        tensors = {prefix + key: tensor for key, tensor in policy.state_dict().items()}
        torch.save(tensors, tmp_path / name)
        return str(tmp_path / name)

    return save


# --- check -----------------------------------------------------------------------------------


def test_check_compares_prints_and_writes(save, tmp_path, capsys):
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert main(["check", save(default()), "--env", "CartPole-v1", "--batch", "32", *files]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("CLOSE.\nAll 5 layers agree.\n")
    assert "encoder.0.weight" in printed
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["close"] is True
    assert content["weights_differ"] == []
    shapes = {row["name"]: row["shape"] for row in content["rows"] if row["kind"] == "output"}
    assert shapes["logits"] == [32, 2]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_check_a_recurrent_policy(save, capsys):
    path = save(recurrent(), prefix="module._orig_mod.")
    assert main(["check", path, "--batch", "32", "--time", "3", "--seed", "4"]) == 0
    assert "eval.state.lstm_c" in capsys.readouterr().out


def test_check_needs_no_image_size_for_convolutions(save, capsys):
    assert main(["check", save(convolutional())]) == 0
    assert "All 12 layers agree." in capsys.readouterr().out


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("downsample", [1, 2])
@pytest.mark.parametrize("area", [1, 2, 12, 13, 49])
def test_any_image_that_fits_the_convolutions_will_do(save, channels_last, downsample, area):
    sizes = {"framestack": 2, "flat_size": 64 * area, "hidden_size": 8, "output_size": 8}
    options = {"channels_last": channels_last, "downsample": downsample}
    env = stub_env(None, Discrete(3))
    path = save(reference.Convolutional(env, **sizes, **options))
    shape = puffer_jax.policy_from_checkpoint(path, **options).example_shape()
    # The constructor refuses an image that does not fit.
    puffer_jax.policy_from_checkpoint(path, image_shape=shape, **options)
    images = torch.zeros(1, *shape)
    assert reference.Convolutional(env, **sizes, **options)(images)[1].shape == (1, 1)


def test_check_an_emulated_environment_and_its_converted_checkpoint(save, tmp_path, capsys):
    path = save(default(pufferlib.emulation.GymnasiumPufferEnv(Packed())))
    assert main(["check", path, "--env", "PuffPacked-v0"]) == 0
    target = str(tmp_path / "model.safetensors")
    assert main(["convert", path, target, "--env", "PuffPacked-v0"]) == 0
    capsys.readouterr()
    assert main(["check", target, "--batch", "64"]) == 0
    assert "logits.scale" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["squared", "gymnax:Breakout-MinAtar", "pettingzoo:classic/rps_v2"]
)
def test_check_and_convert_know_every_family(name, save, tmp_path):
    env = environments.make(name)
    policy = puffer_jax.Default(env, 8, rngs=nnx.Rngs(0))
    source, target = (str(tmp_path / f"model{suffix}") for suffix in (".pt", ".safetensors"))
    puffer_jax.save_weights(policy, source)
    assert main(["check", source, "--env", name, "--batch", "16"]) == 0
    assert main(["convert", source, target, "--env", name]) == 0


def test_check_returns_1_for_another_function(save, monkeypatch, capsys):
    monkeypatch.setattr("puffer_jax.policies.default.gelu", jax.nn.gelu)
    assert main(["check", save(default())]) == 1
    assert "First layer that differs: encoder.1" in capsys.readouterr().out


# --- bad input -------------------------------------------------------------------------------

MISTAKES = {
    "no such file": (["check", "nowhere.pt"], "No such file or directory: 'nowhere.pt'"),
    "suffix": (["check", "model.onnx"], "must be one of .pt, .safetensors, .bin"),
    "environment": (["check", "{default}", "--env", "Nope-v7"], "--env no environment 'Nope-v7'; "),
    "other environment": (["check", "{default}", "--env", "Pendulum-v1"], "decoder_mean.weight"),
    "batch": (["check", "{default}", "--batch", "0"], "batch is 0 and time 8; both must be"),
    "heads": (["check", "{multi}"], "decoder.weight has 5 rows"),
    "wrong heads": (["check", "{multi}", "--nvec", "2", "2"], "sums to 4"),
    "image": (["convert", "{resnet}", "x.bin"], "pass env or image_shape=(H, W, C)"),
    "not a checkpoint": (["convert", "{text}", "x.bin"], "not a readable state_dict"),
    "target": (["convert", "{default}", "x.xyz"], "must be one of .pt, .safetensors, .bin"),
    "no sidecar": (["check", "{bin}"], "no sidecar"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input_is_one_line_and_2(name, save, tmp_path, capsys):
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "model.bin").write_bytes(b"\0" * 40)
    image = stub_env(Box(0, 255, (9, 12, 3), np.uint8), Discrete(4))
    multi = stub_env(Box(-1, 1, (4,)), MultiDiscrete([2, 3]))
    files = {
        "default": save(default()),
        "multi": save(default(multi), "multi.pt"),
        "resnet": save(reference.ProcgenResnet(image, 2, 8), "resnet.pt"),
        "text": str(tmp_path / "text.pt"),
        "bin": str(tmp_path / "model.bin"),
    }
    arguments, message = MISTAKES[name]
    before = sorted(tmp_path.iterdir())
    assert main([argument.format(**files) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("puffer-jax: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("arguments", [[], ["check"], ["frobnicate"], ["check", "a.pt", "--x"]])
def test_bad_usage_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_failing_policy_is_named(save, monkeypatch, capsys):
    def broken(self, hidden):
        raise RuntimeError("out of order")

    monkeypatch.setattr(reference.Default, "decode_actions", broken)
    assert main(["check", save(default())]) == 2
    error = capsys.readouterr().err
    assert error == "puffer-jax: out of order raised by the torch policy in float64\n"


def test_what_is_missing_comes_with_the_line_that_installs_it(save, tmp_path, monkeypatch, capsys):
    policy = puffer_jax.policy_from_checkpoint(save(default()))
    path = str(tmp_path / "model.safetensors")
    puffer_jax.save_weights(policy, path)
    monkeypatch.setitem(sys.modules, "pufferlib.models", None)
    assert main(["check", path]) == 2
    error = capsys.readouterr().err
    assert "pip install torch==2.13.0 psutil" in error
    assert "pip install --no-deps pufferlib-core==3.0.23" in error


# --- convert -----------------------------------------------------------------------------------


def weights_in(path):
    """What is in a file, read without our help."""
    if path.suffix == ".pt":
        tensors = torch.load(path, weights_only=True)
        tensors = {k: v.numpy() for k, v in tensors.items() if not k.startswith("cell.")}
    elif path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        tensors = load_file(path)
    else:
        return path.read_bytes()
    order = dict(recurrent(MULTI).named_parameters())
    assert tensors.keys() == order.keys()
    return b"".join(tensors[name].tobytes() for name in order)


MULTI = stub_env(Box(-1, 1, (4,)), MultiDiscrete([2, 3]))


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_convert_is_exact_in_all_directions(source, target, save, tmp_path):
    original = recurrent(MULTI)
    expected = b"".join(p.detach().numpy().tobytes() for p in original.parameters())
    start = tmp_path / f"start{source}"
    flags = ["--nvec", "2", "3"]
    assert main(["convert", save(original), str(start), *flags]) == 0
    end = tmp_path / f"end{target}"
    assert main(["convert", str(start), str(end), *(flags if source == ".pt" else [])]) == 0
    assert weights_in(end) == expected
    if target == ".pt":
        recurrent(MULTI).load_state_dict(torch.load(end, weights_only=True), strict=True)


@pytest.mark.filterwarnings("always:.*has no sidecar")
def test_convert_changes_the_padding_of_a_native_network(tmp_path, capsys):
    env = puffer_jax.environments.make("cartpole")
    native = {"encoder": "NativeEncoder", "decoder": "NativeDecoder"}
    policy = puffer_jax.v4.Policy.for_env(env, 12, 1, **native, rngs=nnx.Rngs(0))
    source, target = tmp_path / "source.bin", tmp_path / "target.bin"
    puffer_jax.save_weights(policy, source, padding=5)
    (tmp_path / "source.bin.json").unlink()
    paddings = ["--source-padding", "5", "--padding", "1"]
    assert main(["convert", str(source), str(target), "--env", "cartpole", *paddings]) == 0
    assert "source.bin has no sidecar" in capsys.readouterr().err
    expected = b"".join(tensor.tobytes() for tensor in puffer_jax.state_dict(policy).values())
    assert target.read_bytes() == expected != source.read_bytes()
    assert main(["convert", str(target), str(tmp_path / "x.pt"), "--padding", "2"]) == 2


# --- export --------------------------------------------------------------------------------------


def test_export_takes_observations_as_the_environment_gives_them(save, tmp_path, capsys):
    packed = pufferlib.emulation.GymnasiumPufferEnv(Packed())
    model, out = save(default(packed)), tmp_path / "policy"
    flags = ["--env", "PuffPacked-v0", "--batch", "2", "--platforms", "cpu"]
    assert main(["export", model, *flags, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"Default: {out}\n"
    step = load_step(out)
    shapes = {name: x.shape for name, x in step.observations.items()}
    assert shapes == {"a": (2, 3), "b": (2,), "c": (2, 2, 2)}
    x = {"a": np.ones((2, 3), np.float32), "b": np.array([1, 4], np.int32)}
    x["c"] = np.full((2, 2, 2), 9, np.uint8)
    logits, _, _ = step(x)
    expected, _ = puffer_jax.policy_from_checkpoint(model, Packed()).forward(x)
    # Sums of eight float32 numbers up to 9.
    np.testing.assert_allclose(logits["loc"], expected.loc, rtol=0, atol=2e-5)
    assert main(["export", model, "--platforms", "gpu"]) == 2
    assert "expected some of cpu, cuda" in capsys.readouterr().err


# --- the installed command -----------------------------------------------------------------------


def test_autotune_prints_what_it_measured(monkeypatch, capsys):
    asked = []
    trials = [
        vector.Trial({"backend": vector.Multiprocessing, "num_envs": 4, "num_workers": 2}, 1234.5),
        vector.Trial({"backend": vector.Serial, "num_envs": 2}, 99.0),
    ]
    monkeypatch.setattr(vector, "autotune", lambda *a, **k: asked.append((a, k)) or trials)
    given = ("--batch-size", "2", "--think", "3", "--env-arg", "sutton_barto_reward=True")
    assert main(["autotune", "--env", "CartPole-v1", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "batches of 2 environments, 3 ms to act on one" in lines[0]
    rows = [re.findall(r"[\w,]+", line) for line in lines if "Serial" in line or "Multi" in line]
    assert rows == [["Multiprocessing", "4", "2", "1,234"], ["Serial", "2", "99"]]
    ((positional, named),) = asked
    assert positional == ("CartPole-v1", 2, None, None, 0.003, 1.0)
    assert named == {"env_kwargs": {"sutton_barto_reward": True}}
    assert main(["autotune", "--env", "cartpole"]) == 2
    assert "--env cartpole is JAX-native" in capsys.readouterr().err


def test_the_command_itself(save):
    """In a process of its own, with JAX as it comes: float64 switched off."""
    command = [os.path.join(os.path.dirname(sys.executable), "puffer-jax"), "check"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    run = {"capture_output": True, "text": True, "env": environment, "check": False}
    done = subprocess.run([*command, save(default()), "--env", "CartPole-v1"], **run)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("CLOSE.\n")
    done = subprocess.run([*command, "nowhere.pt"], **run)
    assert (done.returncode, done.stdout) == (2, "")
    message = "puffer-jax: [Errno 2] No such file or directory: 'nowhere.pt'\n"
    assert done.stderr == message
