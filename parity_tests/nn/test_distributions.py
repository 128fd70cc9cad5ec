import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from pufferlib import pytorch as reference
from scipy import integrate, stats

from puffer_jax.nn.distributions import (
    Normal,
    TanhNormal,
    entropy,
    entropy_probs,
    log_prob,
    mask_logits,
)
from puffer_jax.nn.sampling import sample_logits

pytestmark = pytest.mark.usefixtures("unoptimised")

INF, NAN = np.inf, np.nan
TOLERANCE = {"float64": 1e-13, "float32": 2e-6}
GRADIENT_TOLERANCE = {"float64": 1e-13, "float32": 2e-5}
KEY = jax.random.key(7, impl="rbg")  # compiles several times faster than threefry


def rng(*seed):
    return np.random.default_rng([len(seed), *seed])


def error(ours, theirs):
    """Largest difference relative to the largest magnitude; infinities and NaNs must agree."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])
    assert np.isfinite(ours[finite]).all()
    ours, theirs = ours[finite], theirs[finite]
    return np.abs(ours - theirs).max(initial=0) / (np.abs(theirs).max(initial=0) or 1)


def flat(arrays):
    """One array of all, so that those that are nothing but rounding (n = 1) weigh little."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in arrays])


def to_torch(logits):
    if isinstance(logits, Normal):
        return torch.distributions.Normal(*map(to_torch, (logits.loc, logits.scale)))
    if isinstance(logits, tuple):
        return [to_torch(x) for x in logits]
    return torch.tensor(np.asarray(logits), requires_grad=True)


def wide(tree):
    """The same numbers in float64; actions stay what they are."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def leaves(logits):
    if isinstance(logits, torch.distributions.Normal):
        return [logits.loc, logits.scale]
    return logits if isinstance(logits, list) else [logits]


def exact_scores(logits, action, cotangents):
    """The reference's scores and gradients in float64, of logits and cotangents in any precision.

    Its float32 sums are no judge of ours: their order, and so their rounding, is the processor's.
    """
    if np.issubdtype(np.asarray(action).dtype, np.floating):
        action = wide(action)
    return reference_scores(wide(logits), action, wide(cotangents))


def reference_scores(logits, action, cotangents):
    """Log-probability, entropy and the gradients of each, weighted by the cotangents."""
    logits = to_torch(logits)
    _, *scores = reference.sample_logits(logits, torch.tensor(np.asarray(action)))
    scores = [x.reshape(-1) for x in scores]
    gradients = [
        torch.autograd.grad(
            x, leaves(logits), torch.tensor(c), retain_graph=True, materialize_grads=True
        )
        for x, c in zip(scores, cotangents, strict=True)
    ]
    return [x.detach() for x in scores], gradients


@jax.jit
def our_scores(logits, action, cotangents):
    scores, pull = jax.vjp(lambda logits: sample_logits(logits, action)[1:], logits)
    zeros = jax.tree.map(jnp.zeros_like, scores)
    gradients = pull((cotangents[0], zeros[1]))[0], pull((zeros[0], cotangents[1]))[0]
    return scores, [jax.tree.leaves(g) for g in gradients]


score = jax.jit(lambda logits, action: sample_logits(logits, action))
draw = jax.jit(lambda logits, key: sample_logits(logits, key=key))
most_likely = jax.jit(lambda logits: sample_logits(logits, deterministic=True))


def sample(logits, key):
    return np.asarray(draw(logits, key)[0])


def softmax(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def make_case(kind, batch, sizes, dtype, scale=1.0, masked=False, seed=0):
    r = rng(batch, *sizes, seed)
    if kind == "normal":
        shape = (batch, *sizes)
        logits = Normal(r.normal(size=shape) * scale, np.exp(r.normal(size=shape)))
        logits = jax.tree.map(lambda x: x.astype(dtype), logits)
        return logits, (logits.loc + 2 * r.normal(size=shape)).astype(dtype)
    arrays = []
    for n in sizes:
        x = (r.normal(size=(batch, n)) * scale).astype(dtype)
        hidden = r.random(x.shape) < 0.4
        hidden[np.arange(batch), r.integers(0, n, batch)] = False  # something stays allowed
        arrays.append(np.where(hidden & masked, -INF, x).astype(dtype))
    action = np.stack([r.integers(0, n, batch) for n in sizes], axis=1)  # may hit a masked one
    return (arrays[0], action[:, 0]) if kind == "discrete" else (tuple(arrays), action)


def cotangents_for(batch, dtype):
    """Below 1: at 1 the reference's entropy gradients of a padded component turn to NaN."""
    return tuple(rng(batch).uniform(-1, 1, (2, batch)).astype(dtype))


CASES = [
    ("discrete", 9, (5,), False),
    ("discrete", 64, (18,), True),
    ("discrete", 1, (3,), False),
    ("discrete", 3, (1,), False),
    ("multi", 7, (3, 5), False),
    ("multi", 33, (2, 1, 4, 11), True),
    ("multi", 1, (1, 1), False),
    ("normal", 9, (3,), False),
    ("normal", 1, (1,), False),
]


@pytest.mark.parametrize(
    ("kind", "batch", "sizes", "masked", "dtype"),
    [(*case, "float64") for case in CASES] + [(*CASES[i], "float32") for i in (1, 5, 7)],
)
def test_scores_and_gradients_equal_the_reference(kind, batch, sizes, masked, dtype):
    logits, action = make_case(kind, batch, sizes, dtype, 3.0, masked)
    cotangents = cotangents_for(batch, dtype)
    scores, gradients = exact_scores(logits, action, cotangents)
    ours, our_gradients = our_scores(logits, action, cotangents)
    for x, y in zip(ours, scores, strict=True):
        assert str(x.dtype) == dtype
        assert error(x, y) < TOLERANCE[dtype]
    for x, y in zip(our_gradients, gradients, strict=True):
        assert np.isfinite(flat(y)).all()
        assert error(flat(x), flat(y)) < GRADIENT_TOLERANCE[dtype]
    assert np.isneginf(ours[0]).any() == masked, "a masked case should have a masked action"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_up_to_1e4(dtype):
    scales = np.array([1.0, 30.0, 1e3, 5e3])[rng(1).integers(0, 4, 64)]
    logits = np.clip(rng(2).normal(size=(64, 9)) * scales[:, None], -1e4, 1e4).astype(dtype)
    logits[:4] = [[1e4] * 9, [-1e4] * 9, [1e4] + [-1e4] * 8, [-1e4] + [1e4] * 8]
    action = rng(3).integers(0, 9, 64)
    cotangents = cotangents_for(64, dtype)
    scores, gradients = exact_scores(logits, action, cotangents)
    ours, our_gradients = our_scores(logits, action, cotangents)
    # The logsumexp of a row near 1e4 is rounded there, by 1e-3 in float32, as torch's is; that of
    # the other rows is not.
    lost = np.spacing(np.abs(logits).max(1))
    for x, y in zip(ours, scores, strict=True):
        scale = np.abs(y.numpy()).clip(1)
        assert (np.abs(x - y.numpy()) < TOLERANCE[dtype] * scale + lost).all()
    # torch's gradient of logsumexp goes through the rounded result, so that rows near 1e4 are good
    # to 1e4 eps only: hence without the first rows, whose like are tested below.
    rows = slice(4, None)
    for x, y in zip(our_gradients, gradients, strict=True):
        assert error(x[0][rows], y[0][rows]) < GRADIENT_TOLERANCE[dtype]


def test_gradients_do_not_depend_on_a_common_offset():
    logits = np.round(rng(4).normal(size=(16, 6)) * 1024) / 1024  # adding 1e4 is exact
    action = rng(5).integers(0, 6, 16)
    cotangents = cotangents_for(16, "float64")
    _, gradients = reference_scores(logits, action, cotangents)
    for offset in (1e4, -1e4):
        _, ours = our_scores(logits + offset, action, cotangents)
        for x, y, tolerance in zip(ours, gradients, (1e-13, 1e-11), strict=True):
            assert error(x[0], y[0]) < tolerance


def test_float32_errors_are_not_larger_than_torchs():
    logits, action = make_case("multi", 512, (6, 15, 40), "float32", scale=4.0)
    cotangents = cotangents_for(512, "float32")
    exact, _ = exact_scores(logits, action, cotangents)
    theirs, _ = reference_scores(logits, action, cotangents)
    ours, _ = our_scores(logits, action, cotangents)
    for x, y, z in zip(ours, theirs, exact, strict=True):
        assert error(x, z) <= 2 * error(y, z)


SHAPES = [
    ("discrete", 4, (3,), (4, 1)),
    ("discrete", 4, (1,), (2, 2)),
    ("discrete", 1, (3,), (1,)),
    ("discrete", 1, (3,), ()),
    ("multi", 4, (3, 2), (4, 2)),
    ("multi", 6, (3, 1, 2), (2, 3, 3)),
    ("multi", 1, (3,), (1, 1)),
    ("normal", 4, (3,), (2, 2, 3)),
    ("normal", 1, (1,), (1, 1)),
]
ACTION_DTYPES = {"normal": ["float32", "float64"]}


@pytest.mark.parametrize(("kind", "batch", "sizes", "shape"), SHAPES)
def test_shapes_and_dtypes_are_the_references(kind, batch, sizes, shape):
    logits, action = make_case(kind, batch, sizes, "float32")

    def compare(ours, theirs, action_dtype):
        assert ours[0].shape == tuple(theirs[0].shape)
        assert str(ours[0].dtype) == action_dtype == str(theirs[0].dtype).removeprefix("torch.")
        for x, y in zip(ours[1:], theirs[1:], strict=True):
            assert x.shape == (batch,)  # the reference squeezes the entropy of a batch of one
            assert str(x.dtype) == str(y.dtype).removeprefix("torch.")
            assert y.numel() == batch

    dtypes = ACTION_DTYPES.get(kind, ["int32", "int64", "uint8"])
    given = [action.reshape(shape).astype(dtype) for dtype in dtypes]

    @jax.jit
    def all_three(logits, given):
        drawn = sample_logits(logits, key=KEY), sample_logits(logits, deterministic=True)
        return *drawn, [sample_logits(logits, x) for x in given]

    drawn, best, scored = all_three(logits, given)
    compare(
        drawn, reference.sample_logits(to_torch(logits)), "float32" if kind == "normal" else "int32"
    )
    assert best[0].dtype == drawn[0].dtype and best[0].shape == drawn[0].shape
    for x, ours, dtype in zip(given, scored, dtypes, strict=True):
        theirs = reference.sample_logits(to_torch(logits), torch.tensor(x))
        compare(ours, theirs, dtype)
        np.testing.assert_array_equal(ours[0], theirs[0])
        exact, _ = exact_scores(logits, x, cotangents_for(batch, "float32"))
        assert error(ours[1], exact[0]) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_helpers_equal_the_reference(dtype):
    raw = (rng(6).normal(size=(2, 5, 7)) * 5).astype(dtype)
    raw[0, :, 2], raw[1, 0, 3] = -INF, -1e4
    logits = torch.log_softmax(torch.tensor(raw), -1)
    ours = logits.numpy()
    value = rng(7).integers(0, 7, (2, 5))
    for v in (value, value[:1], value[0]):  # leading axes broadcast
        theirs = reference.log_prob(logits, torch.tensor(v))
        assert error(log_prob(ours, v), theirs) == 0
    exact, probs = logits.double(), logits.exp()
    assert error(entropy(ours), reference.entropy(exact)) < TOLERANCE[dtype]
    # Not normalised, all masked, not finite: whatever the reference makes of it, row by row, as
    # one of the entropies is the largest number there is (which float64 has to be told).
    odd = np.array([[1, 2, 3], [-INF] * 3, [NAN, 0, 1], [INF, 0, 1], [-1e4, 1e4, 0]], dtype)
    clamped = torch.tensor(odd).clamp(min=torch.finfo(logits.dtype).min).double()
    for found, expected in zip(entropy(odd), reference.entropy(clamped), strict=True):
        assert error(found, expected) < TOLERANCE[dtype]
    theirs = reference.entropy_probs(exact[1], probs[1].double())
    assert error(entropy_probs(ours[1], probs[1].numpy()), theirs) < TOLERANCE[dtype]
    # -inf * 0 is NaN in the reference and 0 here; NaN itself is never hidden.
    assert torch.isnan(reference.entropy_probs(logits[0], probs[0])).all()
    hidden = entropy_probs(ours[0], probs[0].numpy())
    theirs = reference.entropy_probs(exact[0].nan_to_num(neginf=0), probs[0].double())
    assert error(hidden, theirs) < TOLERANCE[dtype]
    assert np.isnan(entropy_probs(np.array([NAN, 0.0]), np.array([0.0, 1.0])))


def test_entropy_probs_gradients():
    logits, probs = np.array([-INF, -2.0, -0.5]), np.array([0.0, 0.0, 1.0])
    for_logits, for_probs = jax.grad(entropy_probs, (0, 1))(logits, probs)
    np.testing.assert_array_equal(for_logits, -probs)
    np.testing.assert_array_equal(for_probs, [0.0, 2.0, 0.5])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("low", [-INF, "min"])
@pytest.mark.parametrize("factor", [1.0, -3.0, 100.0])
def test_masked_gradients_are_those_of_the_smaller_problem(dtype, low, factor):
    low = np.finfo(dtype).min if low == "min" else low
    logits, action = make_case("discrete", 8, (5,), dtype, scale=2.0)
    action = action % 3
    masked = logits.copy()
    masked[:, 3:] = low
    cotangents = tuple(factor * c for c in cotangents_for(8, dtype))
    _, (g_logprob, g_entropy) = our_scores(masked, action, cotangents)
    _, small = exact_scores(np.ascontiguousarray(logits[:, :3]), action, cotangents)
    for ours, theirs in zip((g_logprob[0], g_entropy[0]), small, strict=True):
        np.testing.assert_array_equal(ours[:, 3:], 0)
        assert error(ours[:, :3], theirs[0]) < GRADIENT_TOLERANCE[dtype]
    if factor == 100 and low == -INF:  # what ours must not copy: finfo.min times 100 is -inf
        _, theirs = reference_scores(masked, action, cotangents)
        assert torch.isnan(theirs[1][0]).any()


@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_gradients_are_finite_for_extreme_and_masked_logits(factor):
    rows = [
        [1e4, -1e4, 0, -INF],
        [-1e4, -INF, -INF, -INF],
        [1e4, 1e4, -INF, 1e4],
        [np.finfo("float32").max, 0, 0, np.finfo("float32").min],
        [1e-40, -1e-40, 0, 0],
    ]
    for dtype in TOLERANCE:
        logits = np.array(rows, dtype)
        cotangents = (np.full(5, factor, dtype),) * 2
        for action in (0, 1, 3):
            _, gradients = our_scores(logits, np.full(5, action), cotangents)
            assert np.isfinite(flat(gradients[0] + gradients[1])).all()
            # A row of normalised logits does not change with a constant: the gradients sum to 0.
            sums = np.array([g[0].sum(-1) for g in gradients])
            np.testing.assert_allclose(sums, 0, atol=factor * 1e-5)


def frequencies_agree(drawn, probs):
    counts = np.bincount(np.asarray(drawn).ravel(), minlength=len(probs))
    assert len(counts) == len(probs)
    expected = np.asarray(probs, np.float64) * counts.sum()
    rare = expected < 5
    assert (counts[expected == 0] == 0).all()
    observed = [*counts[~rare], counts[rare].sum()]
    expected = [*expected[~rare], expected[rare].sum()]
    keep = np.array(expected) > 0
    if keep.sum() == 1:
        return sum(observed) == np.array(observed)[keep]
    p = stats.chisquare(np.array(observed)[keep], np.array(expected)[keep], sum_check=False).pvalue
    return p > 1e-4


ROWS = {
    "plain": [0.3, -1.0, 2.0, 0.0],
    "spread of 20": list(np.linspace(0, -20, 30)),
    "masked": [0.0, -INF, 1.0, -INF, -2.0],
    "single": [3.0],
    # Noise added to these as they are would be rounded to halves, in float32.
    "large": [4.2e6, 4.2e6, 4.2e6 - 1, 4.2e6 + 0.5],
    "negative": [-1e4, -1e4 - 1, -1e4 - 2],
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in ROWS] + [("plain", "float64"), ("spread of 20", "float64")],
)
def test_sampled_frequencies(name, dtype):
    row = np.array(ROWS[name], dtype)
    drawn = sample(np.broadcast_to(row, (60_000, len(row))), KEY)
    assert frequencies_agree(drawn, softmax(row))
    if len(row) > 1:
        other = np.roll(softmax(row), 1)  # the test can fail
        with np.errstate(divide="ignore"):
            wrong = stats.chisquare(
                np.bincount(drawn, minlength=len(row)) + 1.0, other * 6e4 + 1, sum_check=False
            )
        assert wrong.pvalue < 1e-4


def test_multidiscrete_components_are_independent():
    rows = [0.5, -0.5, 1.0], [0.0, 2.0], [1.0, 0.0, 0.0, -1.0]
    drawn = sample(tuple(np.broadcast_to(np.array(r), (80_000, len(r))) for r in rows), KEY)
    first, second, third = (softmax(r) for r in rows)
    joint = np.einsum("i,j,k->ijk", first, second, third).ravel()
    assert frequencies_agree(np.ravel_multi_index(np.asarray(drawn).T, (3, 2, 4)), joint)


def test_equal_components_draw_different_actions():
    logits = np.zeros((1000, 4), np.float32)
    drawn = np.asarray(sample((logits, logits), KEY))
    assert frequencies_agree(drawn[:, 0] * 4 + drawn[:, 1], np.full(16, 1 / 16))


def test_actions_of_probability_1e_8_are_drawn():
    """The default mode of `jax.random.categorical` draws them 10^4 times too seldom.

    A batch of 2^14 rows of 127 such actions holds one with probability 2 %, in that mode 2e-6.
    Key 49 is the first that does (by search); should JAX's generator ever change, the following
    keys find another, and fail with probability e^-10 only.
    """
    logits = np.full((1 << 14, 128), np.log(1e-8), np.float32)
    logits[:, 0] = 0
    logits = jnp.asarray(logits)
    assert any((sample(logits, jax.random.key(seed)) != 0).any() for seed in [49, *range(500)])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cls", [Normal, TanhNormal])
def test_continuous_draws_have_the_right_law(cls, dtype):
    loc = np.broadcast_to(np.array([0.5, -0.3], dtype), (20_000, 2))
    scale = np.array([0.7, 1.5], dtype)
    drawn = sample(cls(loc, scale), KEY).astype(np.float64)
    before = np.arctanh(drawn) if cls is TanhNormal else drawn
    for i in range(2):
        law = stats.norm(loc[0, i], scale[i])
        assert stats.kstest(before[:, i], law.cdf).pvalue > 1e-4
        assert stats.kstest(before[:, i], stats.norm(loc[0, i], 1.1 * scale[i]).cdf).pvalue < 1e-4
    assert abs(np.corrcoef(before.T)[0, 1]) < 4 / np.sqrt(20_000)


BAD_ROWS = {
    "nan": [NAN, 1, 2],
    "inf": [0, INF, 1],
    "all masked": [-INF] * 3,
    "mixed": [NAN, -INF, INF],
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("kind", ["discrete", "multi"])
def test_a_bad_row_leaves_the_others_alone(name, kind):
    good = rng(8).normal(size=(6, 3))
    bad = good.copy()
    bad[2] = BAD_ROWS[name]
    other = rng(9).normal(size=(6, 2))
    action = np.zeros((6, 2), int) if kind == "multi" else np.zeros(6, int)
    wrap = (lambda x: (x, other)) if kind == "multi" else (lambda x: x)
    cotangents = cotangents_for(6, "float64")
    scores, gradients = our_scores(wrap(bad), action, cotangents)
    expected, good_gradients = our_scores(wrap(good), action, cotangents)
    rest = [0, 1, 3, 4, 5]
    for x, y in zip(scores, expected, strict=True):
        assert np.isnan(x[2])
        np.testing.assert_array_equal(np.asarray(x)[rest], np.asarray(y)[rest])
    for x, y in zip(gradients, good_gradients, strict=True):
        np.testing.assert_array_equal(np.asarray(x[0])[rest], np.asarray(y[0])[rest])
        assert np.isfinite(flat(x)).all()
    np.testing.assert_array_equal(
        sample(wrap(bad), KEY)[rest, ...], sample(wrap(good), KEY)[rest, ...]
    )
    chosen = np.asarray(most_likely(wrap(bad))[0])
    assert chosen.reshape(6, -1)[2, 0] == 0
    if kind == "multi":
        assert chosen[2, 1] == other[2].argmax()
    # The reference also draws the action of a bad row and has NaN for its log-probability
    # (+inf: only if the +inf is chosen).
    drawn, logprob, _ = reference.sample_logits(to_torch(wrap(bad)))
    assert drawn.dtype == torch.int32 and not torch.isfinite(logprob[2])


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_drawn_uniformly(name):
    bad = np.broadcast_to(np.array(BAD_ROWS[name], np.float32), (9000, 3))
    row = np.array([2.0, 0.0, -INF, 1.0, 0.5], np.float32)
    drawn, logprob, total = draw((bad, np.broadcast_to(row, (9000, 5))), KEY)
    # (Arrays this large matter: there XLA's maximum on CPUs forgets NaNs.)
    assert np.isnan(logprob).all() and np.isnan(total).all()
    assert frequencies_agree(drawn[:, 0], np.full(3, 1 / 3))  # the reference would draw 3 and 4 too
    assert frequencies_agree(drawn[:, 1], softmax(row))


@pytest.mark.parametrize("cls", [Normal, TanhNormal])
@pytest.mark.parametrize(
    ("loc", "scale"), [(NAN, 1), (INF, 1), (0, NAN), (0, INF), (-INF, NAN), (3, 0), (3, -1)]
)
def test_bad_elements_of_a_normal(cls, loc, scale):
    good = cls(rng(10).normal(size=(4, 2)), np.exp(rng(11).normal(size=(4, 2))))
    bad = jax.tree.map(np.copy, good)
    bad.loc[1, 0], bad.scale[1, 0] = loc, scale
    action = rng(12).uniform(-0.9, 0.9, (4, 2))
    cotangents = cotangents_for(4, "float64")
    scores, gradients = our_scores(bad, action, cotangents)
    expected, good_gradients = our_scores(good, action, cotangents)
    rest = [0, 2, 3]
    for x, y in zip(scores, expected, strict=True):
        assert np.isnan(x[1])
        np.testing.assert_array_equal(np.asarray(x)[rest], np.asarray(y)[rest])
    for x, y in zip(gradients, good_gradients, strict=True):
        for a, b in zip(x, y, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[rest], np.asarray(b)[rest])
            assert np.isfinite(a).all()
    drawn, same = sample(bad, KEY), sample(good, KEY)
    np.testing.assert_array_equal(drawn[rest], same[rest])
    assert drawn[1, 1] == same[1, 1]
    assert drawn[1, 0] == sample(cls(good.loc * 0, good.scale * 0 + 1), KEY)[1, 0]
    assert most_likely(bad)[0][1, 0] == 0


def test_deterministic_takes_the_first_maximum():
    logits = np.array([[0, 5, 5, 1], [-INF, -3, -4, -3], [2, 2, 2, 2]], np.float32)
    action, logprob, _ = most_likely(logits)
    np.testing.assert_array_equal(action, [1, 1, 0])
    theirs = reference.sample_logits(torch.tensor(wide(logits)), torch.tensor(np.asarray(action)))
    assert error(logprob, theirs[1]) < 2e-6
    for cls in (Normal, TanhNormal):
        loc = np.array([[0.3, -2.0]])
        action, logprob, _ = most_likely(cls(loc, loc * 0 + 0.5))
        # NumPy's tanh and XLA's may round apart, by an ulp.
        np.testing.assert_allclose(
            action, np.tanh(loc) if cls is TanhNormal else loc, rtol=1e-15, equal_nan=False
        )
        assert error(logprob, cls(loc, 0.5).log_prob(action).sum(1)) < 1e-15


@pytest.mark.parametrize("kind", ["discrete", "multi", "normal", "tanh"])
def test_a_drawn_action_given_back_has_the_same_score(kind):
    logits, _ = make_case(
        "normal" if kind == "tanh" else kind, 8, (3, 2)[: 2 if kind == "multi" else 1], "float32"
    )
    if kind == "tanh":  # wide enough for actions of exactly 1
        logits = TanhNormal(logits.loc, 10 * np.ones_like(logits.scale))
    action, *drawn = draw(logits, KEY)
    again, *given = score(logits, action)
    np.testing.assert_array_equal(action, again)
    assert (np.abs(action) == 1).any() or kind != "tanh"
    exact_action = wide(action) if kind in ("normal", "tanh") else action
    if kind == "tanh":  # where the float32 score takes +-1
        exact_action = exact_action.clip(2**-24 - 1, 1 - 2**-24)
    exact = score(wide(logits), exact_action)[1:]
    for x, y, z in zip(drawn, given, exact, strict=True):
        assert z.dtype == np.float64 and np.isfinite(z).all()
        assert error(x, z) < 5e-7 and error(y, z) < 5e-7


@pytest.mark.parametrize("cls", [Normal, TanhNormal])
def test_sampled_actions_are_constants_to_grad(cls):
    loc, scale = rng(13).normal(size=(2, 5, 2))
    policy = cls(loc, np.exp(scale))
    action = sample(policy, KEY)
    drawn = jax.jit(jax.grad(lambda p: sample_logits(p, key=KEY)[1].sum()))(policy)
    given = jax.jit(jax.grad(lambda p: sample_logits(p, action)[1].sum()))(policy)
    assert error(drawn.loc, given.loc) < 1e-13 and error(drawn.scale, given.scale) < 1e-13
    assert np.abs(drawn.loc).min() > 1e-3  # a draw differentiated through would give 0 (Normal)
    still = jax.jit(jax.grad(lambda p: sample_logits(p, key=KEY)[0].sum()))(policy)
    np.testing.assert_array_equal(still.loc, 0)


OUT_OF_RANGE = [
    (np.zeros((3, 4)), np.array([0, 4, 1]), "index 4 is out of range for n = 4$"),
    (np.zeros((3, 4)), np.array([0, 1, -1]), "index -1 is out of range for n = 4$"),
    (np.zeros((3, 4)), np.array([2, 2**31 + 1, 0]), "index 2147483649 "),
    (np.zeros((3, 4)), np.array([2, 200, 0], np.uint8), "index 200 "),
    (np.zeros((3, 4)), np.array([2, NAN, 0]), "index nan "),
    # The reference pads the second component to 3 and calls this -inf.
    (
        (np.zeros((3, 3)), np.zeros((3, 2))),
        np.array([[2, 1], [0, 2], [1, 1]]),
        r"index 2 .*n = 2 \(component 1\)",
    ),
]


@pytest.mark.parametrize(("logits", "action", "message"), OUT_OF_RANGE)
def test_action_indices_out_of_range(logits, action, message):
    with pytest.raises(ValueError, match=message):
        sample_logits(logits, action)
    logprob = score(logits, action)[1]
    assert np.isnan(logprob).sum() == 1
    if not isinstance(logits, tuple):
        with pytest.raises(ValueError, match=message):
            log_prob(logits, action)
        np.testing.assert_array_equal(
            np.isnan(jax.vmap(log_prob)(logits, action)), np.isnan(logprob)
        )
        _, gradients = our_scores(logits, action, cotangents_for(3, "float64"))
        assert np.isfinite(flat(gradients[0] + gradients[1])).all()


def test_small_integer_dtypes_reach_large_n():
    logits = rng(14).normal(size=(2, 300))
    action = np.array([255, 3], np.uint8)
    expected = np.log(softmax(logits))[[0, 1], action]
    assert error(log_prob(np.log(softmax(logits)), action), expected) == 0
    assert error(score(logits, action)[1], expected) < 1e-13


LOGITS = np.zeros((4, 3), np.float32)
PAIR = (np.zeros((4, 3)), np.zeros((4, 2)))
NORMAL = Normal(np.zeros((4, 2)), np.ones((4, 2)))
MISUSE = [
    (LOGITS, {}, "exactly one of action, key and deterministic=True; got none of them"),
    (LOGITS, {"action": np.zeros(4, int), "key": KEY}, "got action and key$"),
    (NORMAL, {"key": KEY, "deterministic": True}, "got key and deterministic$"),
    (LOGITS, {"action": np.zeros(5, int)}, r"shape \(5,\) .*\(4, 3\).* 4 \* 1 elements"),
    (LOGITS, {"action": np.zeros((4, 3), int)}, r"shape \(4, 3\) .*\(4, 3\).* 4 \* 1 elements"),
    (PAIR, {"action": np.zeros(4, int)}, r"shape \(4,\) .*\(4, 3\), \(4, 2\).* 4 \* 2 elements"),
    (NORMAL, {"action": np.zeros((4, 3))}, r"shape \(4, 3\) .*\(4, 2\).* 4 \* 2 elements"),
    (LOGITS[0], {"key": KEY}, r"must be \(batch, n\).*\(3,\)"),
    (LOGITS[:, :0], {"key": KEY}, r"n > 0.*\(4, 0\)"),
    ((PAIR[0], PAIR[1][:2]), {"key": KEY}, r"one batch.*\(4, 3\), \(2, 2\)"),
    ((), {"key": KEY}, r"got shapes \[\]"),
    (Normal(0.0, 1.0), {"key": KEY}, "got a scalar"),
]


@pytest.mark.parametrize(("logits", "arguments", "message"), MISUSE)
def test_misuse_is_explained(logits, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_logits(logits, **arguments)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ({"a": LOGITS}, "must be an array.*got dict$"),
        ("abc", "got str$"),
        ([LOGITS, None], "got a sequence of ndarray, NoneType$"),
        (torch.zeros(2, 3), "got Tensor$"),
    ],
)
def test_logits_of_a_wrong_type(logits, message):
    jaxtyping.config.update("jaxtyping_disable", True)  # as for a user, who has no runtime checks
    try:
        with pytest.raises(TypeError, match=message):
            sample_logits(logits, key=KEY)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["discrete", "multi", "normal", "tanh"])
def test_jit_vmap_and_eager_agree_and_nothing_retraces(kind):
    def case(seed):
        if kind == "tanh":
            normal, action = make_case("normal", 4, (2,), "float64", seed=seed)
            return TanhNormal(normal.loc, normal.scale), np.tanh(action)
        return make_case(kind, 4, (3, 2) if kind == "multi" else (3,), "float64", seed=seed)

    traces = []

    @jax.jit
    def both(logits, action, key):
        traces.append(1)
        return sample_logits(logits, key=key), sample_logits(logits, action)

    cases = [case(seed) for seed in range(3)]
    keys = jax.random.split(KEY, 3)
    compiled = [both(*x, key) for x, key in zip(cases, keys, strict=True)]
    assert len(traces) == 1
    eager = sample_logits(cases[0][0], key=keys[0]), sample_logits(*cases[0])
    for x, y in zip(*map(jax.tree.leaves, (compiled[0], eager)), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert error(x, y) < 1e-15
    stacked = jax.tree.map(lambda *x: np.stack(x), *cases)
    drawn, given = jax.jit(jax.vmap(both))(*stacked, keys)
    for i, one in enumerate(compiled):
        for x, y in zip(given, one[1], strict=True):
            assert x.dtype == y.dtype and error(x[i], y) < 1e-15
        # Under vmap rbg keys draw something else, so the draws are judged by their scores.
        again = both(cases[i][0], np.asarray(drawn[0][i], cases[i][1].dtype), keys[i])[1]
        assert error(drawn[1][i], again[1]) < 1e-13


def test_vmap_over_threefry_keys_draws_what_a_loop_draws():
    logits = rng(30).normal(size=(4, 3))
    keys = jax.random.split(jax.random.key(0), 5)
    mapped = jax.jit(jax.vmap(draw, (None, 0)))(logits, keys)[0]
    np.testing.assert_array_equal(mapped, np.stack([sample(logits, key) for key in keys]))
    assert len(np.unique(mapped, axis=0)) > 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(dtype):
    logits = jnp.asarray(rng(15).normal(size=(4, 3)) * 4, dtype)
    action, cotangents = np.array([0, 2, 1, 1]), cotangents_for(4, "float32")
    half, gradients = our_scores(logits, action, cotangents)
    exact, exact_gradients = exact_scores(logits, action, cotangents)
    for x, y in zip(half, exact, strict=True):
        assert x.dtype == jnp.float32 and error(x, y) < 1e-6
    for x, y in zip(gradients, exact_gradients, strict=True):
        assert x[0].dtype == dtype and error(x[0], y[0]) < float(jnp.finfo(dtype).eps)
    np.testing.assert_array_equal(sample(logits, KEY), sample(np.asarray(logits, np.float32), KEY))
    assert entropy(logits).dtype == log_prob(logits, action).dtype == jnp.float32
    for cls in (Normal, TanhNormal):
        action, logprob, total = draw(cls(logits, jnp.ones_like(logits)), KEY)
        assert action.dtype == dtype and logprob.dtype == total.dtype == jnp.float32
        assert np.isfinite(logprob).all()
        edge = 1 - float(jnp.finfo(dtype).epsneg)
        exact_action = wide(action).clip(-edge, edge) if cls is TanhNormal else wide(action)
        _, expected, wide_total = score(wide(cls(logits, jnp.ones_like(logits))), exact_action)
        assert expected.dtype == wide_total.dtype == jnp.float64
        assert error(logprob, expected) < 1e-6 and error(total, wide_total) < 1e-6


def test_jit_tells_a_tanh_normal_from_a_normal():
    # With `jax.tree_util.register_dataclass` the two were equal, and jit mixed them up at times.
    classes = [Normal, TanhNormal]
    first, second = (jax.tree.structure(cls(1.0, 2.0)) for cls in classes)
    assert first != second and hash(first) != hash(second)
    for cls in classes:
        assert jax.tree.structure(cls(1.0, 2.0)) == jax.tree.structure(cls(3.0, 4.0))
        assert type(jax.tree.map(lambda x: x, cls(1.0, 2.0))) is cls
        paths = jax.tree_util.tree_leaves_with_path(cls(1.0, 2.0))
        assert [jax.tree_util.keystr(path) for path, _ in paths] == [".loc", ".scale"]


@pytest.mark.parametrize("shapes", [((5,), (5,)), ((4, 3), (3,)), ((), ()), ((1, 3), (4, 1))])
def test_normal_equals_torch(shapes):
    loc, scale = rng(17).normal(size=shapes[0]), np.exp(2 * rng(18).normal(size=shapes[1]))
    ours, theirs = Normal(loc, scale), torch.distributions.Normal(*map(torch.tensor, (loc, scale)))
    value = 3 * rng(19).normal(size=np.broadcast_shapes(*shapes))
    assert error(ours.log_prob(value), theirs.log_prob(torch.tensor(value))) < 1e-13
    assert error(ours.entropy(), theirs.entropy()) < 1e-13
    assert error(ours.mode(), theirs.mode) == 0
    assert ours.sample(KEY).shape == value.shape


def test_normal_is_a_pytree_and_reparameterised():
    policy = Normal(jnp.zeros((3, 2)), jnp.ones(2))
    draws = jax.vmap(lambda p, k: p.sample(k), in_axes=(Normal(0, None), 0))(
        policy, jax.random.split(KEY, 3)
    )
    assert draws.shape == (3, 2)
    gradient = jax.grad(lambda p: p.sample(KEY).sum())(policy)
    np.testing.assert_array_equal(gradient.loc, 1)
    assert np.abs(gradient.scale).min() > 0.01
    # At loc 0 and scale 1 a draw is the noise, which is its derivative; sums may round apart.
    np.testing.assert_allclose(
        gradient.scale, policy.sample(KEY).sum(0), rtol=1e-14, equal_nan=False
    )
    assert Normal(np.float32([0.0]), 1.0).log_prob(0.5).dtype == jnp.float32
    assert type(jax.tree.map(lambda x: x, TanhNormal(0.0, 1.0))) is TanhNormal


def torch_tanh_normal(loc, scale):
    base = torch.distributions.Normal(loc, scale)
    transform = torch.distributions.TanhTransform(cache_size=1)
    return torch.distributions.TransformedDistribution(base, transform), transform


def test_tanh_normal_equals_torch():
    loc, scale = rng(20).normal(size=200), np.exp(rng(21).normal(size=200) - 1)
    value = np.tanh(rng(22).uniform(-2.5, 2.5, 200))  # closer to +-1 both lose digits in atanh
    parameters = [torch.tensor(x, requires_grad=True) for x in (loc, scale)]
    theirs = torch_tanh_normal(*parameters)[0].log_prob(torch.tensor(value))
    assert error(TanhNormal(loc, scale).log_prob(value), theirs.detach()) < 1e-13
    gradient = jax.grad(lambda d: d.log_prob(value).sum())(TanhNormal(loc, scale))
    expected = torch.autograd.grad(theirs.sum(), parameters)
    assert error(gradient.loc, expected[0]) < 1e-13
    assert error(gradient.scale, expected[1]) < 1e-13


def test_tanh_normal_sample_and_log_prob():
    loc, scale = rng(23).normal(size=500) + 1, np.full(500, 3.0)
    action, logprob = TanhNormal(loc, scale).sample_and_log_prob(KEY)
    before = np.asarray(Normal(loc, scale).sample(KEY))
    assert before.max() > 8.5 and before.min() > -10  # torch's softplus drops 2e-9 below -10
    # The cache makes torch use the draw before tanh as well.
    theirs, transform = torch_tanh_normal(torch.tensor(loc), torch.tensor(scale))
    expected = theirs.log_prob(transform(torch.tensor(before)))
    assert error(logprob, expected) < 1e-13
    # Another draw would be elsewhere; NumPy's tanh and XLA's may round apart, by an ulp.
    np.testing.assert_allclose(action, np.tanh(before), rtol=1e-15, equal_nan=False)
    np.testing.assert_array_equal(TanhNormal(loc, scale).sample(KEY), action)
    # Pathwise gradients, as SAC needs them.
    slope = jax.grad(lambda d: d.sample_and_log_prob(KEY)[0].sum())(TanhNormal(loc, scale)).loc
    assert error(slope, 1 - np.tanh(before) ** 2) < 1e-13
    # Far from the origin nothing overflows or is lost.
    action, logprob = TanhNormal(np.float32([80, -80]), np.float32([1, 1])).sample_and_log_prob(KEY)
    assert np.array_equal(action, [1, -1]) and (np.asarray(logprob) > 140).all()


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (0.7, 0.3), (-2.0, 1.5), (0.5, 4.0)])
def test_tanh_normal_density_integrates_to_its_probabilities(loc, scale):
    """And the Normal's own log-probability of the action before tanh does not."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    policy, law = TanhNormal(*np.float64([loc, scale])), stats.norm(loc, scale)
    edges = np.array([-0.999, -0.9, -0.5, 0.0, 0.4, 0.8, 0.95, 0.999])
    low, high = edges[:-1, None], edges[1:, None]
    value = (low + high) / 2 + (high - low) / 2 * nodes
    mass = ((high - low) / 2 * weights * np.exp(policy.log_prob(value))).sum(1)
    expected = np.diff(law.cdf(np.arctanh(edges)))
    np.testing.assert_allclose(mass, expected, rtol=1e-7, atol=1e-9)
    guide = ((high - low) / 2 * weights * law.pdf(np.arctanh(value))).sum(1)
    assert np.abs(guide - expected).max() > 0.02


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_tanh_normal_at_the_edges(dtype):
    value = jnp.asarray([-1.0, 1.0, np.nextafter(1.0, 0.0), 0.5], dtype)
    scores = jax.vmap(jax.value_and_grad(lambda d, v: d.log_prob(v), (0, 1)), (None, 0))
    logprob, (for_policy, for_value) = scores(TanhNormal(np.float32(0.2), np.float32(2.0)), value)
    assert np.isfinite(flat([logprob, for_policy.loc, for_policy.scale, for_value])).all()
    np.testing.assert_array_equal(for_value[:2], 0)
    u = np.arctanh(
        1 - {"float64": 2**-53, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    )
    exact = stats.norm(0.2, 2.0).logpdf(u) - 2 * (np.log(2) - u - np.log1p(np.exp(-2 * u)))
    np.testing.assert_allclose(logprob[1], exact, rtol=1e-5)


def exact_tanh_entropy(loc, scale):
    def integrand(t):
        u = abs(loc + scale * t)
        return (
            np.exp(-t * t / 2) / np.sqrt(2 * np.pi) * 2 * (np.log(2) - u - np.log1p(np.exp(-2 * u)))
        )

    kink = float(np.clip(-loc / scale, -10, 10))
    parts = [
        integrate.quad(integrand, a, b, epsabs=1e-12, limit=200)[0]
        for a, b in [(-10, kink), (kink, 10)]
    ]
    return stats.norm(loc, scale).entropy() + sum(parts)


@pytest.mark.parametrize(
    ("scale", "tolerance"),
    [(0.05, 1e-12), (1.0, 1e-12), (2.0, 1e-12), (3.0, 1e-10), (5.0, 1e-6), (8.0, 1e-4)],
)
def test_tanh_normal_entropy_equals_the_integral(scale, tolerance):
    locs, step = np.array([0.0, 0.8, -3.0]), 1e-4 * scale
    low, exact, high = (
        [exact_tanh_entropy(loc, scale + shift) for loc in locs] for shift in (-step, 0, step)
    )
    policy = TanhNormal(locs, np.full(3, scale))
    np.testing.assert_allclose(policy.entropy(), exact, rtol=0, atol=tolerance)
    slope = jax.grad(lambda d: d.entropy().sum())(policy).scale
    differences = (np.array(high) - np.array(low)) / (2 * step)
    np.testing.assert_allclose(slope, differences, rtol=0, atol=max(1e-5, 10 * tolerance))


def test_tanh_normal_in_sample_logits():
    policy = TanhNormal(rng(24).normal(size=(4, 2)), np.exp(rng(25).normal(size=2)))
    action, logprob, total = draw(policy, KEY)
    assert action.shape == (4, 2) and (np.abs(action) < 1).all()
    assert error(logprob, policy.log_prob(action).sum(1)) < 1e-14
    assert error(total, policy.entropy().sum(1)) < 1e-14


@pytest.mark.parametrize(
    ("dtype", "mask_dtype"), [("float64", bool), ("float32", np.int8), ("bfloat16", np.int64)]
)
def test_mask_logits(dtype, mask_dtype):
    logits = jnp.asarray(rng(26).normal(size=(2, 3, 4)), dtype)
    mask = rng(27).random((2, 3, 4)) < 0.5
    mask[..., 1] = True
    masked = mask_logits(logits, mask.astype(mask_dtype))
    assert masked.dtype == logits.dtype
    np.testing.assert_array_equal(masked, np.where(mask, logits, -INF))
    pair = mask_logits((logits, logits[0]), [mask, mask[0]])
    assert isinstance(pair, tuple) and len(pair) == 2
    np.testing.assert_array_equal(pair[1], masked[0])
    gradient = jax.jit(jax.grad(lambda x: jnp.exp(mask_logits(x, mask)).sum()))(logits)
    np.testing.assert_array_equal(gradient != 0, mask)


def test_masked_actions_are_never_drawn():
    mask = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]], np.int8)
    logits = mask_logits(100 * rng(28).normal(size=(4, 3)), mask)
    for seed in range(50):
        drawn = sample(logits, jax.random.key(seed))
        assert mask[np.arange(4), drawn].all()


def test_mask_that_allows_nothing():
    logits, mask = np.zeros((3, 4)), np.ones((3, 4), bool)
    mask[1] = False
    with pytest.raises(ValueError, match=r"no action in row 1$"):
        mask_logits(logits, mask)
    with pytest.raises(ValueError, match=r"no action in row \[0, 1\]$"):
        mask_logits((logits, logits[None]), (mask | True, mask[None]))
    masked = jax.jit(mask_logits)(logits, mask)
    np.testing.assert_array_equal(np.isnan(masked).all(1), [False, True, False])
    np.testing.assert_array_equal(np.asarray(masked)[::2], 0)
    _, logprob, total = score(masked, np.zeros(3, int))
    np.testing.assert_array_equal(np.isnan(logprob), [False, True, False])
    np.testing.assert_allclose(np.asarray(total)[::2], np.log(4))


@pytest.mark.parametrize(
    ("logits", "mask", "kind", "message"),
    [
        (np.zeros((3, 4)), np.ones(4, bool), ValueError, r"\(4,\) .*\(3, 4\)"),
        (np.zeros((3, 4)), np.ones((3, 4)), TypeError, "not float64 .*float64"),
        (
            PAIR,
            (np.ones((4, 3), bool),),
            ValueError,
            "2 arrays of logits need as many masks; got 1",
        ),
        (PAIR, np.ones((4, 5), bool), ValueError, "as many masks; got ndarray"),
        (PAIR, (np.ones((4, 3), bool),) * 2, ValueError, r"\(4, 3\) .*\(4, 2\)"),
    ],
)
def test_masks_that_do_not_fit(logits, mask, kind, message):
    with pytest.raises(kind, match=message):
        mask_logits(logits, mask)


def test_the_eager_checks_leave_nothing_in_a_compiled_program():
    assert "callback" not in str(jax.make_jaxpr(sample_logits)(LOGITS, np.zeros(4, int)))
