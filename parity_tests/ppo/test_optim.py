"""The optimizers against torch's and heavyball's own classes, update by update."""

import functools
import math
import warnings
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from support.bars import BFLOAT16, relative_error, stub_env

import puffer_jax
from puffer_jax.nn.torch_layout import torch_layout
from puffer_jax.ppo import optimizers

with warnings.catch_warnings():  # heavyball's import appends filters of its own
    import heavyball
    import heavyball.utils

pytestmark = pytest.mark.usefixtures("unoptimised")

STEPS = 100
LEARNING_RATE, MAX_NORM, BETA1, BETA2, EPS = 0.015, 3.0, 0.95, 0.999, 1e-12


class Zoo(nnx.Module):
    """What the policies lack: 4-D, square, three tensors in one, a scalar, a single column."""

    def __init__(self, *, rngs, param_dtype):
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.conv = nnx.Conv(3, 4, (2, 3), **options)
        self.square = nnx.Linear(5, 5, **options)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, **options)
        self.column = nnx.Linear(1, 3, **options)
        self.norm = nnx.LayerNorm(3, **options)
        self.temperature = nnx.Param(jnp.ones((), param_dtype))


def structure(name):
    """A policy without values: initialisers cost seconds of compilation."""

    def build():
        options = {"rngs": nnx.Rngs(0), "param_dtype": jnp.float32}
        if name == "linear":
            return nnx.Linear(3, 2, **options)
        if name == "zoo":
            return Zoo(**options)
        env = stub_env(gymnasium.spaces.Box(-1, 1, (7,)), gymnasium.spaces.Box(-1, 1, (2,)))
        return puffer_jax.LSTMWrapper(env, puffer_jax.Default(env, 3, **options), 3, 3, **options)

    return nnx.eval_shape(build)


@functools.cache
def setting(name, dtype="float64"):
    """Parameters, the layout's functions, and STEPS gradients, some above the clip norm."""
    policy = structure(name)
    rng = np.random.default_rng(0)
    scales = np.geomspace(0.03, 3, STEPS)[rng.permutation(STEPS)]

    def gradients(leaf):
        columns = [scale * rng.normal(size=leaf.shape) for scale in scales]
        # float32 values in both precisions, so that they can be compared with each other
        return np.array(columns, np.float32).astype(dtype)

    shapes = puffer_jax.split(policy)[1]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), shapes)
    return params, torch_layout(policy), jax.tree.map(gradients, shapes)


@functools.cache
def torch_gradients(name):
    _, (to_torch, _), tree = setting(name)
    return [to_torch(jax.tree.map(lambda g, i=i: g[i], tree)) for i in range(STEPS)]


RATES = LEARNING_RATE * np.linspace(1, 0.5, STEPS)


def hyper_parameters(rate, eps=EPS):
    names = ("learning_rate", "max_grad_norm", "beta1", "beta2", "eps")
    return dict(zip(names, (rate, MAX_NORM, BETA1, BETA2, eps), strict=True))


@functools.cache
def runner(policy, dtype, optimizer):
    """A compiled scan over steps; the transformation is rebuilt in each of them."""
    params, layout, _ = setting(policy, dtype)

    def make(rate, eps):
        if optimizer == "bfloat16 muon":
            return optimizers.muon(rate, BETA1, *layout, newton_schulz_dtype=jnp.bfloat16)
        return optimizers.make(optimizer, *layout, **hyper_parameters(rate, eps))

    @jax.jit
    def run(gradients, rates, eps):
        def step(state, inputs):
            rate, gradient = inputs
            updates: Any
            updates, state = make(rate, eps).update(gradient, state)
            return state, layout[0](updates)

        return jax.lax.scan(step, make(0.5, eps).init(params), (rates, gradients))[1]

    return run


def our_updates(policy, optimizer, dtype="float64", eps=EPS):
    """Torch name -> the update of every step."""
    gradients = setting(policy, dtype)[2]
    with jax.enable_x64(dtype == "float64"):
        updates = runner(policy, dtype, optimizer)(gradients, RATES, eps)
    assert all(x.dtype == dtype for x in updates.values())
    return {name: np.asarray(x) for name, x in updates.items()}


def their_updates(policy, make, dtype="float64", steps=STEPS, max_norm=MAX_NORM):
    """The same of a torch optimizer, which starts each step from parameters that are all zero."""
    gradients = torch_gradients(policy)[:steps]
    tensors = {
        name: torch.zeros(g.shape, dtype=getattr(torch, dtype)) for name, g in gradients[0].items()
    }
    optimizer = make(list(tensors.values()))
    found = {name: [] for name in tensors}
    clipped = 0
    for gradient, rate in zip(gradients, RATES[:steps], strict=True):
        for name, tensor in tensors.items():
            tensor.zero_()
            tensor.grad = torch.tensor(gradient[name], dtype=tensor.dtype)
        clipped += torch.nn.utils.clip_grad_norm_(tensors.values(), max_norm).item() > max_norm
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Learning rate changed between steps", UserWarning)
            optimizer.step()
        for name, tensor in tensors.items():
            found[name].append(tensor.numpy().copy())
    assert 0 < clipped < steps or max_norm == math.inf
    return {name: np.array(updates) for name, updates in found.items()}


def torch_adam(eps=EPS):
    return lambda params: torch.optim.Adam(params, lr=1.0, betas=(BETA1, BETA2), eps=eps)


def torch_muon(**more):
    """The reference's call; its momentum is float32 unless `storage_dtype` says otherwise."""

    def make(params):
        return heavyball.ForeachMuon(params, lr=1.0, betas=(BETA1, BETA2), eps=EPS, **more)

    return make


class TorchMuonV4(torch.optim.Optimizer):
    """PufferLib 4's Muon, from what its update computes: Nesterov, then Newton-Schulz."""

    TRIPLES = (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    )

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    def orthogonal(self, matrix):
        # By its singular values: x (a + b x^2 + c x^4), five times.
        u, s, v = torch.linalg.svd(matrix / matrix.norm().clamp(min=1e-7), full_matrices=False)
        for a, b, c in self.TRIPLES:
            s = s * (a + b * s**2 + c * s**4)
        return u @ torch.diag(s) @ v

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.copy_(BETA1 * m + p.grad)
                move = p.grad + BETA1 * m
                if p.ndim >= 2:
                    flat = move.flatten(1)
                    rows, columns = flat.shape
                    move = self.orthogonal(flat).reshape(p.shape) * max(1, rows / columns) ** 0.5
                p -= group["lr"] * move


@pytest.fixture(autouse=True)
def heavyball_uncompiled(monkeypatch):
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)  # as the reference sets it


def errors(ours, theirs, step):
    assert ours.keys() == theirs.keys()
    return {name: relative_error(ours[name][step], theirs[name][step]) for name in theirs}


def worst(ours, theirs, step):
    return max(errors(ours, theirs, step).values())


# --- update by update ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "optimizer"),
    [
        ("zoo", "adam"),
        ("zoo", "adam eps 1e-5"),
        ("zoo", "muon"),
        ("lstm", "muon"),
        ("zoo", "muon_v4"),
    ],
)
def test_every_update_is_the_torch_optimizers(policy, optimizer):
    eps = 1e-5 if "eps" in optimizer else EPS
    judges = {"muon": torch_muon(storage_dtype="float64"), "muon_v4": TorchMuonV4}
    theirs = their_updates(policy, judges.get(optimizer) or torch_adam(eps))
    found = our_updates(policy, optimizer.split()[0], eps=eps)
    ranks = {array.ndim - 1 for array in theirs.values()}
    assert ranks == ({0, 1, 2, 4} if policy == "zoo" else {1, 2})
    assert worst(found, theirs, 0) < 1e-12
    assert max(worst(found, theirs, step) for step in range(STEPS)) < 1e-9


def test_the_shapes_muon_is_judged_on():
    shapes = {}
    for policy in ("lstm", "zoo"):
        params, layout, _ = setting(policy)
        shapes |= {name: x.shape for name, x in layout[0](params).items()}
    assert shapes["policy.decoder_logstd"] == (1, 2)
    assert shapes["lstm.weight_hh_l0"] == (12, 3)  # tall
    assert shapes["policy.encoder.0.weight"] == (3, 7)  # wide
    assert shapes["square.weight"] == (5, 5)
    assert shapes["conv.weight"] == (4, 3, 2, 3)
    assert shapes["attention.in_proj_weight"] == (12, 4)
    assert shapes["column.weight"] == (3, 1)


def test_adam_in_float32_is_as_exact_as_torchs():
    """Against float64; optax.scale_by_adam is off by 4e-6 to 1e-5 in each of the first steps."""

    def whole(updates):  # a small tensor's momentum may cancel, torch's as well
        columns = [updates[name].reshape(STEPS, -1) for name in sorted(updates)]
        return {"all": np.concatenate(columns, axis=1)}

    exact = whole(their_updates("zoo", torch_adam()))
    torchs = whole(their_updates("zoo", torch_adam(), "float32"))
    found = whole(our_updates("zoo", "adam", "float32"))
    assert max(worst(torchs, exact, step) for step in range(STEPS)) < 1e-6
    assert max(worst(found, exact, step) for step in range(STEPS)) < 1e-6


def test_muon_in_float32():
    """Against heavyball's class in float64: what its float32 sums round to is the processor's."""
    exact = their_updates("zoo", torch_muon(storage_dtype="float64"))
    found = our_updates("zoo", "muon", "float32")
    assert max(worst(found, exact, step) for step in range(STEPS)) < 1e-5


def test_heavyballs_float32_momentum_is_all_that_differs_in_float64():
    theirs = their_updates("zoo", torch_muon())
    assert 1e-9 < worst(our_updates("zoo", "muon"), theirs, STEPS - 1) < 1e-5


def test_muon_under_the_references_autocast():
    """The reference enters autocast and never leaves it: with bfloat16 it covers the products."""
    with torch.autocast("cpu", torch.bfloat16):
        theirs = their_updates("linear", torch_muon(), "float32", 3, math.inf)
    in_float32 = their_updates("linear", torch_muon(), "float32", 3, math.inf)
    exact = their_updates("linear", torch_muon(storage_dtype="float64"), steps=3, max_norm=math.inf)
    found = our_updates("linear", "bfloat16 muon", "float32")
    for step in range(3):
        assert errors(theirs, in_float32, step)["weight"] > 1e-3
        assert errors(found, in_float32, step)["weight"] > 1e-3
        assert errors(found, theirs, step)["weight"] < 2 * BFLOAT16  # each side rounds
        assert errors(found, exact, step)["bias"] < 1e-6


# --- make and its parts ------------------------------------------------------------------------


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_gradients_of_zero_and_bfloat16_parameters(name):
    params, layout, _ = setting("linear")
    tx = optimizers.make(name, *layout, **hyper_parameters(0.1))
    zeros = jax.tree.map(np.zeros_like, params)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)  # NumPy has the dtype, too

    @jax.jit
    def step(params):
        updates, state = tx.update(params, tx.init(params))
        return optax.apply_updates(params, updates), state

    jax.tree.map(np.testing.assert_array_equal, step(zeros)[0], zeros)
    new, state = step(narrow)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(new))
    if name.startswith("muon"):  # as heavyball's storage_dtype
        assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_vmap_over_every_hyper_parameter_goes_on_from_one_state(name):
    params, layout, _ = setting("linear")
    rng = np.random.default_rng(0)
    first, second = (jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(2))
    hyper = {
        "learning_rate": np.array([0.01, 0.3]),
        "max_grad_norm": np.array([0.5, 1e3]),
        "beta1": np.array([0.9, 0.0]),
        "beta2": np.array([0.99, 0.999]),
        "eps": np.array([1e-8, 1e-2]),
    }

    @jax.jit
    def update(hyper, gradient, state):
        return optimizers.make(name, *layout, **hyper).update(gradient, state)

    start = optimizers.make(name, *layout, **hyper_parameters(1.0)).init(params)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(start)]
    assert len(set(buffers)) == len(buffers)  # the state may be donated
    together, states = jax.jit(jax.vmap(update, (0, None, None)))(hyper, first, start)
    for i in range(2):
        one = {key: values[i] for key, values in hyper.items()}
        alone, state = update(one, first, start)
        assert jax.tree.structure(state) == jax.tree.structure(start)
        for found, expected in ((together, alone), (states, state)):
            assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))
            # Batched matmuls may sum in another order.
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-12, equal_nan=False),
                found,
                expected,
            )
    kernels = together["kernel"]
    assert not np.allclose(kernels[0], kernels[1])
    # the learning rate of this step, and no other's
    one = {key: values[1] for key, values in hyper.items()}
    state = jax.tree.map(lambda x: x[1], states)
    alone, _ = update(one, second, state)
    doubled, _ = update(one | {"learning_rate": 0.6}, second, state)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(alone))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-12, equal_nan=False),
        alone,
        doubled,
    )


@pytest.mark.parametrize(
    ("name", "hint"), [("Muon", "'muon'"), ("adamw", "'adam'"), ("moun", "'muon'")]
)
def test_an_unknown_name_is_an_error_with_the_nearest(name, hint):
    with pytest.raises(
        ValueError, match=rf"one of adam, muon, muon_v4; got '{name}'; did you mean {hint}\?"
    ):
        optimizers.make(name, *setting("linear")[1], **hyper_parameters(1.0))
    with pytest.raises(ValueError, match=r"one of adam, muon, muon_v4; got 'sgd'$"):
        optimizers.make("sgd", *setting("linear")[1], **hyper_parameters(1.0))


NORMS = {
    "zero": 0.0,
    "below": 0.5 - 2e-6,
    "scaled although below": 0.5 - 5e-7,
    "at": 0.5,
    "above": 0.5 + 2e-6,
    "far above": 1e3,
}


def clip(gradients, max_norm):
    tensors = {name: torch.tensor(g) for name, g in gradients.items()}
    parameters = [torch.zeros_like(tensor) for tensor in tensors.values()]
    for parameter, tensor in zip(parameters, tensors.values(), strict=True):
        parameter.grad = tensor
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return {name: tensor.numpy() for name, tensor in tensors.items()}  # scaled in place


@jax.jit
def our_clip(gradients, max_norm):
    tx = optimizers.clip_by_global_norm(max_norm)
    return tx.update(gradients, tx.init(gradients))[0]


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_clipping_at_the_edge(norm):
    rng = np.random.default_rng(1)
    raw = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=2), "c": rng.normal(size=())}
    scale = norm / math.sqrt(sum((x**2).sum() for x in raw.values()))
    gradients = {name: x * scale for name, x in raw.items()}
    found, expected = our_clip(gradients, 0.5), clip(gradients, 0.5)
    for name in raw:
        # The norm is a sum in another order: a few roundings.
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-14, equal_nan=False)
    untouched = all(np.array_equal(expected[name], gradients[name]) for name in raw)
    assert untouched == (norm < 0.5 - 1e-6)  # the 1e-6 makes torch scale a norm just below, too


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_what_is_not_finite(bad):
    gradients = {"a": np.ones((3, 4)), "b": np.array([3.0, bad]), "c": np.array(-2.0)}
    found, expected = our_clip(gradients, 0.5), clip(gradients, 0.5)
    for name in gradients:
        np.testing.assert_array_equal(found[name], expected[name])
    assert np.isnan(found["b"][1])
    assert found["c"] == 0 or math.isnan(bad)


# --- the schedule --------------------------------------------------------------------------------


def torch_cosine(total, epochs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    for _ in range(epochs):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


EPOCHS = np.arange(202)


@jax.jit
def our_cosine(total):
    return jax.vmap(optimizers.cosine_schedule(LEARNING_RATE, total))(EPOCHS)


@pytest.mark.parametrize("total", [1, 2, 7, 50])
def test_cosine_schedule_is_torchs_and_rises_again(total):
    found = np.asarray(our_cosine(total))
    expected = list(torch_cosine(total, len(EPOCHS)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * LEARNING_RATE)
    assert found[total] == 0
    assert found[0] == found[2 * total] == LEARNING_RATE
    assert found[total + 1] > 0
    rate = optimizers.cosine_schedule(LEARNING_RATE, total)(total - 1)  # eagerly
    assert float(rate) == pytest.approx(expected[total - 1], rel=1e-12)


def test_cosine_schedule_ends_where_it_is_told():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, 7, eta_min=0.3 * LEARNING_RATE
    )
    schedule = optimizers.cosine_schedule(LEARNING_RATE, 7, 0.3)
    for epoch in range(8):
        rate = optimizer.param_groups[0]["lr"]
        assert float(schedule(epoch)) == pytest.approx(rate, rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert rate == pytest.approx(0.3 * LEARNING_RATE, rel=1e-12)


def test_cosine_schedule_of_no_epochs_is_constant():
    with pytest.raises(ZeroDivisionError):
        list(torch_cosine(0, 3))
    assert set(np.asarray(our_cosine(0)).tolist()) == {LEARNING_RATE}
    assert float(optimizers.cosine_schedule(LEARNING_RATE, 0)(2)) == LEARNING_RATE


# --- torch's layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "zoo"])
def test_torch_layout_is_that_of_the_state_dict_and_invertible(name):
    params, (to_torch, from_torch), _ = setting(name)
    policy = puffer_jax.merge(puffer_jax.split(structure(name))[0], params)
    expected = puffer_jax.state_dict(policy)
    found = to_torch(params)
    assert list(found) == [key for key in expected if not key.startswith("cell.")]
    for key, array in found.items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, expected[key], strict=True)

    # not only parameters: any dtype, traced, batched
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda p: rng.integers(-999, 999, (2, *p.shape), np.int16), params)

    @jax.jit
    @jax.vmap
    def there_and_back(tree):
        tensors = torch_layout(policy)[0](tree)
        return tensors, from_torch(tensors)

    tensors, back = there_and_back(tree)
    for key, array in tensors.items():
        one = to_torch(jax.tree.map(lambda x: x[1], tree))[key]
        np.testing.assert_array_equal(array[1], one, strict=True)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


class Hidden(nnx.Module):
    def __init__(self):
        self.parameters = nnx.data([nnx.Param(jnp.ones(2))])


class Shared(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.second = self.first


def test_torch_layout_names_a_shared_layer_once():
    policy = nnx.eval_shape(Shared)
    params = jax.tree.map(lambda p: np.random.random(p.shape), puffer_jax.split(policy)[1])
    to_torch, from_torch = torch_layout(policy)
    assert set(to_torch(params)) == {"first.weight", "first.bias"}
    jax.tree.map(np.testing.assert_array_equal, from_torch(to_torch(params)), params)


def test_torch_layout_refuses_what_does_not_fit():
    params, (to_torch, from_torch), _ = setting("zoo")
    tensors = to_torch(params)
    bad = {key: x for key, x in tensors.items() if key != "conv.bias"}
    bad |= {"square.weight": np.ones((5, 4)), "more": np.ones(2)}
    with pytest.raises(
        ValueError,
        match=r"missing: conv.bias \(4,\); unexpected: more \(2,\); "
        r"wrong shape: square.weight \(5, 4\) instead of \(5, 5\)",
    ):
        from_torch(bad)
    with pytest.raises(ValueError, match=r"wrong shape: square.kernel \(4, 5\)"):
        to_torch(params | {"square": {"kernel": np.ones((4, 5)), "bias": np.ones(5)}})
    with pytest.raises(TypeError, match="have a torch counterpart: 0 of the policy's 1 have"):
        torch_layout(Hidden())
    with pytest.raises(TypeError, match="no torch rule for this LinearGeneral"):
        torch_layout(nnx.LinearGeneral(2, (3,), rngs=nnx.Rngs(0)))


# --- a step in place ---------------------------------------------------------------------------


def tree_of(dtype, seed):
    """Whole vectors and rests, one number, and enough of them for several threads."""
    rng = np.random.default_rng(seed)
    shapes = {"few": (37,), "many": (300, 501), "one": ()}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def both_steps(dtype):
    """(by `make_step`, by the transformation): (carry, (gradients, skip)) -> (carry, None)."""
    layout = (dict, dict)
    numbers = hyper_parameters(0.01)
    ours, tx = (
        optimizers.make_step("adam", *layout, **numbers),
        optimizers.make("adam", *layout, **numbers),
    )

    def by_us(carry, given):
        return ours(*carry, *given), None

    def by_optax(carry, given):
        gradients, skip = given
        updates, state = tx.update(gradients, carry[1])
        new = optax.apply_updates(carry[0], updates), state
        return jax.tree.map(lambda old, new: jnp.where(skip, old, new), carry, new), None

    # As small as the steps, so that a step shows among what errors are relative to.
    params = jax.tree.map(lambda x: x * x.dtype.type(0.01), tree_of(dtype, 0))
    return (params, tx.init(params)), by_us, by_optax


@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-6), ("float64", 1e-14)])
def test_a_step_in_place_is_that_of_the_transformation(dtype, bar):
    with jax.enable_x64(dtype == "float64"):
        start, *steps = both_steps(dtype)
        gradients = jax.tree.map(lambda *x: np.stack(x), *(tree_of(dtype, i) for i in (1, 2, 3)))
        skip = np.array([False, True, False])
        found = jax.jit(functools.partial(jax.lax.scan, steps[0]))(start, (gradients, skip))[0]
        assert int(found[1][1].count) == 2
        jax.tree.map(
            lambda old, new: np.testing.assert_array_less(0, np.abs(old - new).max()),
            start[0],
            found[0],
        )
        # Several at once, of other gradients.
        both = jax.tree.map(lambda x: np.stack([x, 2 * x]), gradients)
        many = jax.vmap(functools.partial(jax.lax.scan, steps[0]), (None, (0, None)))
        together = jax.jit(many)(start, (both, skip))[0]
    # The transformation in float64, of the same numbers.
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, np.float64 if x.dtype == dtype else x.dtype)  # noqa: E731
        given = jax.tree.map(wide, (start, (gradients, skip)))
        exact = jax.jit(functools.partial(jax.lax.scan, both_steps("float64")[2]))(*given)[0]
    for side in (found, jax.tree.map(lambda x: x[0], together)):
        for x, y in zip(jax.tree.leaves(side), jax.tree.leaves(exact), strict=True):
            assert (x.dtype, y.dtype) in [(dtype, np.float64), (np.int32, np.int32)]
            assert relative_error(x, y) < bar


def test_a_step_that_is_skipped_changes_nothing():
    start, step, _ = both_steps("float32")
    for skip in (True, False):
        gradients = tree_of("float32", 1)
        gradients["few"][3] = np.nan
        (params, state), _ = jax.jit(step)(start, (gradients, skip))
        if skip:
            jax.tree.map(np.testing.assert_array_equal, (params, state), start)
        else:
            assert all(np.isnan(x).all() for x in jax.tree.leaves(params))
