"""Adam's kernel."""

from jaxtyping import Array

from puffer_jax.kernels.cpu.native import call, like


def adam(numbers: Array, gradient: Array, *arrays: Array) -> tuple[Array, ...]:
    """A step of `puffer_jax.optim.adam`, in place; no derivatives.

    Args:
        numbers: (9,) as in the struct AdamNumbers of the kernels' adam.cc.
        gradient: of any shape, of the dtype of `numbers`.
        arrays: the parameters and both moments, of that shape and dtype.

    Returns:
        The new parameters and moments.
    """
    results = call(
        "puffer_jax_adam",
        like(*arrays),
        *(numbers, gradient, *arrays),
        vmap_method="broadcast_all",
        aliases={2: 0, 3: 1, 4: 2},
    )
    return tuple(results)
