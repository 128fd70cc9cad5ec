"""The LSTM over one step and over time."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree

from puffer_jax.kernels import cpu, gpu, stepped, tpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.cpu import native
from puffer_jax.kernels.over_time import Loops, lstm_over_time
from puffer_jax.kernels.stepped import at, put


def _gates(
    weight: Array,
    bias: Array,
    inputs: Float[Array, "batch input_and_hidden"],
    dtype: DTypeLike | None,
) -> tuple[Array, Array, Array, Array]:
    """The gates (i, f, g, o) after their non-linearities, each (batch, hidden)."""
    if dtype is None:
        gates = inputs @ weight.T + bias
    else:
        gates = (inputs.astype(dtype) @ weight.astype(dtype).T).astype(bias.dtype) + bias
    return _activated(gates)


def _activated(gates: Float[Array, "batch gates"]) -> tuple[Array, Array, Array, Array]:
    i, f, g, o = jnp.split(gates, 4, axis=1)
    return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def lstm_cell(
    weight: Float[Array, "gates input_and_hidden"],
    bias: Float[Array, "gates"],
    x: Float[Array, "batch input"],
    h: Float[Array, "batch hidden"],
    c: Float[Array, "batch hidden"],
    dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    """The one LSTM step behind both evaluation and training: the new h and c.

    Input and state share one matmul, in `dtype` (default: that of the weights); the gates and
    the state stay in the dtype of the weights, so a carried state never changes its dtype.
    """
    i, f, g, o = _gates(weight, bias, _join(x, h), dtype)
    c = f * c + i * g
    return o * jnp.tanh(c), c


def lstm_step(
    weight_ih: Float[Array, "gates input"],
    weight_hh: Float[Array, "gates hidden"],
    bias_ih: Float[Array, "gates"],
    bias_hh: Float[Array, "gates"],
    x: Float[Array, "batch input"],
    h: Float[Array, "batch hidden"],
    c: Float[Array, "batch hidden"],
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "batch hidden"], Float[Array, "batch hidden"]]:
    """`lstm_cell` with weights and biases apart: the new h and c."""
    return _step(weight_ih, weight_hh, bias_ih, bias_hh, x, h, c, dtype=dtype)


def _step_xla(*arrays: Array, dtype: DTypeLike | None) -> tuple[Array, Array]:
    weight_ih, weight_hh, bias_ih, bias_hh, x, h, c = arrays
    weight = jnp.concatenate([weight_ih, weight_hh], axis=1)
    return lstm_cell(weight, bias_ih + bias_hh, x, h, c, dtype)


def _step_apart(*arrays: Array, dtype: DTypeLike | None) -> tuple[Array, Array]:
    """Two products, since to join the weights costs a GPU or a TPU more than one of them."""
    weight_ih, weight_hh, bias_ih, bias_hh, x, h, c = arrays

    def product(x: Array, weight: Array) -> Array:
        x, weight = (v.astype(dtype or h.dtype) for v in (x, weight))
        return jnp.matmul(x, weight.T, preferred_element_type=h.dtype)

    gates = product(x, weight_ih) + product(h, weight_hh) + (bias_ih + bias_hh)
    i, f, g, o = _activated(gates)
    c = f * c + i * g
    return o * jnp.tanh(c), c


def _step_apart_takes(*arrays: Array, dtype: DTypeLike | None) -> bool:
    weight_ih, *_, h, c = arrays
    return weight_ih.dtype == h.dtype == c.dtype


def _step_cpu(*arrays: Array, dtype: DTypeLike | None) -> tuple[Array, Array]:
    return _step_kernel(*arrays)


@jax.custom_vjp
def _step_kernel(*arrays: Array) -> tuple[Array, Array]:
    *weights, x, h, c = arrays
    return cpu.lstm_step(*weights, x.astype(h.dtype), h, c)


_step_kernel.defvjp(
    lambda *arrays: (_step_kernel(*arrays), arrays),
    # Steps are for acting: their gradient is rarely asked for.
    lambda arrays, d_state: jax.vjp(partial(_step_xla, dtype=None), *arrays)[1](d_state),
)


def _step_cpu_takes(*arrays: Array, dtype: DTypeLike | None) -> bool:
    *weights, x, h, c = arrays
    return _kernels_compute_in(dtype, x, *weights, h, c)


def _kernels_compute_in(dtype: DTypeLike | None, x: Array, *others: Array) -> bool:
    # `x` may have any dtype: it is cast to that of the others.
    return dtype in (None, others[0].dtype) and x.size > 0 and native.takes(*others)


_step = Operation(
    "lstm_step",
    xla=_step_xla,
    cpu=Kernel(_step_cpu, takes=_step_cpu_takes),
    gpu=Kernel(_step_apart, takes=_step_apart_takes),
    tpu=Kernel(_step_apart, takes=_step_apart_takes),
)


def _join(x: Array, h: Array) -> Array:
    return jnp.concatenate([x.astype(h.dtype), h], axis=1)


# Jitted here so that eager calls do not trace and compile the loop anew each time.
@partial(jax.jit, static_argnames="dtype")
def lstm_scan(
    weight_ih: Float[Array, "gates input"],
    weight_hh: Float[Array, "gates hidden"],
    bias: Float[Array, "gates"],
    x: Float[Array, "batch time input"],
    h: Float[Array, "batch hidden"],
    c: Float[Array, "batch hidden"],
    done: Bool[Array, "batch time"] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[
    Float[Array, "batch time hidden"], Float[Array, "batch hidden"], Float[Array, "batch hidden"]
]:
    """`lstm_cell` over time: all h, the last h and the last c.

    The state is zeroed before steps where `done` is set.

    Its gradient is written out (`jax.custom_vjp`): the gates are kept, the backward loop does one
    matmul per step, and those for weights and inputs follow it; autodiff keeps twice as much. The
    price: no forward-mode derivatives (`jax.jvp`, `jax.hessian`).
    """
    return _scan(weight_ih, weight_hh, bias, x, h, c, done, dtype=dtype)


def _scan_xla(
    weight_ih: Array, weight_hh: Array, *others: PyTree, dtype: DTypeLike | None
) -> tuple[Array, Array, Array]:
    return _lstm_scan(dtype, jnp.concatenate([weight_ih, weight_hh], axis=1), *others)


def _scan_cpu(*arrays: PyTree, dtype: DTypeLike | None) -> tuple[Array, Array, Array]:
    *weights, x, h, c, done = arrays
    done = jnp.zeros(x.shape[:2], bool) if done is None else done
    return _scan_kernel(*weights, x.astype(h.dtype), h, c, done)


def _scan_cpu_takes(*arrays: PyTree, dtype: DTypeLike | None) -> bool:
    *weights, x, h, c, _ = arrays
    return _kernels_compute_in(dtype, x, *weights, h, c)


def _keep(state: tuple[Array, ...], done: Array | None) -> tuple[Array, ...]:
    """The state, zero in the rows of `done`."""
    if done is None:
        return state
    return tuple(jnp.where(done[:, None], 0, part) for part in state)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lstm_scan(
    dtype: DTypeLike | None,
    weight: Array,
    bias: Array,
    x: Array,
    h: Array,
    c: Array,
    done: Array | None,
) -> tuple[Array, Array, Array]:
    # Results of the inputs' shape and dtype are written over them: on CPUs the first touch of fresh
    # memory costs as much as the arithmetic done on it.
    shape = (*x.shape[:2], h.shape[1])
    in_place = x.shape == shape and x.dtype == h.dtype

    def step(carry: tuple[Array, ...], t: Array):
        *state, outputs = carry
        x_t, done_t = at(t, (outputs if in_place else x, done))
        h, c = _keep(tuple(state), done_t)
        h, c = lstm_cell(weight, bias, x_t, h, c, dtype)
        return (h, c, put(outputs, t, h)), None

    start = x if in_place else jax.lax.empty(shape, h.dtype)
    (h, c, outputs), _ = jax.lax.scan(step, (h, c, start), jnp.arange(x.shape[1]))
    return outputs, h, c


def _lstm_scan_forward(
    dtype: DTypeLike | None,
    weight: Array,
    bias: Array,
    x: Array,
    h: Array,
    c: Array,
    done: Array | None,
) -> tuple[tuple[Array, Array, Array], PyTree]:
    def step(carry: tuple[Array, ...], t: Array):
        *state, outputs = carry
        x_t, done_t = at(t, (x, done))
        h, c = _keep(tuple(state), done_t)
        i, f, g, o = _gates(weight, bias, _join(x_t, h), dtype)
        c = f * c + i * g
        # XLA:CPU uses only one core for what it fuses into a write to one of the loop's buffers.
        h, *kept = jax.lax.optimization_barrier((o * jnp.tanh(c), c, i, f, g, o))
        return (h, kept[0], put(outputs, t, h)), kept

    time = x.shape[1]
    outputs = jax.lax.empty((h.shape[0], time, h.shape[1]), h.dtype)
    (h_last, c_last, outputs), kept = jax.lax.scan(step, (h, c, outputs), jnp.arange(time))
    return (outputs, h_last, c_last), (weight, x, h, c, done, outputs, kept)


def _lstm_scan_backward(
    dtype: DTypeLike | None, residuals: PyTree, cotangents: tuple[Array, Array, Array]
) -> tuple[Array | None, ...]:
    weight, x, h, c, done, outputs, (cs, *gates) = residuals
    d_outputs, dh_last, dc_last = cotangents
    inputs, dtype = x.shape[2], weight.dtype if dtype is None else dtype
    of_x, of_h = jnp.split(weight.astype(dtype), (inputs,), axis=1)

    def step(carry: tuple[Array, ...], row: PyTree):
        dh, dc, c_t, d_gates = carry
        t, (i, f, g, o) = row
        d_h, done_t = at(t, (d_outputs, done))
        c_before = jnp.where(t > 0, cs[jnp.maximum(t - 1, 0)], c)
        (c_kept,) = _keep((c_before,), done_t)
        tanh_c = jnp.tanh(c_t)
        dh = dh + d_h
        dc = dc + dh * o * (1 - tanh_c * tanh_c)
        parts = [
            dc * g * i * (1 - i),
            dc * c_kept * f * (1 - f),
            dc * i * (1 - g * g),
            dh * tanh_c * o * (1 - o),
        ]
        now = jax.lax.optimization_barrier(jnp.concatenate(parts, axis=1).astype(dtype))
        dh, dc = _keep(((now @ of_h).astype(h.dtype), dc * f), done_t)
        return (dh, dc, c_before, put(d_gates, t, now)), None

    d_gates = jax.lax.empty((*x.shape[:2], weight.shape[0]), dtype)
    steps = jnp.arange(x.shape[1]), gates
    (dh, dc, _, d_gates), _ = jax.lax.scan(
        step, (dh_last, dc_last, cs[-1], d_gates), steps, reverse=True
    )
    # The rest needs no loop.
    h_before = jnp.concatenate([h[:, None], outputs[:, :-1]], axis=1)
    if done is not None:
        h_before = jnp.where(done[..., None], 0, h_before)
    joined = jnp.concatenate([x.astype(dtype), h_before.astype(dtype)], axis=2)
    flat, joined = (rows.reshape(-1, rows.shape[2]) for rows in (d_gates, joined))
    d_weight = jnp.matmul(flat.T, joined, preferred_element_type=weight.dtype)
    dx = (flat @ of_x).astype(x.dtype).reshape(x.shape)
    return d_weight, flat.sum(0, dtype=h.dtype), dx, dh, dc, None


_lstm_scan.defvjp(_lstm_scan_forward, _lstm_scan_backward)

_scan_kernel = cpu.differentiable(cpu.lstm, cpu.lstm_gradient, partial(_scan_xla, dtype=None))


_scan_plain = partial(_scan_xla, dtype=None)


def scan_by(loops: Loops, *arrays: PyTree, dtype: DTypeLike | None) -> tuple[Array, Array, Array]:
    """`lstm_scan` by these loops over time."""
    return lstm_over_time(loops, _scan_plain, *arrays, dtype=dtype)


def _scan_device(device: Any, *arrays: PyTree, dtype: DTypeLike | None) -> tuple[Array, ...]:
    loops = device.LOOPS if device.takes(*arrays, dtype=dtype) else stepped.LOOPS
    return scan_by(loops, *arrays, dtype=dtype)


def _has_steps(*arrays: PyTree, dtype: DTypeLike | None) -> bool:
    return arrays[3].size > 0


_scan = Operation(
    "lstm_scan",
    xla=_scan_xla,
    cpu=Kernel(_scan_cpu, takes=_scan_cpu_takes),
    gpu=Kernel(partial(_scan_device, gpu), takes=_has_steps),
    tpu=Kernel(partial(_scan_device, tpu), takes=_has_steps),
)
