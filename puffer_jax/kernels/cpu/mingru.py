"""The MinGRU's kernels."""

import jax
from jaxtyping import Array

from puffer_jax.kernels.cpu.native import call, like


def mingru(keep: bool, *arrays: Array) -> tuple[tuple[Array, Array], Array]:
    """Forward of `puffer_jax.kernels.mingru.mingru_layer`; it keeps the states of all steps.

    Args:
        keep: whether to.
        arrays: x, projected, h and starts, see there; starts may be empty: there are none.
    """
    x, _, h, _ = arrays
    states = jax.ShapeDtypeStruct(x.shape if keep else (0,), x.dtype)
    # Each number of x and h is read before what comes of it is written.
    aliases = None if keep else {0: 0, 2: 1}
    *results, states = call(
        "puffer_jax_mingru_forward", (*like(x, h), states), *arrays, aliases=aliases
    )
    return tuple(results), states


def mingru_gradient(
    arrays: tuple[Array, ...], states: Array, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """Backward of `mingru`: the gradients of x, projected and h."""
    return call(
        "puffer_jax_mingru_backward",
        like(*arrays[:3]),
        *(*arrays, states, *cotangents),
        aliases={5: 0, 6: 2},
    )
