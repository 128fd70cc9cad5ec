"""Sweeps: PufferLib's distributions, studies that go on, and trials at once in one program."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from puffer_jax.cli.command import main
from puffer_jax.cli.sweep import _static, with_values
from puffer_jax.cli.train import Train
from puffer_jax.run.sweep.population import last_tenth
from puffer_jax.run.sweep.space import OURS, Parameter, Space, read_space
from puffer_jax.run.sweep.study import Study

KNOWN = ("train.gamma", "train.minibatch_size", "policy.hidden_size", "env.*")
NAN = float("nan")


@pytest.mark.parametrize(
    ("arguments", "title", "ends", "centre", "at_low"),
    [
        (("uniform", 0.0, 4.0, 1.0), "x", (0.0, 4.0), 1.0, 0.0),
        (("int_uniform", 1, 5), "x", (1, 5), 3, 1),
        (("uniform_pow2", 16, 64, 32), "log2 x", (4, 6), 5, 16),
        (("log_normal", 1e-4, 1e-2), "x", (1e-4, 1e-2), 1e-3, 1e-4),
        (("logit_normal", 0.9, 0.999, 0.99), "1 - x", (0.001, 0.1), 0.01, 0.999),
    ],
)
def test_distributions_are_even_where_puffer_libs_are(arguments, title, ends, centre, at_low):
    parameter = Parameter("x", *arguments)
    assert parameter.title == title
    # A few roundings of logarithms and of 1 - x.
    assert parameter.ends == pytest.approx(ends, rel=1e-12)
    assert parameter.centre() == pytest.approx(centre, rel=1e-12)
    assert parameter.value(parameter.ends[0]) == pytest.approx(at_low, rel=1e-12)
    assert type(parameter.value(parameter.ends[1])) is (int if parameter.kind.whole else float)


@pytest.mark.parametrize(
    ("scale", "low", "high"), [("auto", 0.0, 2.0), (0.25, 0.5, 1.5), (8, 0.0, 4.0)]
)
def test_the_first_trials_are_near_the_mean(scale, low, high):
    """Within `scale` of it, where the range goes from -1 to 1, and clipped, as in PufferLib."""
    rng = np.random.default_rng(0)
    drawn = [Parameter("x", "uniform", 0.0, 4.0, 1.0, scale).draw(rng) for _ in range(200)]
    assert low <= min(drawn) < low + 0.1 and high - 0.1 < max(drawn) <= high
    whole = [Parameter("x", "int_uniform", 1, 3, 2, 8).draw(rng) for _ in range(20)]
    assert {*whole} == {1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("normal", 0, 1), r"\[sweep.x\]: no such distribution: normal .*there are uniform"),
        (("uniform", 1, 0), "min is 1, max 0; min must be below max"),
        (("uniform", 0, "a"), "max is 'a'; must be a number"),
        (("uniform", 0, 1, 2), r"mean is 2; must be in \[0, 1\]"),
        (("uniform", 0, 1, 1, "wide"), "scale is 'wide'; a number, 'auto' or 'time'"),
        (("log_normal", 0, 1), "log_normal is of numbers above 0"),
        (("logit_normal", 0, 1), "logit_normal is of numbers below 1"),
        (("uniform_pow2", 2, 12), "min is 2, max 12; must be powers of two"),
        (("int_uniform", 0.5, 2), "must be whole numbers"),
    ],
)
def test_what_is_no_parameter(arguments, message):
    with pytest.raises(ValueError, match=message):
        Parameter("x", *arguments)


def test_sections_are_puffer_libs():
    gamma = {"distribution": "logit_normal", "min": 0.8, "max": 0.9999, "mean": 0.98, "scale": 0.5}
    head = {"method": "Protein", "metric": "score", "goal": "minimize", "downsample": 10}
    space = read_space({"base": {}, "sweep": head, "sweep.train.gamma": gamma}, KNOWN)
    expected = Parameter("train.gamma", "logit_normal", 0.8, 0.9999, 0.98, 0.5)
    assert space == Space("score", False, (expected,))
    assert read_space({"train": {}, "sweep": {"metric": "score"}}, KNOWN) is OURS
    env = {"distribution": "int_uniform", "min": 1, "max": 2}
    assert read_space({"sweep.env.width": env}, KNOWN).parameters[0].name == "env.width"
    for sections, message in (
        ({"sweep.train.gama": gamma}, r"cannot search train\.gama \(did you mean train\.gamma"),
        ({"sweep": {"goal": "up"}, "sweep.train.gamma": gamma}, "goal is 'up'; expected maximize"),
        ({"sweep": {"metrik": "x"}, "sweep.train.gamma": gamma}, "metrik .did you mean metric"),
        ({"sweep.train.gamma": {"min": 0}}, r"\[sweep\.train\.gamma\] lacks distribution, max"),
        ({"sweep.train.gamma": gamma | {"low": 1}}, r"gamma\]: no such key: low"),
    ):
        with pytest.raises(ValueError, match=message):
            read_space(sections, KNOWN)


def test_values_become_options():
    values = {"train.gamma": 0.9, "train.total_timesteps": 1000.4, "env.size": 3}
    settings = with_values(Train(), values | {"policy.hidden_size": 32})
    assert (settings.train.gamma, settings.train.total_timesteps) == (0.9, 1000)
    assert (settings.policy.hidden_size, settings.env_arg) == (32, ("size=3",))
    assert _static(OURS) == ()


SPACE = Space(
    "score",
    True,
    (
        Parameter("train.gamma", "logit_normal", 0.8, 0.999),
        Parameter("train.minibatch_size", "uniform_pow2", 16, 128),
    ),
)


def test_a_study_goes_on_in_its_folder(tmp_path):
    shared = ("train.minibatch_size",)
    study = Study(tmp_path / "s", SPACE, {"env": "x"}, shared=shared)
    first = study.ask(4, shared)
    # The middle of the logarithms of 0.2 and 0.001, to a few roundings.
    assert first[0].values["train.gamma"] == pytest.approx(1 - 0.0002**0.5, rel=1e-12)
    assert {p.values["train.minibatch_size"] for p in first} == {64}
    assert len({p.values["train.gamma"] for p in first}) == 4
    for place, proposal in enumerate(first):
        study.tell(proposal.trial, NAN if place == 3 else place, seconds=2.0)
    with pytest.raises(ValueError, match="has a study with another space or other options"):
        Study(tmp_path / "s", SPACE, {"env": "y"}, shared=shared)

    again = Study(tmp_path / "s", SPACE, {"env": "x"}, shared=shared, seed=1)
    assert again.count() == 4 and [trial.value for trial in again.done()] == [2, 1, 0]
    for _ in range(8):  # the first ten are settled, the others the sampler's
        two = again.ask(2, shared)
        assert len({p.values["train.minibatch_size"] for p in two}) == 1
        for proposal in two:
            again.tell(proposal.trial, proposal.values["train.gamma"], seconds=1.0)
    assert study.count() == 20  # both see the same
    lines = study.table(2).splitlines()
    assert lines[0].split() == ["trial", "score", "seconds", "train.gamma", "train.minibatch_size"]
    assert len(lines) == 3 and lines[1].split()[:3] == ["2", "2", "2"]
    assert {*study.importances()} == {"1 - train.gamma", "log2 train.minibatch_size"}
    study.plot(tmp_path / "s" / "sweep.png")
    assert (tmp_path / "s" / "sweep.png").stat().st_size > 10_000


def test_the_score_is_the_mean_of_the_last_episodes():
    early = [9.0] * 18
    curves = jnp.array([[*early, 1.0, 4.0], [*early, NAN, NAN], [NAN] * 20])
    episodes = jnp.array([[1] * 19 + [2], [1] * 18 + [0, 0], [0] * 20])
    np.testing.assert_array_equal(last_tenth(curves, episodes), [3.0, 9.0, NAN])


def test_without_optuna_the_message_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--env", "cartpole"]) == 2
    expected = "puffer-jax sweep needs optuna: pip install 'puffer_jax[sweep]'"
    assert expected in capsys.readouterr().err
    assert main(["sweep", "--env", "cartpole", "--batch", "0"]) == 2
    assert "--batch is 0; must be positive" in capsys.readouterr().err


INI = """
[base]
env_name = {env}
[vec]
num_envs = 2
[policy]
hidden_size = 8
[train]
total_timesteps = 64
bptt_horizon = 8
minibatch_size = 16
[sweep]
metric = episode_length
[sweep.train.learning_rate]
distribution = log_normal
min = 0.001
max = 0.1
mean = 0.01
scale = auto
"""


@pytest.mark.parametrize("env", ["cartpole", "CartPole-v1"])
def test_a_sweep_from_the_shell(env, tmp_path, monkeypatch, capsys, quick):
    """At once in one program, and on the host one after another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.ini").write_text(INI.format(env=env))
    flags = ["sweep", "--config", "x.ini", "--trials", "2", "--batch", "2"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "2 of 2 trials, best" in out
    assert "the best: puffer-jax train --config x.ini --env" in out
    rows = (tmp_path / "runs" / "sweep" / "table.txt").read_text().splitlines()
    assert len(rows) == 3 and "0.01" in [row.split()[3] for row in rows[1:]]
    model = "best.safetensors" if env == "cartpole" else "trial0.pt"
    assert (tmp_path / "runs" / "sweep" / model).exists()
    assert main(flags) == 0  # there are as many as there are to be
    assert "2 of 2" not in capsys.readouterr().out
