"""Populations: members are the single runs, spread over eight devices and in turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.bars import relative_error

import puffer_jax
from puffer_jax.ppo.population import _turns

MEMBERS, BROKEN = 64, 5
CONFIG = puffer_jax.PuffeRLConfig.recommended(
    num_envs=4, bptt_horizon=8, total_timesteps=3 * 32, optimizer="adam", num_minibatches=2
)


def problem(dtype):
    """The environment, and what makes a policy for it."""
    env = puffer_jax.environments.make("probe_observation_action")
    return env, lambda rngs: puffer_jax.Default(env, 4, rngs=rngs, param_dtype=dtype)


def errors(ours, theirs):
    """Per array, relative to its largest number; what is not finite is so in both."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
        yield relative_error(np.nan_to_num(a), np.nan_to_num(b))


def compilations():
    """The names of the programs that are compiled from now on."""
    names = []

    def listen(event, duration, *, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


def test_members_on_eight_devices_in_two_turns_are_the_single_runs(unoptimised):
    """64 of them, one of which is broken."""
    mesh = jax.make_mesh((4, 2), ("hosts", "devices"))
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), MEMBERS)
    rates = np.geomspace(1e-4, 1e-2, MEMBERS)
    rates[BROKEN] = np.nan
    names = compilations()
    ours = puffer_jax.train_population(
        CONFIG,
        *problem(jnp.float64),
        keys,
        {"learning_rate": rates, "gamma": 0.9},
        mesh,
        at_once=60,
    )
    assert sum("member" in name for name in names) == 1, names
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(ours))
    assert {len(x) for x in jax.tree.leaves(ours)} == {MEMBERS}
    alone = jax.jit(puffer_jax.make_train(CONFIG, *problem(jnp.float64)))
    for i in range(MEMBERS):
        single = alone(keys[i], {"learning_rate": rates[i], "gamma": 0.9})
        # Other batches, so sums in another order, and Adam divides by gradients that may be small.
        # (Measured: 2e-16; 4e-8 in float32.)
        assert max(errors(jax.tree.map(lambda x, i=i: x[i], ours), single)) < 1e-12
    # What is not finite is in one member, whose updates were not applied.
    params, metrics = ours
    assert list(np.flatnonzero(metrics["nonfinite"][:, -1])) == [BROKEN]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("members", "devices", "at_once", "turns"),
    [
        (3, 1, None, [[0, 1, 2]]),
        (3, 2, None, [[0, 1, 2, 2]]),
        (5, 1, 2, [[0, 1], [2, 3], [4, 4]]),
        (6, 1, 4, [[0, 1, 2], [3, 4, 5]]),  # equal turns, rather than 4 and then 2 of 4
        (3, 2, 1, [[0, 1], [2, 2]]),
        (2, 4, 100, [[0, 1, 1, 1]]),
    ],
)
def test_turns(members, devices, at_once, turns):
    assert [turn.tolist() for turn in _turns(members, devices, at_once)] == turns


def test_what_is_wrong_with_a_population():
    keys = jax.random.split(jax.random.key(0), 2)

    def train(keys, *arguments, **options):
        puffer_jax.train_population(CONFIG, *problem(jnp.float32), keys, *arguments, **options)

    for wrong in (keys[0], keys[:0], keys[None]):
        with pytest.raises(ValueError, match=r"keys must be an array \(members,\)"):
            train(wrong)
    with pytest.raises(ValueError, match=r"\(2,\), one for each key; got gamma \(3,\)"):
        train(keys, {"gamma": [0.9, 0.8, 0.7]})
    with pytest.raises(ValueError, match="did you mean learning_rate"):
        train(keys, {"learning_rat": 1e-3})
    with pytest.raises(ValueError, match="at_once must be at least 1; got 0"):
        train(keys, at_once=0)
