"""Steps that were not played: they count for no schedule, and whatever they hold is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.bars import stub_env

import puffer_jax
from puffer_jax import ppo
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.spaces import Box, Discrete

pytestmark = pytest.mark.usefixtures("quick")

SEGMENTS, HORIZON = 8, 4
OPTIONS = {"bptt_horizon": HORIZON, "minibatch_size": 32, "optimizer": "adam"}


class Masked(puffer_jax.Default):
    """The observation says which actions are possible: of an absent agent's zeros, none."""

    def forward_eval(self, observations, state=None):
        logits, values = super().forward_eval(observations)
        return jnp.where(observations[:, :2] > 0, logits, -jnp.inf), values


def learner(**changes):
    config = PuffeRLConfig(total_timesteps=4 * SEGMENTS * HORIZON, **OPTIONS | changes)
    env = stub_env(Box(-1, 1, (2,), np.float32), Discrete(2))
    policy = Masked(env, 8, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    found = ppo.make_learner(config, config.sizes(SEGMENTS), policy)
    return found, found.init(puffer_jax.split(policy)[1])


def experience(mask, absent=1.0, filler=0.0):
    """What was not played has the observations `absent`, and `filler` for values and scores."""
    random, shape = np.random.default_rng(0), (SEGMENTS, HORIZON)
    return ppo.Experience(
        observations=np.where(mask[..., None], random.random((*shape, 2)) + 0.1, absent),
        actions=random.integers(2, size=shape),
        logprobs=np.where(mask, -0.7, filler),
        values=np.where(mask, random.standard_normal(shape), filler),
        rewards=np.where(mask, random.standard_normal(shape), 0),
        terminals=np.zeros(shape),
        mask=mask,
    )


ROWS = np.arange(SEGMENTS)[None]
HALF = np.random.default_rng(1).random((SEGMENTS, HORIZON)) < 0.5


@pytest.mark.parametrize("filler", [0.0, np.nan])
def test_what_was_not_played_may_be_no_number(filler):
    """An absent agent's zeros allow no action, so its logits are no numbers; nor is its value."""
    ours, state = learner()
    (whole, losses, _), (other, others, _) = (
        ours.update(state, batch, indices=ROWS)
        for batch in (experience(HALF), experience(HALF, 0.0, filler))
    )
    assert int(whole.nonfinite) == int(other.nonfinite) == 0
    # The same float64 sums over the same 17 or so steps; only XLA may order them differently.
    # Absolute where a loss is 0, and in parameters near 1 that Adam moved by 0.015.
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "importance"):
        np.testing.assert_allclose(losses[name], others[name], rtol=1e-12, atol=1e-15)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_a_single_step_has_no_deviation():
    mask = np.zeros((SEGMENTS, HORIZON), bool)
    mask[0, 1] = mask[7, 2] = True
    ours, state = learner()
    state, losses, _ = ours.update(state, experience(mask), indices=ROWS)
    assert int(state.nonfinite) == 0
    assert all(np.isfinite(losses[name]) for name in ("policy_loss", "value_loss", "entropy"))


def test_the_schedules_count_what_was_played_and_never_turn_back():
    ours, state = learner()
    update = jax.jit(lambda state, batch: ours.update(state, batch, indices=ROWS)[0])
    rates = []
    for mask in (HALF, ~HALF, *[np.ones_like(HALF)] * 6):
        rates.append(float(ours.schedule_epoch(state)))
        state = update(state, experience(mask))
    played = HALF.mean()
    np.testing.assert_allclose(rates, [0, played, 1, 2, 3, 4, 4, 4], rtol=1e-6)
    assert int(state.epoch) == 8

    # After so many epochs a float32 has no place for one step of 32; none is lost all the same.
    state = state._replace(unplayed=jnp.float32(2**20))
    for _ in range(4):
        state = update(state, experience(np.arange(32).reshape(8, 4) > 0))
    assert (float(state.unplayed), float(state.lost)) == (2**20 + 4 / 32, 0)
