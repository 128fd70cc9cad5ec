"""The LSTM for GPUs and TPUs, kernels in Pallas's interpreter: a loop in torch is the judge.

What their compilers make of them is tested without devices, too, elsewhere. Nothing here says how
fast they are.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.bars import BARS, relative_error

from puffer_jax.kernels import OPERATIONS, gpu, stepped, tpu, use
from puffer_jax.kernels.lstm import lstm_scan, scan_by
from puffer_jax.kernels.tpu.lstm import mosaic_precision

pytestmark = pytest.mark.usefixtures("quick")

LOOPS = {"gpu": gpu.INTERPRETED, "tpu": tpu.INTERPRETED, "xla": stepped.LOOPS}
# One block and more, of rows and of columns; one step; sizes that fill their blocks, and odd ones.
SHAPES = {
    "gpu": {"odd": (3, 4, 5, 20), "blocks": (17, 1, 3, 130), "whole": (16, 2, 2, 32)},
    "tpu": {"odd": (3, 4, 5, 20), "blocks": (257, 1, 3, 130), "whole": (16, 2, 2, 128)},
    "xla": {"odd": (3, 4, 5, 20)},
}
CASES = [(where, shape) for where, shapes in SHAPES.items() for shape in shapes]


def drawn(batch, time, inputs, hidden, dtype="float64"):
    """The arguments of `lstm_scan`; each of the first rows has `done` at another step."""
    random = np.random.default_rng(0)
    shapes = [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,)]
    shapes += [(batch, time, inputs), (batch, hidden), (batch, hidden)]
    scales = [1, 1 / np.sqrt(hidden), 1, 1, 1, 1]
    arrays = [s * random.standard_normal(n) for s, n in zip(scales, shapes, strict=True)]
    done = np.eye(batch, time, dtype=bool) | (random.random((batch, time)) < 0.2)
    return [jnp.asarray(array, dtype) for array in arrays], jnp.asarray(done)


def judged(arrays, done):
    """Outputs, last states, and the gradients of every array, by torch in float64."""
    weight_ih, weight_hh, bias, x, *start = arrays = [
        torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in arrays
    ]
    h, c = start
    outputs = []
    for t in range(x.shape[1]):
        if done is not None:
            keep = torch.tensor(~np.asarray(done)[:, t, None])
            h, c = h * keep, c * keep
        gates = x[:, t] @ weight_ih.T + h @ weight_hh.T + bias
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    results = torch.stack(outputs, 1), h, c
    sum(
        (r * torch.tensor(w)).sum() for r, w in zip(results, weights(results), strict=True)
    ).backward()
    return [r.detach() for r in results], [a.grad for a in arrays]


def weights(results):
    """Of the results in a loss: all different, and none zero."""
    return [np.cos(np.arange(np.prod(r.shape), dtype=np.float64)).reshape(r.shape) for r in results]


@partial(jax.jit, static_argnames=("loops", "dtype"))
def everything(loops, arrays, done, dtype=None):
    """As `judged`, by our kernels; and the results without gradients, by another program."""

    def function(*arrays):
        return scan_by(loops, *arrays, done, dtype=dtype)

    results, backward = jax.vjp(function, *arrays)
    d = tuple(jnp.asarray(w, r.dtype) for w, r in zip(weights(results), results, strict=True))
    return results, backward(d), function(*arrays)


def assert_close(found, exact, bar):
    for ours, theirs in zip(found, exact, strict=True):
        assert relative_error(ours, theirs) <= bar


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("where, shape", CASES)
def test_float64(where, shape, resets):
    arrays, done = drawn(*SHAPES[where][shape])
    done = done if resets else None
    results, gradients = judged(arrays, done)
    ours, d_ours, without = everything(LOOPS[where], arrays, done)
    assert_close(ours, results, BARS["forward"]["float64"])
    assert_close(without, results, BARS["forward"]["float64"])
    assert_close(d_ours, gradients, BARS["gradient"]["float64"])


@pytest.mark.parametrize("where", LOOPS)
def test_float32_and_bfloat16(where):
    arrays, done = drawn(5, 3, 4, 40, "float32")
    results, gradients = judged(arrays, done)
    ours, d_ours, without = everything(LOOPS[where], arrays, done)
    assert_close([*ours, *without], results * 2, BARS["forward"]["float32"])
    assert_close(d_ours, gradients, BARS["gradient"]["float32"])
    # Products of bfloat16: states and gradients keep their dtype. An operand is rounded by 2**-9,
    # the gates are twice; errors of the three steps add up, and gradients have twice as many.
    ours, d_ours, without = everything(LOOPS[where], arrays, done, jnp.bfloat16)
    assert {a.dtype for a in (*ours, *d_ours)} == {np.dtype("float32")}
    assert_close([*ours, *without], results * 2, 2**-6)
    assert_close(d_ours, gradients, 2**-5)
    # All of bfloat16: what was rounded before is no error of ours.
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    results, gradients = judged(arrays, done)
    ours, d_ours, _ = everything(LOOPS[where], arrays, done)
    assert {a.dtype for a in (*ours, *d_ours)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(ours, results, 2**-6)
    assert_close(d_ours, gradients, 2**-5)


@pytest.mark.parametrize("where", LOOPS)
def test_a_population(where):
    """Under `vmap` a population's members are blocks of the same launch."""
    members = [drawn(3, 2, 2, 8)[0] for _ in range(2)]
    arrays = [jnp.stack([a, 2 * b]) for a, b in zip(*members, strict=True)]
    run = partial(everything, LOOPS[where], done=None)
    together = jax.vmap(run)(arrays)
    for member in range(2):
        alone = run([array[member] for array in arrays])
        for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            # The products of a batch may be summed in another order.
            assert relative_error(ours[member], theirs) <= BARS["gradient"]["float64"]


def lowered(platform, *names, hidden=128, dtype="float32"):
    """The program of a forward pass for a platform, before it is compiled."""
    arrays, done = drawn(16, 2, 4, hidden, dtype)
    with use(*names):
        return lstm_scan.trace(*arrays, done).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("precision", ["high", "tensorfloat32", "F32_F32_F32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_precision_of_products_is_computed(precision, dtype):
    """Mosaic has one pass of bfloat16 and float32, and raises an error for what lies between."""
    arrays, done = drawn(16, 2, 4, 128, dtype)
    run = jax.jit(lambda *arrays: jax.vjp(lambda *x: lstm_scan(*x, done), *arrays)[1])
    for platform, where in (("cuda", "gpu"), ("tpu", "tpu")):
        with use("xla", where), jax.default_matmul_precision(precision):
            run.trace(*arrays).lower(lowering_platforms=(platform,))
    with jax.default_matmul_precision(precision):
        found = mosaic_precision(arrays[0].dtype)
    full = jax.lax.Precision.HIGHEST
    assert found == (full if dtype == "float32" else jax.lax.Precision.DEFAULT)


def test_who_runs_the_loop():
    """Kernels where one is for the platform and takes the arrays; otherwise XLA's loop."""
    for platform, where, call in (
        ("cuda", "gpu", "xla.gpu.triton"),
        ("tpu", "tpu", "tpu_custom_call"),
    ):
        program = lowered(platform, "xla", where)
        assert call in program and "while" not in program
        assert call not in lowered(platform, "xla")
        program = lowered(platform, "xla", where, dtype="float64")
        assert call not in program and "while" in program
    assert "triton" not in lowered("cuda", "xla", "gpu", hidden=260)  # too much to stream
    assert "triton" not in lowered("cpu", "xla", "gpu")
    # Nothing of them is even traced where nobody asks for them.
    arrays, done = drawn(16, 2, 4, 32, "float32")
    assert "pallas" not in str(jax.make_jaxpr(lstm_scan)(*arrays, done))


@pytest.mark.parametrize(
    "backend, native, expected", [("gpu", "1", ("gpu",)), ("tpu", "1", ("tpu",)), ("gpu", "0", ())]
)
def test_kernels_of_the_default_backend_are_considered(monkeypatch, backend, native, expected):
    monkeypatch.setenv("PUFFER_JAX_NATIVE", native)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    arrays, done = drawn(16, 2, 4, 32, "float32")
    assert OPERATIONS["lstm_scan"].kernels(*arrays, done, dtype=None) == expected
