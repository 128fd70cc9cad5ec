"""The update against the reference's `PuffeRL.train`, and identities it must satisfy."""

import copy
import math

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pufferlib.models
import pufferlib.pytorch
import pytest
import torch
from flax import nnx
from support.bars import relative_error, stub_env
from support.reference import torch_names, torch_precision, twin
from support.trainer import CONFIG, Reference, numpy_advantage

import puffer_jax
from puffer_jax import ppo
from puffer_jax.bench.torch_side import compiled_advantage
from puffer_jax.ppo.config import PuffeRLConfig

pytestmark = pytest.mark.usefixtures("quick")

SPACES = {
    "discrete": gymnasium.spaces.Discrete(3),
    "multidiscrete": gymnasium.spaces.MultiDiscrete([2, 4]),
    "continuous": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
}
OBSERVATION = gymnasium.spaces.Box(-1, 1, (5,), np.float32)
SEGMENTS, HORIZON = 16, 8


def build_theirs(kind: str, recurrent: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    env = stub_env(OBSERVATION, SPACES[kind])
    policy = pufferlib.models.Default(env, hidden_size=8)
    if recurrent:
        policy = pufferlib.models.LSTMWrapper(env, policy, input_size=8, hidden_size=8)
    return policy


def build_ours(kind: str, recurrent: bool, dtype: str):
    env = stub_env(OBSERVATION, SPACES[kind])
    options = {"rngs": nnx.Rngs(0), "param_dtype": jnp.dtype(dtype)}
    policy = puffer_jax.Default(env, hidden_size=8, **options)
    if recurrent:
        policy = puffer_jax.LSTMWrapper(env, policy, input_size=8, hidden_size=8, **options)
    return policy


def make_buffer(theirs, kind: str, dtype: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What a rollout of a policy near `theirs` might have left, in numbers that `dtype` has."""
    space = SPACES[kind]
    observations = rng.standard_normal((SEGMENTS, HORIZON, 5)).astype(np.float32)
    if kind == "discrete":
        actions = rng.integers(space.n, size=(SEGMENTS, HORIZON))
    elif kind == "multidiscrete":
        actions = rng.integers(space.nvec, size=(SEGMENTS, HORIZON, 2))
    else:
        actions = rng.standard_normal((SEGMENTS, HORIZON, 2)).astype(np.float32)
    with torch_precision("float64"), torch.no_grad():
        policy = copy.deepcopy(theirs).double()
        obs = torch.from_numpy(observations)
        if not hasattr(policy, "lstm"):
            obs = obs.reshape(-1, 5)
        logits, values = policy(obs.double(), {"lstm_h": None, "lstm_c": None})
        _, logprobs, _ = pufferlib.pytorch.sample_logits(logits, torch.from_numpy(actions))
    shape = SEGMENTS, HORIZON
    noise = rng.standard_normal((2, *shape))
    return {
        "observations": observations,
        "actions": actions,
        "logprobs": (logprobs.numpy().reshape(shape) + 0.2 * noise[0]).astype(dtype),
        "values": (values.numpy().reshape(shape) + 0.3 * noise[1]).astype(dtype),
        "rewards": rng.uniform(-1, 1, shape).astype(dtype),
        "terminals": (rng.random(shape) < 0.15).astype(dtype),
    }


def test_rows_drawn_with_replacement_and_a_rate_that_does_not_end_at_zero():
    ours = build_ours("discrete", False, "float64")
    changes = {"learning_rate": 1e-12, "update_epochs": 100, "sampling": "replacement"}
    config = PuffeRLConfig.from_dict(CONFIG | changes)
    sizes = config.sizes(SEGMENTS)
    learner = ppo.make_learner(config, sizes, ours)
    theirs = build_theirs("discrete", False)
    buffer = make_buffer(theirs, "discrete", "float64", np.random.default_rng(3))
    params = puffer_jax.split(ours)[1]
    end = learner.init(params)._replace(epoch=jnp.asarray(sizes.epochs))
    run = jax.jit(
        lambda ratio: learner.update(
            end, ppo.Experience(**buffer), jax.random.key(0), {"min_lr_ratio": ratio}
        )
    )
    state, _, details = run(0.0)
    rows, probs = np.asarray(details.indices)[20:], np.asarray(details.priorities)
    drawn = np.bincount(rows.ravel(), minlength=SEGMENTS)
    chi2 = ((drawn - probs * drawn.sum()) ** 2 / (probs * drawn.sum())).sum()
    assert chi2 < 45  # p = 1e-4 for 15 degrees of freedom is 44.3
    # Four independent draws are distinct with a chance of 4! times a symmetric polynomial.
    distinct = 24 * np.polynomial.polynomial.polyfromroots(-1 / probs)[4] * np.prod(probs)
    found = np.mean([len(set(row)) == 4 for row in rows.tolist()])
    assert abs(found - distinct) < 4 * math.sqrt(distinct * (1 - distinct) / len(rows))

    def moved(state):
        pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True)
        return max(float(jnp.abs(new - old).max()) for new, old in pairs)

    assert moved(state) == 0 < moved(run(0.5)[0])


def draw(rng: np.random.Generator, minibatches: int, rows: int) -> np.ndarray:
    return np.stack([rng.permutation(SEGMENTS)[:rows] for _ in range(minibatches)])


def lockstep(kind: str, recurrent: bool, dtype: str, updates: int, **changes):
    """Both sides through the same updates; the last one's results, ours under torch's names."""
    theirs = build_theirs(kind, recurrent)
    config = PuffeRLConfig.from_dict(CONFIG | changes)
    ours = twin(theirs, lambda dtype: build_ours(kind, recurrent, dtype), dtype)
    sizes = config.sizes(SEGMENTS)
    learner = ppo.make_learner(config, sizes, ours)
    graphdef, params = puffer_jax.split(ours)
    state = learner.init(params)
    update = jax.jit(lambda s, e, i: learner.update(s, e, indices=i))
    start = copy.deepcopy(theirs)
    # In float64 whatever ours is in: float32's order of sums is the processor's.
    reference = Reference(theirs, (OBSERVATION, SPACES[kind]), "float64", **changes)
    if config.optimizer == "muon":  # its momentum is float32 otherwise, whatever the parameters
        reference.trainer.optimizer.param_groups[0]["storage_dtype"] = "float64"
    rng = np.random.default_rng(1)
    for _ in range(updates):
        buffer = make_buffer(start, kind, dtype, rng)
        indices = draw(rng, sizes.minibatches, sizes.minibatch_segments)
        expected = reference.train(buffer, indices)
        state, losses, details = update(state, ppo.Experience(**buffer), indices)
    found = {
        "losses": {name: float(value) for name, value in losses.items()},
        "ratio": details.ratio,
        "values": details.values,
        "priorities": details.priorities,
    }
    trainer = reference.trainer
    names = [name for name, _ in trainer.policy.named_parameters()]
    expected["params"] = {n: p.detach().numpy() for n, p in trainer.policy.named_parameters()}
    found["params"] = torch_names(graphdef, state.params)
    if config.optimizer == "adam":
        moments = [trainer.optimizer.state[p] for p in trainer.policy.parameters()]
        adam = state.opt_state[1]
        for ours_name, theirs_name in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
            found[ours_name] = torch_names(graphdef, getattr(adam, ours_name))
            expected[ours_name] = {
                n: m[theirs_name].numpy() for n, m in zip(names, moments, strict=True)
            }
    return found, expected, state


def assert_same(found, expected, bar: float) -> float:
    worst = 0.0
    for name, theirs in expected.items():
        if name == "learning_rate":
            continue
        pairs = theirs.items() if isinstance(theirs, dict) else [(name, theirs)]
        assert set(found[name]) == set(theirs) if isinstance(theirs, dict) else True
        for key, value in pairs:
            ours = found[name][key] if isinstance(theirs, dict) else found[name]
            error = relative_error(ours, value)
            worst = max(worst, error)
            assert error <= bar, (name, key, error)
    return worst


@pytest.mark.parametrize("recurrent", [False, True], ids=["default", "lstm"])
@pytest.mark.parametrize("kind", SPACES)
def test_one_update_is_the_references(kind, recurrent):
    found, expected, state = lockstep(kind, recurrent, "float64", 1)
    assert_same(found, expected, 1e-12)
    assert int(state.epoch) == 1 and int(state.nonfinite) == 0 and int(state.culprit) == -1


@pytest.mark.parametrize("recurrent", [False, True], ids=["default", "lstm"])
def test_a_hundred_updates_in_lockstep(recurrent):
    kind = "multidiscrete" if recurrent else "continuous"
    found, expected, _ = lockstep(kind, recurrent, "float64", 100)
    assert_same(found, expected, 1e-9)


def test_muon_in_lockstep():
    found, expected, _ = lockstep("discrete", True, "float64", 10, optimizer="muon")
    assert_same(found, expected, 1e-11)


def test_one_update_in_float32():
    found, expected, _ = lockstep("discrete", True, "float32", 1)
    arrays = jax.tree.leaves([found[name] for name in ("values", "params", "mu", "nu")])
    assert {x.dtype for x in arrays} == {np.dtype("float32")}
    # Moments are sums of gradients, whose own bar is 2e-5, and of their squares.
    bars = dict.fromkeys(("losses", "ratio", "values", "priorities", "params"), 1e-5)
    for name, bar in (bars | {"mu": 2e-5, "nu": 4e-5}).items():
        assert_same({name: found[name]}, {name: expected[name]}, bar)


def test_accumulated_gradients_add_up():
    changes = {"minibatch_size": 64, "max_minibatch_size": 32, "anneal_lr": False}
    found, expected, _ = lockstep("discrete", False, "float64", 3, **changes)
    assert_same(found, expected, 1e-11)
    theirs = build_theirs("discrete", False)
    ours = twin(theirs, lambda dtype: build_ours("discrete", False, dtype), "float64")
    config = PuffeRLConfig.from_dict(CONFIG | changes | {"mean_accumulate": True})
    small = CONFIG | changes | {"max_grad_norm": 1e9, "optimizer": "adam"}
    # With no clipping, Adam's first moments of the mean are half those of the sum.
    rng = np.random.default_rng(1)
    buffer = make_buffer(theirs, "discrete", "float64", rng)
    indices = draw(rng, 4, 4)[:2]
    moments = []
    for option in (False, True):
        config = PuffeRLConfig.from_dict(small | {"mean_accumulate": option, "update_epochs": 0.5})
        learner = ppo.make_learner(config, config.sizes(SEGMENTS), ours)
        state, _, _ = learner.update(
            learner.init(puffer_jax.split(ours)[1]), ppo.Experience(**buffer), indices=indices
        )
        moments.append(state.opt_state[1].mu)
    summed, mean = map(jax.tree.leaves, moments)
    assert len(summed) == len(mean) == 6  # three layers, weight and bias
    for s, m in zip(summed, mean, strict=True):
        assert np.abs(s).max() > 0
        # Two minibatches' gradients: summed and scaled, or the other way round.
        np.testing.assert_allclose(m, s / 2, rtol=1e-12, equal_nan=False)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_advantage_is_the_original_loop(dtype):
    rng = np.random.default_rng(0)
    shape = (6, 11)
    values, rewards = rng.standard_normal((2, *shape)).astype(dtype)
    terminals = (rng.random(shape) < 0.2).astype(dtype)
    ratio = np.exp(0.5 * rng.standard_normal(shape)).astype(dtype)
    numbers = (0.97, 0.9, 1.1, 0.8)
    names = ("gamma", "gae_lambda", "vtrace_rho_clip", "vtrace_c_clip")
    ours = ppo.puff_advantage(
        values, rewards, terminals, ratio, **dict(zip(names, numbers, strict=True))
    )
    wide = (x.astype(np.float64) for x in (values, rewards, terminals, ratio))
    exact = numpy_advantage(*wide, *numbers)
    assert ours.dtype == dtype
    assert relative_error(ours, exact) <= {"float64": 1e-14, "float32": 1e-6}[dtype]
    if dtype == "float32":  # the formula is the one of the loop itself, which has float32 only
        loop = compiled_advantage()(values, rewards, terminals, ratio, *numbers)
        assert relative_error(loop, exact) <= 1e-6
    assert not np.asarray(ours[:, -1]).any()


def test_with_lambda_one_returns_are_discounted_sums():
    rng = np.random.default_rng(0)
    values, rewards = rng.standard_normal((2, 3, 9))
    terminals, gamma = np.zeros((3, 9)), 0.9
    advantages = ppo.puff_advantage(
        values,
        rewards,
        terminals,
        np.ones((3, 9)),
        gamma=gamma,
        gae_lambda=1.0,
        vtrace_rho_clip=1.0,
        vtrace_c_clip=1.0,
    )
    for t in range(8):
        left = 8 - t
        powers = gamma ** np.arange(left)
        discounted = rewards[:, t + 1 :] @ powers + gamma**left * values[:, -1]
        np.testing.assert_allclose(
            advantages[:, t] + values[:, t], discounted, rtol=1e-12, equal_nan=False
        )


def test_masked_steps_change_nothing():
    """A row with masked steps learns as if they held anything else."""
    theirs = build_theirs("discrete", False)
    ours = twin(theirs, lambda dtype: build_ours("discrete", False, dtype), "float64")
    config = PuffeRLConfig.from_dict(CONFIG | {"minibatch_size": 128})
    learner = ppo.make_learner(config, config.sizes(SEGMENTS), ours)
    buffer = make_buffer(theirs, "discrete", "float64", np.random.default_rng(3))
    # The observation at an episode's end is not acted on.
    mask = buffer["terminals"] == 0
    params = puffer_jax.split(ours)[1]
    results = []
    for fill in (0.0, 7.0):
        played = buffer | {"observations": buffer["observations"].copy()}
        played["logprobs"] = np.where(mask, buffer["logprobs"], -fill)
        played["values"] = np.where(mask, buffer["values"], fill)
        played["observations"][~mask] = fill
        state, losses, _ = learner.update(
            learner.init(params),
            ppo.Experience(**played, mask=mask),
            indices=np.arange(SEGMENTS)[None],
        )
        del losses["explained_variance"]  # of all steps, as in the reference
        results.append((state.params, losses))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, equal_nan=False), *results
    )


@pytest.mark.parametrize("on_nonfinite", ["skip", "ignore"])
def test_a_bad_minibatch_is_counted_and_left_out(on_nonfinite):
    theirs = build_theirs("discrete", False)
    ours = twin(theirs, lambda dtype: build_ours("discrete", False, dtype), "float64")
    config = PuffeRLConfig.from_dict(CONFIG | {"on_nonfinite": on_nonfinite})
    learner = ppo.make_learner(config, config.sizes(SEGMENTS), ours)
    buffer = make_buffer(theirs, "discrete", "float64", np.random.default_rng(3))
    buffer["logprobs"][2, 3] = np.nan
    indices = np.arange(SEGMENTS).reshape(4, 4)  # the bad row is in the first minibatch
    params = puffer_jax.split(ours)[1]
    state, _, details = learner.update(
        learner.init(params), ppo.Experience(**buffer), indices=indices
    )
    finite = all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert finite == (on_nonfinite != "ignore")
    assert learner.names[int(state.culprit)] == "log-probabilities"
    if on_nonfinite != "ignore":
        assert int(state.nonfinite) == 1
        np.testing.assert_array_equal(details.ratio[:4], 1)  # nothing of it was written back
        assert int(state.opt_state[1].count) == 3


def test_rows_of_a_minibatch_are_distinct_and_drawn_by_priority():
    theirs = build_theirs("discrete", False)
    ours = twin(theirs, lambda dtype: build_ours("discrete", False, dtype), "float64")
    changes = {"learning_rate": 1e-12, "minibatch_size": 8, "update_epochs": 100}
    config = PuffeRLConfig.from_dict(CONFIG | changes)
    learner = ppo.make_learner(config, config.sizes(SEGMENTS), ours)
    buffer = make_buffer(theirs, "discrete", "float64", np.random.default_rng(3))
    _, _, details = jax.jit(learner.update)(
        learner.init(puffer_jax.split(ours)[1]), ppo.Experience(**buffer), jax.random.key(0)
    )
    # One row a minibatch: 1,600 draws of values and ratios that end after the first few.
    drawn = np.bincount(np.asarray(details.indices).ravel()[200:], minlength=SEGMENTS)
    expected = np.asarray(details.priorities) * drawn.sum()
    chi2 = ((drawn - expected) ** 2 / expected).sum()
    assert chi2 < 45  # p = 1e-4 for 15 degrees of freedom is 44.3
    config = PuffeRLConfig.from_dict(CONFIG)
    learner = ppo.make_learner(config, config.sizes(SEGMENTS), ours)
    _, _, details = jax.jit(learner.update)(
        learner.init(puffer_jax.split(ours)[1]), ppo.Experience(**buffer), jax.random.key(0)
    )
    assert all(len(set(rows)) == 4 for rows in np.asarray(details.indices).tolist())


def test_recomputed_advantages_are_those_of_the_present_ratio():
    theirs = build_theirs("discrete", False)
    ours = twin(theirs, lambda dtype: build_ours("discrete", False, dtype), "float64")
    buffer = make_buffer(theirs, "discrete", "float64", np.random.default_rng(3))
    batch = jax.tree.map(jnp.asarray, ppo.Experience(**buffer))
    hypers, weights = PuffeRLConfig.from_dict(CONFIG).hypers(), jnp.ones((SEGMENTS, 1))
    stale = ppo.advantage_of(batch, jnp.ones_like(batch.values), hypers)
    _, metrics = ppo.loss(ours, batch, stale, weights, hypers, True)
    names = ("gamma", "gae_lambda", "vtrace_rho_clip", "vtrace_c_clip")
    arrays = (
        buffer["values"],
        buffer["rewards"],
        buffer["terminals"],
        np.asarray(metrics["ratio"]),
    )
    fresh = jnp.asarray(numpy_advantage(*arrays, *(hypers[name] for name in names)))
    _, expected = ppo.loss(ours, batch, fresh, weights, hypers)
    _, kept = ppo.loss(ours, batch, stale, weights, hypers)
    assert relative_error(metrics["policy_loss"], expected["policy_loss"]) <= 1e-12
    assert relative_error(kept["policy_loss"], expected["policy_loss"]) > 1e-3
    # The targets of the values stay those of the whole batch.
    assert relative_error(metrics["value_loss"], kept["value_loss"]) <= 1e-15


def gae_loop(buffer, gamma, lam):
    """Generalised advantages, step by step; the last step's is 0."""
    rewards, values = buffer["rewards"], buffer["values"]
    result = np.zeros_like(values)
    for t in reversed(range(HORIZON - 1)):
        alive = 1 - buffer["terminals"][:, t + 1]
        delta = rewards[:, t + 1] + gamma * alive * values[:, t + 1] - values[:, t]
        result[:, t] = delta + gamma * lam * alive * result[:, t + 1]
    return result


@pytest.mark.parametrize("recurrent", [False, True])
def test_gae_is_computed_once_and_the_update_is_the_original_ppos(recurrent):
    """Two passes at a rate that moves the policy, against torch with advantages from a loop."""
    theirs = build_theirs("discrete", recurrent).double()
    ours = twin(theirs, lambda dtype: build_ours("discrete", recurrent, dtype), "float64")
    buffer = make_buffer(theirs, "discrete", "float64", np.random.default_rng(3))
    changes = {"advantage": "gae", "optimizer": "adam", "update_epochs": 2, "learning_rate": 0.01}
    # Bounds that V-trace would feel.
    changes |= {"sampling": "shuffled", "anneal_lr": False, "vtrace_rho_clip": 0.5}
    config = PuffeRLConfig.from_dict(CONFIG | changes)
    learner = ppo.make_learner(config, config.sizes(SEGMENTS), ours)
    graphdef, params = puffer_jax.split(ours)
    state, losses, details = jax.jit(learner.update)(
        learner.init(params), ppo.Experience(**buffer), jax.random.key(0)
    )
    rows = np.asarray(details.indices)
    count = SEGMENTS if recurrent else SEGMENTS * HORIZON  # steps, or segments if need be
    for order in rows.reshape(2, -1):  # each pass has every one once
        assert sorted(order) == list(range(count))
    assert not np.array_equal(*rows.reshape(2, -1))

    hypers = config.hypers()
    advantages = gae_loop(buffer, hypers["gamma"], hypers["gae_lambda"])
    assert relative_error(details.advantages, advantages) <= 1e-14
    optimizer = torch.optim.Adam(
        theirs.parameters(), hypers["learning_rate"],
        (hypers["adam_beta1"], hypers["adam_beta2"]), hypers["adam_eps"],
    )  # fmt: skip
    arrays = buffer | {"advantages": advantages}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if not recurrent:
        tensors = {name: tensor.flatten(0, 1)[:, None] for name, tensor in tensors.items()}
    with torch_precision("float64"):
        for minibatch in rows.tolist():
            part = {name: tensor[minibatch] for name, tensor in tensors.items()}
            target, observations = part["advantages"], part["observations"].double()
            scaled = (target - target.mean()) / (target.std() + 1e-8)
            zeros = [{"lstm_h": None, "lstm_c": None}] if recurrent else []
            logits, values = theirs(observations if recurrent else observations[:, 0], *zeros)
            _, logprobs, entropy = pufferlib.pytorch.sample_logits(logits, part["actions"])
            ratio = (logprobs.reshape(part["logprobs"].shape) - part["logprobs"]).exp()
            clip, bound = hypers["clip_coef"], hypers["vf_clip_coef"]
            gain = torch.min(scaled * ratio, scaled * ratio.clip(1 - clip, 1 + clip))
            old, new = part["values"], values.reshape(part["values"].shape)
            near = old + (new - old).clip(-bound, bound)
            error = torch.max((new - old - target) ** 2, (near - old - target) ** 2)
            total = -gain.mean() + hypers["vf_coef"] * 0.5 * error.mean()
            total = total - hypers["ent_coef"] * entropy.mean()
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), hypers["max_grad_norm"])
            optimizer.step()
    expected = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    assert_same({"params": torch_names(graphdef, state.params)}, {"params": expected}, 1e-10)
    returns = advantages + buffer["values"]
    explained = 1 - advantages.var(ddof=1) / returns.var(ddof=1)
    assert relative_error(losses["explained_variance"], explained) <= 1e-12


def test_recomputing_advantages_that_are_computed_once_is_an_error():
    with pytest.raises(ValueError, match="recompute_advantage needs 'vtrace'; got advantage 'gae'"):
        PuffeRLConfig(advantage="gae", recompute_advantage=True)


def test_key_or_indices():
    config = PuffeRLConfig.from_dict(CONFIG)
    policy = build_ours("discrete", False, "float32")
    learner = ppo.make_learner(config, config.sizes(SEGMENTS), policy)
    with pytest.raises(ValueError, match="key or the indices"):
        learner.update(learner.init(puffer_jax.split(policy)[1]), ppo.Experience(*[0.0] * 6))
