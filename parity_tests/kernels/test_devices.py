"""What GPUs and TPUs compute in fewer launches, held to XLA's operations, here on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puffer_jax.kernels import OPERATIONS
from puffer_jax.kernels.gpu import mingru as gpu
from puffer_jax.kernels.gpu.recurrence import recurrence
from puffer_jax.nn import sampling
from puffer_jax.ppo import jax_rollout, optimizers  # noqa: F401  (they declare operations)

pytestmark = pytest.mark.usefixtures("unoptimised")

# Numbers near 1, added in another order: the roundings of the longest sum, 455 of them, grow like
# their root, 21 epsilons; three times as much is a fault.
CLOSE = dict(rtol=64 * np.finfo(float).eps, atol=64 * np.finfo(float).eps)


def both(operation, *arrays, **options):
    """The results of the GPU's form and of XLA's, in NumPy; the TPU's is the GPU's."""
    ways = OPERATIONS[operation].implementations
    assert ways["gpu"] is ways["tpu"]
    run = [jax.jit(lambda *x, f=ways[way]: f(*x, **options)) for way in ("gpu", "xla")]
    return [jax.tree.map(np.asarray, f(*arrays)) for f in run]


def some(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def test_sums_and_norms_of_several_arrays():
    arrays = some(3, 7), some(3, 7, seed=1), some(3, 7, seed=2)
    np.testing.assert_allclose(*both("sums", *arrays), **CLOSE)
    np.testing.assert_allclose(*both("norm", some(3), some(2, 5), some(1)), **CLOSE)


@pytest.mark.parametrize("bad", [(), (0,), (1,), (2, 1), (3,)])
def test_the_first_array_that_is_not_finite(bad):
    arrays = [some(3), some(2, 4), some(), some(5).astype(jnp.float32)]
    for i in bad:
        arrays[i] = arrays[i].reshape(-1).at[-1].set(jnp.nan if i % 2 else -jnp.inf)
    found, expected = both("first_nonfinite", *arrays)
    assert found == expected == min(bad, default=len(arrays))


LOGITS = np.array([
    [0.3, -1.0, 2.0],
    [1e30, -1e30, 0.0],
    [-np.inf, 0.5, 0.25],
    [np.nan, 0.0, 0.0],
    [np.inf, 0.0, 0.0],
    [-np.inf, -np.inf, -np.inf],
    [4.0, 4.0, 4.0],
])  # fmt: skip


@pytest.mark.parametrize("action", [(0, 0, 1, 0, 0, 0, 2), (2, 1, 0, 1, 2, 0, 3), (-1,) * 7])
def test_scores_of_actions(action):
    action = jnp.asarray(action)
    for found, expected in zip(*both("score", LOGITS, action), strict=True):
        np.testing.assert_allclose(found, expected, **CLOSE)

    def gradient(way):
        # The logits of masked rows and actions, and of bad rows, get gradients that are finite.
        def objective(logits):
            logprob, entropy = OPERATIONS["score"].implementations[way](logits, action)
            parts = [jnp.where(jnp.isfinite(x), x, 0) for x in (logprob, entropy)]
            return (parts[0] * jnp.arange(1.0, 8)).sum() + (parts[1] ** 2).sum()

        return jax.grad(objective)(LOGITS)

    np.testing.assert_allclose(gradient("gpu"), gradient("xla"), **CLOSE)


def test_draws_are_the_same():
    logits, key = some(64, 5) * 3, jax.random.key(3)
    found, expected = both("sample", key, logits, None, component=1, components=2)
    np.testing.assert_array_equal(found[0], expected[0])
    for x, y in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(x, y, **CLOSE)


def test_many_actions_are_left_to_reductions():
    assert "gpu" in OPERATIONS["score"].implementations
    takes = OPERATIONS["score"]._kernels["gpu"].takes
    assert takes(some(2, 32), some(2)) and not takes(some(2, 33), some(2))
    assert sampling._FEW == 32


def test_muons_matrices_in_batches():
    shapes = (128, 4), (2, 128), (1, 128), (16, 3, 8), (40, 9), (40, 9)
    tensors = [some(*shape, seed=i) for i, shape in enumerate(shapes)]
    found, expected = both("orthogonalize", *tensors, dtype=None)
    for x, y in zip(found, expected, strict=True):
        # Five steps of degree five enlarge roundings some thousandfold.
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)
    # Those of the largest network stay by themselves: padded, they would cost more than launches.
    groups = optimizers._groups([(512, 3136), (64, 576), (32, 256), (1, 512), (512, 3136)])
    assert [sorted(members) for members, _ in groups] == [[0, 4], [1, 2, 3]]
    assert [room for _, room in groups] == [(512, 3136), (64, 576)]


def test_a_step_of_the_lstm_by_two_products():
    weights = some(12, 4), some(12, 3), some(12), some(12, seed=1)
    arrays = *weights, some(5, 4), some(5, 3), some(5, 3, seed=1)
    found, expected = both("lstm_step", *arrays, dtype=None)
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("rows, time", [(1, 1), (65, 7)])
def test_the_recurrence_of_advantages(rows, time):
    a, b, weights = (some(rows, time, seed=i) for i in range(3))
    xla = OPERATIONS["recurrence"].implementations["xla"]

    def gradients(compute):
        return jax.value_and_grad(lambda a, b: (compute(a, b) * weights).sum(), (0, 1))(a, b)

    for x, y in zip(
        jax.tree.leaves(gradients(lambda a, b: recurrence(a, b, interpret=True))),
        jax.tree.leaves(gradients(xla)),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, **CLOSE)
    several = jax.vmap(lambda a, b: recurrence(a, b, interpret=True))(a[None], b[None])
    np.testing.assert_allclose(several[0], xla(a, b), **CLOSE)


@pytest.mark.parametrize("starting", [False, True])
@pytest.mark.parametrize("hidden", [1, 130])
def test_a_layer_of_the_mingru(hidden, starting):
    arrays = some(5, 3, hidden), some(5, 3, 3 * hidden), some(3, hidden)
    starts = some(5, 3) > 0.5 if starting else jnp.zeros((0, 0), bool)
    d_results = some(5, 3, hidden, seed=1), some(3, hidden, seed=1)
    xla = OPERATIONS["mingru_layer"].implementations["xla"]

    @jax.jit
    def run(arrays, d_results):
        results, kept = gpu.mingru(True, *arrays, starts, interpret=True)
        without, _ = gpu.mingru(False, *arrays, starts, interpret=True)
        gradients = gpu.mingru_gradient((*arrays, starts), kept, d_results, interpret=True)
        plain, back = jax.vjp(lambda *some: xla(*some, starts), *arrays)
        return ((results, gradients), (plain, back(d_results))), (results, without)

    for pair in run(arrays, d_results):
        for x, y in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(x, y, **CLOSE)
