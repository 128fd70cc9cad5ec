"""Running moments, against NumPy's over all samples, and what is normalised with them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import puffer_jax
from puffer_jax import PuffeRLConfig
from puffer_jax.ppo import normalization
from puffer_jax.ppo.experience import Experience
from puffer_jax.ppo.moments import Moments, Normalization
from puffer_jax.spaces import Box, Discrete

ENV = SimpleNamespace(observation_space=Box(-1, 1, (3,), np.float32), action_space=Discrete(2))
GAMMA = 0.9

# Float64 on both sides, sums of at most 60 numbers near 1: 60 roundings of 1.1e-16 each are 7e-15,
# and a variance squares what it sums. A formula that differs is off by a sample in 60.
EXACT = 1e-12


def batch(rewards, terminals, mask=None, observations=None):
    segments = np.zeros_like(rewards)
    return Experience(observations, segments, segments, segments, rewards, terminals, mask=mask)


def test_moments_are_those_of_all_samples_together():
    random = np.random.default_rng(0)
    moments = Moments.none((3,), jnp.dtype("float64"))
    assert (moments.deviation == 1).all()
    samples = [1e3 + random.standard_normal((n, 3)) * [1, 10, 100] for n in (1, 50, 7)]
    weights = [random.random(len(x)) < 0.7 for x in samples]
    for x, weight in zip(samples, weights, strict=True):
        moments = moments.including(jnp.asarray(x), jnp.asarray(weight, float))
    moments = moments.including(jnp.full((4, 3), 5.0), jnp.zeros(4))  # none counts
    seen = np.concatenate(samples)[np.concatenate(weights)]
    assert moments.seen == len(seen)
    # Both divide sums of 40 numbers near 1000: 40 * 1.1e-16 = 5e-15, relative.
    np.testing.assert_allclose(moments.mean, seen.mean(0), rtol=1e-13)
    # Of a deviation of 1 around 1000 the squared differences keep ten digits.
    np.testing.assert_allclose(moments.variance, seen.var(0), rtol=1e-9)


def test_what_never_varies_is_only_shifted():
    moments = Moments.none((), jnp.dtype("float64"))
    moments = moments.including(jnp.full(9, 7.0), jnp.ones(9))
    assert moments.variance == 0 and moments.deviation == 1e-3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["default", "mlp", "lstm"])
def test_folding_is_normalising(kind):
    policy = (puffer_jax.MLP if kind == "mlp" else puffer_jax.Default)(
        ENV, rngs=nnx.Rngs(0), param_dtype=jnp.float64
    )
    if kind == "lstm":
        policy = puffer_jax.LSTMWrapper(ENV, policy, rngs=nnx.Rngs(1), param_dtype=jnp.float64)
    graphdef, params = puffer_jax.split(policy)
    x = 5 + 3 * np.random.default_rng(0).standard_normal((50, 3))
    moments = Moments.none((3,), jnp.dtype("float64")).including(jnp.asarray(x), jnp.ones(50))
    known = Normalization(moments, None, None)
    folded = puffer_jax.merge(graphdef, normalization.fold(graphdef, params, known))
    normal = (x - x.mean(0)) / x.std(0)
    ours, theirs = folded.forward_eval(x), policy.forward_eval(normal)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=EXACT, atol=EXACT)


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    """Two batches of two rounds of three agents, step by step as gymnasium's wrapper does it."""
    random = np.random.default_rng(0)
    known = Normalization(None, Moments.none((), jnp.dtype("float64")), jnp.zeros(3))
    running, returns = np.zeros(3), []
    for _ in range(2):
        rewards = random.standard_normal((6, 4))
        terminals = (random.random((6, 4)) < 0.3).astype(float)
        mask = random.random((6, 4)) < 0.8
        rewards[~mask], terminals[~mask] = 0, 0
        experience, known = normalization.normalize_rewards(
            batch(rewards, terminals, mask), known, GAMMA
        )
        for first in (0, 3):
            for t in range(4):
                rows = slice(first, first + 3)
                played = mask[rows, t]
                running = np.where(played, GAMMA, 1) * running + rewards[rows, t]
                returns += running[played].tolist()
                running = np.where(terminals[rows, t] > 0, 0, running)
        np.testing.assert_allclose(known.discounted, running, rtol=EXACT)
        np.testing.assert_allclose(known.returns.variance, np.var(returns), rtol=EXACT)
        np.testing.assert_allclose(experience.rewards, rewards / np.std(returns), rtol=EXACT)


def test_where_observations_are_normalised():
    def normalises(policy, choice):
        config = PuffeRLConfig(normalize_observations=choice)
        known = normalization.initial(config, policy, 4)
        return known is not None and known.observations is not None

    default = puffer_jax.Default(ENV, rngs=nnx.Rngs(0))
    assert normalises(default, True) and not normalises(default, False)
    assert not normalises(default, "auto")
    box = SimpleNamespace(observation_space=ENV.observation_space, action_space=Box(-1, 1, (2,)))
    assert normalises(puffer_jax.MLP(box, rngs=nnx.Rngs(0)), "auto")
    image = SimpleNamespace(
        observation_space=Box(0, 255, (4, 36, 36), np.uint8), action_space=Discrete(2)
    )
    policy = puffer_jax.Convolutional(image, rngs=nnx.Rngs(0))
    assert not normalises(policy, "auto")
    with pytest.raises(
        ValueError, match=r"by `input_layers\(\)` which Linear .* Convolutional does"
    ):
        normalises(policy, True)


@pytest.mark.usefixtures("rbg")
def test_the_saved_policy_takes_observations_as_they_come(tmp_path):
    env = puffer_jax.environments.make("cartpole")
    config = PuffeRLConfig.recommended(
        total_timesteps=512, num_envs=4, normalize_observations=True, data_dir=str(tmp_path)
    )
    trainer = puffer_jax.PuffeRL(config, env, puffer_jax.Default(env, rngs=nnx.Rngs(0)))
    for _ in range(3):
        trainer.run_epoch()
    known = trainer.state.normalization
    assert known.observations.seen == known.returns.seen == trainer.global_step
    raw = puffer_jax.merge(puffer_jax.split(trainer.policy)[0], trainer.state.params)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    moments = known.observations
    expected = raw((x - moments.mean) / moments.deviation)[0]
    np.testing.assert_allclose(trainer.policy(x)[0], expected, atol=1e-6)

    model = trainer.save_checkpoint()
    read = puffer_jax.policy_from_checkpoint(model)
    assert np.array_equal(read(x)[0], trainer.policy(x)[0])
    other = puffer_jax.PuffeRL(config, env, puffer_jax.Default(env, rngs=nnx.Rngs(1)))
    other.restore(model.parent)
    trainer.run_epoch()
    other.run_epoch()
    leaves = (jax.tree.leaves(each.state) for each in (trainer, other))
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
