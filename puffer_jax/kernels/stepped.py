"""The LSTM's loops over time in XLA's operations, for GPUs and TPUs: where no kernel fits.

A step is one product and what XLA fuses around it. (On CPUs the fewest operations are not the
fastest; see `puffer_jax.kernels.lstm`.)
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from puffer_jax.kernels.over_time import Loops, activate, d_activate


def at(t: Array, sequences: PyTree) -> PyTree:
    """Step t of sequences (batch, time, ...).

    Reading and writing rows of these saves two transposed copies of a sequence.
    """
    pick = partial(jax.lax.dynamic_index_in_dim, index=t, axis=1, keepdims=False)
    return jax.tree.map(pick, sequences)


def put(sequence: Array, t: Array, value: Array) -> Array:
    """The sequence with another step t."""
    return jax.lax.dynamic_update_index_in_dim(sequence, value.astype(sequence.dtype), t, axis=1)


def _forward(
    keep: bool, projected: Array, weight: Array, bias: Array, h: Array, c: Array, done: Array | None
) -> tuple[PyTree, PyTree]:
    batch, time, _ = projected.shape
    wide = jnp.promote_types(h.dtype, jnp.float32)

    def step(carry: tuple[Array, ...], t: Array) -> tuple[tuple[Array, ...], None]:
        h, c, gates, outputs, *cs = carry
        row, starts = at(t, (gates, after))
        sums = jnp.matmul(h.astype(weight.dtype), weight.T, preferred_element_type=wide)
        parts = activate(tuple(jnp.split(sums + row + bias, 4, axis=1)))
        i, f, g, o = parts
        c = f * c + i * g
        h, c = (o * jnp.tanh(c)).astype(outputs.dtype), c.astype(outputs.dtype)
        if keep:  # the gates take the place of what came in
            gates, cs = put(gates, t, jnp.concatenate(parts, axis=1)), [put(cs[0], t, c)]
        return (*zeroed(starts, h, c), gates, put(outputs, t, h), *cs), None

    def zeroed(done: Array | None, *state: Array) -> tuple[Array, ...]:
        if done is None:
            return state
        return tuple(jnp.where(done[:, None], 0, part) for part in state)

    # Zeroed at the end of the step before, where that costs no operation of its own; the last
    # state, which has no step after it, stays as it is.
    first, after = (None, None) if done is None else (done[:, 0], _after(done))
    empty = jax.lax.empty((batch, time, h.shape[1]), h.dtype)
    start = (*zeroed(first, h, c), projected, *((empty,) * (2 if keep else 1)))
    carry, _ = jax.lax.scan(step, start, jnp.arange(time))
    h_last, c_last, gates, outputs, *cs = carry
    if not keep:
        return (outputs, h_last, c_last), ()
    h_before = jnp.concatenate([h[:, None], outputs[:, :-1]], axis=1)
    if done is not None:
        h_before = jnp.where(done[..., None], 0, h_before)
    return (outputs, h_last, c_last), (gates, *cs, h_before)


def _after(done: Array) -> Array:
    return jnp.pad(done[:, 1:], ((0, 0), (0, 1)))


def _backward(
    weight: Array,
    c: Array,
    gates: Array,
    cs: Array,
    d_outputs: Array,
    dh: Array,
    dc: Array,
    done: Array | None,
) -> tuple[Array, Array, Array, Array]:
    wide = jnp.promote_types(c.dtype, jnp.float32)

    def step(carry: tuple[Array, ...], t: Array) -> tuple[tuple[Array, ...], None]:
        dh, dc, gates = carry
        row, c_t, c_before, d_h, starts = at(t, (gates, cs, before, d_outputs, done))

        def kept(part: Array) -> Array:
            return part if starts is None else jnp.where(starts[:, None], 0, part)

        parts, dc = d_activate(
            tuple(jnp.split(row.astype(wide), 4, axis=1)),
            c_t.astype(wide),
            kept(c_before.astype(wide)),
            dh + d_h,
            dc,
        )
        now = jnp.concatenate(parts, axis=1).astype(gates.dtype)
        dh = jnp.matmul(now, weight, preferred_element_type=wide)
        return (kept(dh), kept(dc), put(gates, t, now)), None

    before = jnp.concatenate([c[:, None], cs[:, :-1]], axis=1)
    start = dh.astype(wide), dc.astype(wide), gates
    steps = jnp.arange(gates.shape[1])
    (dh, dc, d_gates), _ = jax.lax.scan(step, start, steps, reverse=True)
    return d_gates, d_gates, dh, dc


LOOPS = Loops(_forward, _backward, False, lambda batch, hidden, _: (batch, hidden))
