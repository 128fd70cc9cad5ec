"""Adam's kernel."""

from typing import Any

from jaxtyping import Array

from puffer_jax.kernels.cpu.library import _call, _like


def adam(numbers: Array, gradient: Array, *arrays: Array) -> tuple[Array, ...]:
    """A step of `puffer_jax.optim.adam`, in place; without derivatives.

    Args:
        numbers: (9,) as in the struct AdamNumbers of the kernels' adam.cc.
        gradient: of any shape, and one dtype with all others.
        arrays: the parameters and both moments.

    Returns:
        The new ones.
    """
    options: Any = {"vmap_method": "broadcast_all", "aliases": {2: 0, 3: 1, 4: 2}}
    return tuple(_call("puffer_jax_adam", _like(*arrays), numbers, gradient, *arrays, **options))
