"""Training on eight devices is training on one; conftest.py makes them of the CPU."""

import functools
import re

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from support.bars import BARS, relative_error

import puffer_jax
from puffer_jax import PuffeRL, PuffeRLConfig, ppo
from puffer_jax.environments.cartpole import CartPole
from puffer_jax.kernels.choice import use
from puffer_jax.nn.random import Rows, split
from puffer_jax.ppo.devices import ALIKE, AXIS, DIVIDED, checked, on_each, share_of
from puffer_jax.ppo.jax_rollout import JaxSource

pytestmark = pytest.mark.usefixtures("unoptimised")

COLLECTIVE = re.compile(
    r"= \S.* (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\("
)
# Devices sum in another order, some epsilons a step: the design's bar of new parameters.
UPDATE = BARS["update"]["float64"]
SIZES = {"num_envs": 16, "bptt_horizon": 4, "total_timesteps": 64 * 100}

# What PufferLib does, and what we recommend; rounds, resets, truncation, and normalisation.
OPTIONS = {
    "pufferlib": {"batch_size": 128, "minibatch_size": 128, "learning_rate": 0.05},
    "recommended": {
        **PuffeRLConfig.recommended().__dict__,
        **{"num_minibatches": 1, "update_epochs": 2.0, "normalize_observations": True},
    },
}


def build(devices, folder, options, lstm=True, env=None, dtype="float64", **more):
    env = env or CartPole(max_steps=9, dtype=jnp.float64)
    new = {"rngs": nnx.Rngs(0), "param_dtype": jnp.dtype(dtype)}
    policy = puffer_jax.Default(env, hidden_size=4, **new)
    if lstm:
        policy = puffer_jax.LSTMWrapper(env, policy, input_size=4, hidden_size=4, **new)
    config = PuffeRLConfig.from_dict({**options, **SIZES, **more, "data_dir": str(folder)})
    mesh = None if devices is None else puffer_jax.mesh(devices)
    return PuffeRL(config, env, policy, mesh=mesh)


def apart(trainer, other):
    """The largest difference between parameters and optimiser, and that of the losses."""
    found = []
    for state, theirs in zip(*map(jax.tree.leaves, (trainer.state, other.state)), strict=True):
        found.append(np.abs(np.asarray(state) - np.asarray(theirs)).max(initial=0))
    losses = trainer._new_losses
    assert losses.keys() == other._new_losses.keys()
    return max(found), relative_error(list(losses.values()), list(other._new_losses.values()))


def collectives(program, *arguments):
    """The lines of a compiled program with a collective, in its loops and outside."""
    text = program.lower(*arguments).compile().as_text()
    lines = [line for line in text.splitlines() if COLLECTIVE.search(line)]
    inside = [line for line in lines if "/while/" in line]
    return len(inside), len(lines) - len(inside)


@pytest.mark.parametrize(
    ("name", "counts", "lstm"), [("pufferlib", (1, 8), True), ("recommended", (8,), False)]
)
def test_eight_devices_are_one(name, counts, lstm, tmp_path):
    """With the whole batch as the minibatch, over 20 updates, in float64."""
    # The running returns are float32, whatever the policy: see below.
    options = OPTIONS[name] | {"normalize_rewards": False}
    one, *many = (build(count, tmp_path, options, lstm) for count in (None, *counts))
    for _ in range(20 if name == "pufferlib" else 10):
        for trainer in (one, *many):
            trainer.log_seconds = 1e9
            trainer.run_epoch()
            assert trainer.global_step == one.global_step
    ended = {len(trainer.stats["episode_return"]) for trainer in (one, *many)}
    assert len(ended) == 1 and ended.pop() > 50
    for trainer in many:
        difference, losses = apart(trainer, one)
        # Sums in another order: some epsilons, which 20 updates multiply.
        assert difference <= 1e-12 and losses <= 1e-10, trainer.loop.mesh
        assert trainer.loop.programs["epoch"]._cache_size() == 1
        for leaf in jax.tree.leaves(trainer.state.params):
            shards = [np.asarray(x.data) for x in leaf.addressable_shards]
            assert all(np.array_equal(shard, shards[0]) for shard in shards)
    if name != "pufferlib":
        return
    eight = many[-1].loop
    keys = eight.key, eight.key
    inside, _ = collectives(eight.programs["epoch"], eight.state, eight.stream, keys)
    assert inside == 2  # before the loss, and after it
    given = eight.acting(), eight.stream, eight.key
    # A rollout has none; what is reported of it, two numbers of two dtypes, is summed at its end.
    assert collectives(eight.programs["collect"], *given) == (0, 2)


def test_environments_on_the_host(tmp_path):
    """In rounds, with truncation, and the running returns of agents on their devices."""
    more = OPTIONS["recommended"] | {"batch_size": 64, "num_envs": None, "update_epochs": 1.0}
    trainers = []
    for devices in (None, 8):
        makers = [lambda: gymnasium.make("CartPole-v1", max_episode_steps=9)] * 8
        env = gymnasium.vector.SyncVectorEnv(makers)
        more["total_timesteps"] = 64 * 100
        trainers.append(build(devices, tmp_path, more, env=env))
    one, eight = trainers
    for _ in range(3):
        one.run_epoch()
        eight.evaluate()
        spec = eight.experience.observations.sharding.spec
        eight.train()
    assert eight.global_step == one.global_step and one.global_step < 3 * 64  # not all is played
    assert spec == DIVIDED
    difference, losses = apart(eight, one)
    # Sums in another order: some epsilons of the running returns, which are float32.
    assert difference <= 1e-5 and losses <= 1e-5
    assert eight.loop.source.step._cache_size() == 1
    assert eight.loop.programs["update"]._cache_size() == 1
    for trainer in trainers:
        trainer.close()


def experience(rng):
    """Two segments a device, of which one step in five was not played."""
    shape = 16, 4
    mask = rng.random(shape) < 0.8
    mask[:, 0] = True
    numbers = {name: rng.standard_normal(shape) for name in ("logprobs", "values", "rewards")}
    return ppo.Experience(
        observations=rng.standard_normal((*shape, 4)).astype(np.float32),
        actions=rng.integers(2, size=shape),
        terminals=(rng.random(shape) < 0.1).astype(float),
        starts=rng.random(shape) < 0.1,
        mask=mask,
        **numbers,
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_accumulated_minibatches_of_given_rows(quick, recompute):
    """Masks, priorities, advantages computed anew; what cannot be the same is which rows come."""
    rng = np.random.default_rng(0)
    env = CartPole()
    policy = puffer_jax.Default(env, hidden_size=4, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    values = {"batch_size": 64, "bptt_horizon": 4, "minibatch_size": 64, "max_minibatch_size": 32}
    values |= {"update_epochs": 3.0, "use_mask": True, "recompute_advantage": recompute}
    values |= {"on_nonfinite": "skip", "normalize_observations": True, "optimizer": "adam"}
    config = PuffeRLConfig(**values)
    mesh = puffer_jax.mesh(8)
    learners = [
        ppo.make_learner(config, config.sizes(16, devices=count), policy, share)
        for count, share in ((1, share_of(None)), (8, share_of(mesh)))
    ]
    state = learners[0].init(puffer_jax.split(policy)[1])
    takes, gives = (ALIKE, DIVIDED, PartitionSpec(None, AXIS)), (ALIKE, ALIKE)

    def update(learner, *arguments):
        return learner.update(*arguments[:2], indices=arguments[2])[:2]

    one = on_each(None, functools.partial(update, learners[0]), None, None)
    eight = on_each(mesh, functools.partial(update, learners[1]), takes, gives)
    batch = experience(rng)
    # In each minibatch one of each device's two segments.
    own = rng.integers(2, size=(6, 8))
    whole = own + 2 * np.arange(8)
    expected, found = one(state, batch, whole), eight(state, batch, own)
    for theirs, ours in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        assert relative_error(ours, theirs) <= UPDATE
    assert int(found[0].nonfinite) == 0
    if recompute:
        # For two minibatches in a step, some of which XLA joins.
        assert collectives(eight, state, batch, own)[0] <= 2 * 2
    # What one device finds, all know.
    batch.logprobs[5, 2], batch.mask[5, 2] = np.nan, True
    expected, found = (f(state, batch, x)[0] for f, x in ((one, whole), (eight, own)))
    assert int(found.nonfinite) == int(expected.nonfinite) > 0
    assert int(found.culprit) == int(expected.culprit) >= 0
    for theirs, ours in zip(*(jax.tree.leaves(s.params) for s in (expected, found)), strict=True):
        assert relative_error(ours, theirs) <= UPDATE


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("kernels", ["cpu", "xla"])
def test_rows_are_drawn_as_in_the_whole(implementation, kernels):
    """And so does each device for its agents, whatever their number."""
    rng = np.random.default_rng(0)
    key = jax.random.key(7, impl=implementation)
    logits = [jnp.asarray(rng.standard_normal((24, n)), jnp.float32) for n in (3, 5)]
    normal = puffer_jax.Normal(logits[0], jnp.ones_like(logits[0]))
    tanh = puffer_jax.TanhNormal(normal.loc, normal.scale)
    kinds = logits[0], logits, normal, tanh

    def draw(kinds, rows, count):
        keys = jax.random.key_data(split(key, count, rows))
        return [puffer_jax.sample_logits(x, key=key, rows=rows) for x in kinds], keys

    with use(kernels):
        whole = jax.jit(lambda: draw(kinds, None, 24))()
        part = jax.tree.map(lambda x: x[6:14], kinds)
        some = jax.jit(lambda first: draw(part, Rows(first, 24), 8))(6)
    for all_rows, rows in zip(*map(jax.tree.leaves, (whole, some)), strict=True):
        if jnp.issubdtype(rows.dtype, jnp.floating):
            # exp and log of few numbers may be the scalar ones, which round otherwise
            np.testing.assert_allclose(all_rows[6:14], rows, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(all_rows[6:14], rows)
    assert np.array_equal(whole[1], jax.random.key_data(jax.random.split(key, 24)))


def test_restored_on_other_devices(tmp_path):
    """Bit for bit, and nothing is compiled again; not with rbg, whose `vmap` is not by agent."""
    options = OPTIONS["recommended"] | {"checkpoint_interval": 2, "normalize_rewards": False}
    eight = build(8, tmp_path, options, lstm=False)
    for _ in range(2):
        eight.run_epoch()
    kept = jax.device_get(jax.tree.map(_words, eight.loop.saved()))
    eight.run_epoch()
    end = jax.device_get(eight.state.params)
    eight.restore(epoch=2)
    eight.run_epoch()
    for before, after in zip(*map(jax.tree.leaves, (end, eight.state.params)), strict=True):
        np.testing.assert_array_equal(before, after)
    assert eight.loop.programs["epoch"]._cache_size() == 1
    for devices in (None, 2):
        other = build(devices, tmp_path / "other", options, lstm=False)
        other.restore(eight.run_folder, epoch=2)
        found = jax.tree.map(_words, other.loop.saved())
        for before, after in zip(*map(jax.tree.leaves, (kept, found)), strict=True):
            np.testing.assert_array_equal(before, after)
    other.run_epoch()  # two devices go on like eight
    for before, after in zip(*map(jax.tree.leaves, (end, other.state.params)), strict=True):
        assert relative_error(after, before) <= UPDATE
    obs = np.zeros((3, 4), np.float32)
    path = eight.close()
    loaded = puffer_jax.policy_from_checkpoint(path)
    # It is loaded in float32.
    np.testing.assert_allclose(loaded(obs)[0], eight.policy(obs)[0], rtol=1e-5)
    assert len(eight.policy(obs)[0].devices()) == 1


def _words(leaf):
    typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if typed else leaf


@pytest.mark.parametrize(
    ("values", "agents", "message"),
    [
        ({"num_envs": 12}, None, "num_envs 12 cannot be divided among 8 devices; nearest: 8 or 16"),
        ({"minibatch_size": 80, "bptt_horizon": 8}, 16, "on 8 devices; nearest: 64 or 128"),
        ({"bptt_horizon": 8}, 20, "20 agents .* nearest: 16 or 24"),
    ],
)
def test_sizes_that_cannot_be_divided(values, agents, message):
    config = PuffeRLConfig(**values)
    with pytest.raises(ValueError, match=message):
        if agents is None:
            env = puffer_jax.as_jax_env(CartPole())
            policy = puffer_jax.Default(CartPole(), rngs=nnx.Rngs(0))
            JaxSource(config, env, policy, share_of(puffer_jax.mesh(8)))
        else:
            config.sizes(agents, devices=8)


def test_sizes_are_chosen_so_that_they_can_be_divided():
    config = PuffeRLConfig.recommended(bptt_horizon=8)
    sizes = config.sizes(24, devices=8)
    assert sizes.minibatch_segments == 8 and sizes.minibatches == 3 * 4
    assert config.sizes(24).minibatch_segments == 3
    assert config.sizes(24).coarser is None and config.sizes(64, devices=8).coarser is None
    assert "minibatches of 64; on one device there would be 32 in each" in (sizes.coarser or "")


def test_meshes():
    assert puffer_jax.mesh().size == 8 and puffer_jax.mesh(2).size == 2
    assert puffer_jax.mesh(jax.devices()[3:5]).devices.tolist() == jax.devices()[3:5]
    with pytest.raises(ValueError, match="devices is 9; there are 1 to 8"):
        puffer_jax.mesh(9)
    with pytest.raises(ValueError, match="different"):
        puffer_jax.mesh([jax.devices()[0]] * 2)
    with pytest.raises(TypeError, match=r"puffer_jax\.mesh"):
        checked(8)
    with pytest.raises(ValueError, match="one axis 'data'"):
        checked(jax.sharding.Mesh(jax.devices(), ("model",)))
