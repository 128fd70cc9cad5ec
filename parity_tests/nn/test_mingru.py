"""MinGRU: a loop in torch, and the original's log space, are the judges."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from gymnasium.spaces import Box, Discrete
from support.bars import BARS, relative_error, stub_env

import puffer_jax
from puffer_jax.kernels import use
from puffer_jax.kernels.mingru import mingru_layer
from puffer_jax.kernels.recurrence import recurrence_onwards
from puffer_jax.nn.cores import Core
from puffer_jax.policies.recurrent import with_core

pytestmark = pytest.mark.usefixtures("quick")

BATCH, TIME, HIDDEN = 5, 19, 6  # more steps than the recurrence takes one by one everywhere
FORWARD, GRADIENT = BARS["forward"]["float64"], BARS["gradient"]["float64"]


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def mingru(layers, seed=0, scale=1.0):
    core = puffer_jax.MinGRU(HIDDEN, layers, rngs=nnx.Rngs(seed), param_dtype=jnp.float64)
    for layer in core.layers:
        layer.kernel[...] *= scale
    return core


def candidate(u):
    return torch.where(u >= 0, u + 0.5, u.sigmoid())


def in_steps(weights, x, h, done=None):
    """What acting computes, step after step: the outputs and the last state."""
    outputs, h = [], list(h.unbind(1))
    for t in range(x.shape[1]):
        y = x[:, t]
        for i, weight in enumerate(weights):
            u, gate, p = (y @ weight.T).chunk(3, dim=-1)
            before = h[i] if done is None else h[i] * ~done[:, t, None]
            z = gate.sigmoid()
            h[i] = (1 - z) * before + z * candidate(u)
            y = p.sigmoid() * h[i] + (1 - p.sigmoid()) * y
        outputs.append(y)
    return torch.stack(outputs, 1), torch.stack(h, 1)


def in_log_space(weights, x):
    """The original's training form, which begins with the zero state."""
    for weight in weights:
        u, gate, p = (x @ weight.T).chunk(3, dim=-1)
        log_kept = -torch.nn.functional.softplus(gate)
        log_added = -torch.nn.functional.softplus(-gate) + candidate(u).log()
        total = log_kept.cumsum(1)
        h = (total + torch.logcumsumexp(log_added - total, 1)).exp()
        x = p.sigmoid() * h + (1 - p.sigmoid()) * x
    return x


def errors(core, theirs, x, h, done=None):
    """Largest errors of outputs and last states, and of gradients by x and weights, and by h."""
    weights = [torch.from_numpy(w).requires_grad_() for w in puffer_jax.state_dict(core).values()]
    inputs = [torch.from_numpy(a).requires_grad_() for a in (x, h)]
    outputs, last = theirs(weights, *inputs)
    scales = normal(*outputs.shape, seed=1)
    loss = (outputs * torch.from_numpy(scales)).sum() + last.square().sum()
    expected = torch.autograd.grad(loss, [*inputs, *weights])
    graphdef, params = puffer_jax.split(core)

    def ours(x, h, params):
        y, state = puffer_jax.merge(graphdef, params).scan(x, {"mingru_h": h}, done)
        return (y * scales).sum() + jnp.square(state["mingru_h"]).sum(), (y, state["mingru_h"])

    gradients, found = jax.jit(jax.grad(ours, (0, 1, 2), has_aux=True))(x, h, params)
    named = puffer_jax.state_dict(puffer_jax.merge(graphdef, gradients[2]))
    assert list(named) == [f"layers.{i}.weight" for i in range(len(weights))]
    forward = map(relative_error, found, (outputs.detach(), last.detach()))
    by_x, by_h, *by_weights = map(relative_error, [*gradients[:2], *named.values()], expected)
    return max(forward), max(by_x, *by_weights), by_h


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("layers", [1, 4])
def test_it_is_a_loop_in_torch(layers, implementation):
    core, x, h = mingru(layers), normal(BATCH, TIME, HIDDEN), normal(BATCH, layers, HIDDEN)
    done = normal(BATCH, TIME) > 0.5
    assert done.any() and not done.all()
    with use(implementation):
        theirs = partial(in_steps, done=torch.from_numpy(done))
        forward, *gradients = errors(core, theirs, x, h, jnp.asarray(done))
    assert forward <= FORWARD and max(gradients) <= GRADIENT


@pytest.mark.parametrize("scale, bar", [(1, 1e-13), (15, 1e-11)])
def test_it_is_the_original_in_log_space(scale, bar):
    # Sums of up to 19 * 30 in log space, so the original's rounding is that much larger.
    core, x = mingru(1, scale=scale), normal(BATCH, TIME, HIDDEN)
    if scale > 1:
        gates = x @ np.asarray(core.layers[0].kernel[...])[:, HIDDEN : 2 * HIDDEN]
        x *= 30 / np.abs(gates).max()
    zero = np.zeros((BATCH, 1, HIDDEN))

    def theirs(weights, x, h):
        return in_log_space(weights, x), in_steps(weights, x, h)[1]

    forward, gradient, _ = errors(core, theirs, x, zero)  # the original has no state to begin with
    assert max(forward, gradient) <= bar


def test_step_repeats_scan_and_done_resets_at_its_own_step():
    core, x = mingru(2), jnp.asarray(normal(BATCH, TIME, HIDDEN))
    done = jnp.asarray(normal(BATCH, TIME) > 0.5)
    first = {"mingru_h": jnp.asarray(normal(BATCH, 2, HIDDEN))}
    outputs, last = core.scan(x, first, done)
    state = first
    for t in range(TIME):
        state = {"mingru_h": state["mingru_h"] * ~done[:, t, None, None]}
        y, state = core.step(x[:, t], state)
        assert relative_error(outputs[:, t], y) <= FORWARD
    assert relative_error(last["mingru_h"], state["mingru_h"]) <= FORWARD
    # A segment is the episodes in it, each by itself from the zero state.
    row = int(jnp.argmax(done[:, 1:].any(1)))
    start = int(jnp.argmax(done[row, 1:])) + 1
    alone, _ = core.scan(x[row, None, start:], core.initial_state(1), done[row, None, start:])
    assert relative_error(outputs[row, None, start:], alone) <= FORWARD


def test_both_ways_through_the_recurrence_agree():
    a, b = (jnp.asarray(normal(40, 3, 4, seed=seed)) for seed in (0, 1))
    # Gates up to +-30, and resets.
    a = jnp.where(a > 1, 0, jax.nn.sigmoid(30 * a / jnp.abs(a).max()))
    first, scales = jnp.asarray(normal(3, 4)), normal(40, 3, 4, seed=2)

    def run(a, b, first):
        loss = lambda *arrays: (recurrence_onwards(*arrays) * scales).sum()  # noqa: E731
        return recurrence_onwards(a, b, first), *jax.grad(loss, (0, 1, 2))(a, b, first)

    found = {}
    for implementation in ("cpu", "xla"):
        with use(implementation):
            found[implementation] = jax.jit(run)(a, b, first)
    assert max(map(relative_error, found["cpu"], found["xla"])) <= 1e-13


def test_a_recurrence_backwards_is_the_forward_one_turned_over():
    a, b = (jnp.asarray(normal(12, 3, seed=seed)) for seed in (0, 1))
    first = jnp.asarray(normal(3))
    for implementation in ("cpu", "xla"):
        with use(implementation):
            backwards = jax.jit(partial(recurrence_onwards, reverse=True))(a, b, first)
            forwards = jax.jit(recurrence_onwards)(a[::-1], b[::-1], first)[::-1]
        # The same sums, except where pairs are joined in another order.
        assert relative_error(backwards, forwards) <= FORWARD


def test_gradients_of_gradients():
    """The gradient is written out; differentiated again it is that of a plain loop."""
    x, projected, h = normal(4, 2, 3), normal(4, 2, 9), normal(2, 3)
    starts = jnp.asarray(normal(4, 2) > 0.5)

    def plain(x, projected, h):
        outputs = []
        for x_t, row, start in zip(x, projected, starts, strict=True):
            u, g, p = jnp.split(row, 3, axis=-1)
            z, p = jax.nn.sigmoid(g), jax.nn.sigmoid(p)
            candidate = jnp.where(u >= 0, u + 0.5, jax.nn.sigmoid(u))
            h = (1 - z) * jnp.where(start[:, None], 0, h) + z * candidate
            outputs.append(p * h + (1 - p) * x_t)
        return jnp.stack(outputs), h

    def twice(layer):
        def loss(*arrays):
            return sum(jnp.square(part).sum() for part in layer(*arrays))

        def slope(*arrays):
            return sum(jnp.square(part).sum() for part in jax.grad(loss, (0, 1, 2))(*arrays))

        return jax.jit(jax.grad(slope, (0, 1, 2)))(x, projected, h)

    ours = twice(lambda x, projected, h: mingru_layer(x, projected, h, starts))
    assert max(map(relative_error, ours, twice(plain))) <= GRADIENT


def test_it_never_overflows():
    core = puffer_jax.MinGRU(HIDDEN, rngs=nnx.Rngs(0))
    x = jnp.asarray(1e4 * normal(BATCH, TIME, HIDDEN), jnp.float32)

    def loss(x):
        return core.scan(x, core.initial_state(BATCH))[0].sum()

    for implementation in ("cpu", "xla"):
        with use(implementation):
            value, gradient = jax.jit(jax.value_and_grad(loss))(x)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_it_is_initialised_as_torchs_linear():
    core = puffer_jax.MinGRU(64, 3, rngs=nnx.Rngs(0))
    assert isinstance(core, Core)
    bound = 1 / math.sqrt(64)
    weights = puffer_jax.state_dict(core)
    assert {name: w.shape for name, w in weights.items()} == {
        f"layers.{i}.weight": (192, 64) for i in range(3)
    }
    for weight in weights.values():
        assert bound * 0.99 < np.abs(weight).max() <= bound
        assert relative_error(weight.std(), bound / math.sqrt(3)) < 0.03
    with pytest.raises(ValueError, match="num_layers is 0; there must be at least one"):
        puffer_jax.MinGRU(64, 0, rngs=nnx.Rngs(0))


def test_in_bfloat16_it_keeps_its_states():
    core = puffer_jax.MinGRU(HIDDEN, 2, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    exact = puffer_jax.MinGRU(HIDDEN, 2, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(BATCH, TIME, HIDDEN), jnp.float32)
    y, state = core.scan(x, core.initial_state(BATCH))
    assert y.dtype == state["mingru_h"].dtype == jnp.float32
    assert 1e-5 < relative_error(y, exact.scan(x, exact.initial_state(BATCH))[0]) < 3e-2


def test_a_policy_around_it_is_recognised(tmp_path):
    env = stub_env(Box(-1, 1, (4,)), Discrete(3))
    inner = puffer_jax.Default(env, HIDDEN, rngs=nnx.Rngs(0))
    for ours in (
        with_core("mingru", env, inner, rngs=nnx.Rngs(1)),
        puffer_jax.Recurrent(
            env, inner, puffer_jax.MinGRU(HIDDEN, 3, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(2)
        ),
    ):
        tensors = puffer_jax.state_dict(ours)
        found = puffer_jax.policy_from_checkpoint(tensors)
        puffer_jax.save_weights(ours, tmp_path / "x.safetensors")
        described = puffer_jax.policy_from_checkpoint(tmp_path / "x.safetensors")
        for other in (found, described):
            assert other.core.num_layers == ours.core.num_layers
            for name, tensor in puffer_jax.state_dict(other).items():
                np.testing.assert_array_equal(tensor, tensors[name])
