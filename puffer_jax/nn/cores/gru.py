"""Torch's GRU."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from puffer_jax.nn.cores.gated import GatedCore, Parts, Weights


class GRU(GatedCore):
    """One GRU layer with torch's parameters, gate order (r, z, n) and initialisation.

    A state has "gru_h" (batch, hidden), which is the output. With p = W_ih x + b_ih and
    q = W_hh h + b_hh, each cut into three:

        r = sigmoid(p_r + q_r)    z = sigmoid(p_z + q_z)    n = tanh(p_n + r * q_n)
        h' = (1 - z) * n + z * h

    Reference: `torch.nn.GRU` and `torch.nn.GRUCell`, where r gates W_hh h + b_hh, not h
    itself as in the paper; Cho et al. 2014, arXiv:1406.1078.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> gru = puffer_jax.GRU(4, 16, rngs=nnx.Rngs(0))
        >>> outputs, state = gru.scan(jax.numpy.ones((3, 8, 4)), gru.initial_state(3))
        >>> outputs.shape
        (3, 8, 16)
    """

    name: ClassVar = "gru"
    gates: ClassVar = 3
    state_names: ClassVar = ("gru_h",)

    @classmethod
    def layer_step(
        cls,
        weights: Weights,
        x: Float[Array, "batch input"],
        parts: Parts,
        dtype: DTypeLike | None,
    ) -> Parts:
        """One step of a layer: its new h."""
        (h,) = parts
        return (gru_step(*weights, x, h, dtype),)

    @classmethod
    def layer_scan(
        cls,
        weights: Weights,
        x: Float[Array, "batch time input"],
        parts: Parts,
        done: Bool[Array, "batch time"] | None,
        dtype: DTypeLike | None,
    ) -> tuple[Float[Array, "batch time hidden"], Parts]:
        """All steps of a layer: the outputs and the last h."""
        (h,) = parts
        outputs, h = gru_scan(*weights, x, h, done, dtype)
        return outputs, (h,)


def gru_step(
    weight_ih: Float[Array, "gates input"],
    weight_hh: Float[Array, "gates hidden"],
    bias_ih: Float[Array, "gates"],
    bias_hh: Float[Array, "gates"],
    x: Float[Array, "batch input"],
    h: Float[Array, "batch hidden"],
    dtype: DTypeLike | None = None,
) -> Float[Array, "batch hidden"]:
    """The new h; the products are computed in `dtype`, None: that of the weights."""
    return _cell(_affine(x, weight_ih, bias_ih, dtype), h, weight_hh, bias_hh, dtype)


def _affine(x: Array, weight: Array, bias: Array, dtype: DTypeLike | None) -> Array:
    dtype = weight.dtype if dtype is None else dtype
    return (x.astype(dtype) @ weight.astype(dtype).T).astype(bias.dtype) + bias


def _cell(
    projected: Float[Array, "batch gates"],
    h: Float[Array, "batch hidden"],
    weight: Float[Array, "gates hidden"],
    bias: Float[Array, "gates"],
    dtype: DTypeLike | None,
) -> Float[Array, "batch hidden"]:
    p_r, p_z, p_n = jnp.split(projected, 3, axis=1)
    q_r, q_z, q_n = jnp.split(_affine(h, weight, bias, dtype), 3, axis=1)
    r, z = jax.nn.sigmoid(p_r + q_r), jax.nn.sigmoid(p_z + q_z)
    n = jnp.tanh(p_n + r * q_n)
    return n + z * (h - n)


# Jitted here so that eager calls do not trace and compile the loop anew each time.
@partial(jax.jit, static_argnames="dtype")
def gru_scan(
    weight_ih: Float[Array, "gates input"],
    weight_hh: Float[Array, "gates hidden"],
    bias_ih: Float[Array, "gates"],
    bias_hh: Float[Array, "gates"],
    x: Float[Array, "batch time input"],
    h: Float[Array, "batch hidden"],
    done: Bool[Array, "batch time"] | None,
    dtype: DTypeLike | None,
) -> tuple[Float[Array, "batch time hidden"], Float[Array, "batch hidden"]]:
    """`gru_step` over time: all h and the last; h is zeroed before steps where `done` is set."""

    def step(h: Array, row: tuple[Array, Array | None]) -> tuple[Array, Array]:
        projected, done_t = row
        if done_t is not None:
            h = jnp.where(done_t[:, None], 0, h)
        h = _cell(projected, h, weight_hh, bias_hh, dtype)
        return h, h

    # All products with inputs at once, time first.
    projected = _affine(jnp.swapaxes(x, 0, 1), weight_ih, bias_ih, dtype)
    h, outputs = jax.lax.scan(step, h, (projected, None if done is None else done.T))
    return jnp.swapaxes(outputs, 0, 1), h
