"""Files written by puffer_jax 0.1.0, before its modules moved, still load (`golden/written`).

They were made by

    puffer-jax train --name native --env cartpole --rnn --policy.hidden-size 8 --recommended
        --train.optimizer adam --vec.num-envs 4 --train.bptt-horizon 4 --train.total-timesteps 64
    puffer-jax train --name host --env CartPole-v1 --policy.hidden-size 8 --vec.num-envs 2
        --train.bptt-horizon 8 --train.total-timesteps 64
    puffer-jax convert native_seed42.pt native.bin (native.safetensors)
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import puffer_jax
from puffer_jax.cli.command import main

pytestmark = pytest.mark.needs_reference  # of torch: most are .pt files
WRITTEN = Path(__file__).parents[1] / "golden" / "written"
RUNS = {"native_seed42": ("model_000004.pt", 643), "host_seed42": ("model_000005.pt", 67)}


def weights(path):
    return puffer_jax.state_dict(puffer_jax.policy_from_checkpoint(path))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_every_format_has_the_same_weights(suffix):
    expected = weights(WRITTEN / "native_seed42" / "model_000004.pt")
    found = weights(WRITTEN / f"native{suffix}")
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on(tmp_path, run, capsys):
    model, size = RUNS[run]
    folder = tmp_path / run
    shutil.copytree(WRITTEN / run, folder)
    before = weights(folder / model)
    assert sum(x.size for name, x in before.items() if not name.startswith("cell.")) == size
    assert main(["train", "--resume", str(folder), "--train.total-timesteps", "64"]) == 0
    assert "steps are done already" in capsys.readouterr().out
    assert main(["train", "--resume", str(folder), "--train.total-timesteps", "96"]) == 0
    assert " of 96 steps, " in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps[0] <= 72 and steps[-1] >= 96 and steps == sorted(steps)
    after = weights(max(folder.glob("model_*.pt")))
    moved = [name for name in before if (before[name] != after[name]).any()]
    assert len(moved) > len(before) / 2
    assert main(["eval", str(folder), "--episodes", "1"]) == 0


def test_a_train_state_holds_the_optimizers_moments(tmp_path):
    folder = tmp_path / "native_seed42"
    shutil.copytree(WRITTEN / "native_seed42", folder)
    settings = json.loads((folder / "config.json").read_text())
    env = puffer_jax.environments.make("cartpole")
    policy = puffer_jax.policy_from_checkpoint(folder / "model_000004.pt", env)
    config = puffer_jax.PuffeRLConfig.from_dict(settings["train"] | {"num_envs": 4})
    with jax.enable_x64(False):  # as it was written
        trainer = puffer_jax.PuffeRL(config, env, policy)
        trainer.restore(folder)
    assert (trainer.epoch, trainer.global_step) == (4, 64)
    model = puffer_jax.state_dict(policy)
    for name, array in puffer_jax.state_dict(trainer.policy).items():
        np.testing.assert_array_equal(array, model[name])
    moments = [x for x in jax.tree.leaves(trainer.state.opt_state) if x.ndim > 0]
    assert sum(np.abs(x).max() > 0 for x in moments) > len(moments) / 2
