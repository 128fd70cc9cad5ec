"""`PuffeRLConfig`: what its fields take, the sizes of a budget, the plan in words."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from puffer_jax.ppo.config import PuffeRLConfig


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("anneal_lr", "false", False),
        ("anneal_lr", "True", True),
        ("anneal_lr", "off", False),
        ("use_rnn", "no", False),
        ("use_rnn", "None", None),
        ("reward_clip", "none", None),
        ("batch_size", "1e6", 1_000_000),
        ("total_timesteps", 1e6, 1_000_000),
        ("seed", np.int64(4), 4),
        ("learning_rate", jnp.float32(0.5), 0.5),
        ("learning_rate", "1e-3", 1e-3),
        ("vf_clip_coef", 0, 0.0),
        ("normalize_observations", "auto", "auto"),
    ],
)
def test_values_are_read_as_their_types(name, value, expected):
    found = getattr(PuffeRLConfig.from_dict({name: value}), name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("anneal_lr", "x", "true or false"),
        ("anneal_lr", 1, "true or false"),
        ("use_rnn", "auto", "true or false"),
        ("seed", "x", "a number"),
        ("seed", True, "a number"),
        ("num_envs", 2.5, "a whole number"),
        ("clip_coef", -1, "at least 0"),
        ("learning_rate", math.nan, "a finite number"),
        ("reward_scale", math.inf, "a finite number"),
        pytest.param("learning_rate", 10**400, "a finite number", id="too large for a float"),
        pytest.param("total_timesteps", -(10**400), "a finite number", id="as small"),
        ("gamma", 1.5, "between 0 and 1"),
        ("optimizer", "adamw", "one of muon, adam, muon_v4"),
        ("env", 3, "a text"),
        ("normalize_observations", "maybe", "true or false or auto"),
    ],
)
def test_values_that_no_field_takes(name, value, rule):
    with pytest.raises(ValueError, match=f"^{name} must be {rule}; got "):
        PuffeRLConfig.from_dict({name: value})


def test_a_file_without_its_section(tmp_path):
    file = tmp_path / "x.ini"
    file.write_text("[trian]\ngamma = 0.9\n[vec]\n")
    with pytest.raises(ValueError, match=r"no section \[train\]; its sections are: trian, vec"):
        PuffeRLConfig.from_ini(file)


@pytest.mark.parametrize(
    ("steps", "agents", "horizon", "minibatches"),
    [
        (100_000, 64, 8, 32),
        (300_000, 64, 32, 32),
        (10_000_000, 64, 128, 32),
        (1_000, 1, 8, 4),
        (100_000, 8, 64, 32),
    ],
)
def test_the_budget_sets_the_sizes(steps, agents, horizon, minibatches):
    sizes = PuffeRLConfig.recommended(total_timesteps=steps).sizes(agents)
    assert (sizes.horizon, sizes.minibatches) == (horizon, minibatches)
    assert sizes.batch == agents * horizon
    assert sizes.epochs >= 100 or horizon == 8
    assert sizes.updates == sizes.epochs * sizes.minibatches


def test_the_plan_in_words():
    sizes = PuffeRLConfig.recommended(total_timesteps=100_000).sizes(64)
    assert sizes.plan == (
        "6,240 gradient steps planned: 195 epochs of 512 steps, in each 32 minibatches of 64"
    )
    assert sizes.hopeless is None
    few = PuffeRLConfig(total_timesteps=100_000, bptt_horizon=64).sizes(64)
    assert few.hopeless and few.hopeless.startswith("24 gradient steps planned: 24 epochs of 4,096")


def test_v4_takes_its_names():
    config = PuffeRLConfig.v4()
    sizes = config.sizes(None)
    assert (sizes.agents, sizes.horizon, sizes.minibatch_segments) == (4096, 64, 128)
    assert (config.sampling, config.reset_on_done) == ("replacement", True)
    assert (config.optimizer, config.learning_rate, config.update_epochs) == ("muon_v4", 0.015, 1)
    # A minibatch is one step of the optimizer, however large; breakout.ini's sizes there.
    assert PuffeRLConfig.v4(minibatch_size=65_536, replay_ratio=1.42).sizes(None).minibatches == 5
    config = PuffeRLConfig.v4(horizon=16, replay_ratio=0.5, beta1=0.9, eps=1e-8, num_envs=1024)
    assert (config.bptt_horizon, config.adam_beta1, config.adam_eps) == (16, 0.9, 1e-8)
    assert config.sizes(None).minibatches == 1
    with pytest.raises(ValueError, match="one option by two names: horizon and bptt_horizon"):
        PuffeRLConfig.v4(horizon=8, bptt_horizon=8)
    with pytest.raises(
        ValueError, match=r"no such training option: min_lr \(did you mean min_lr_r"
    ):
        PuffeRLConfig.v4(min_lr=0.1)
    with pytest.raises(ValueError, match="min_lr_ratio must be between 0 and 1; got 2"):
        PuffeRLConfig.v4(min_lr_ratio=2)
