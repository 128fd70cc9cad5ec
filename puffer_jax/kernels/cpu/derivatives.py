"""Functions by kernels whose gradients are by kernels, too."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from puffer_jax.kernels.cpu.library import _is_number


def differentiable(
    forward: Callable[..., Any], backward: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """A function by kernels whose gradient is by kernels, too.

    Args:
        forward: (keep, *arrays) -> (results, kept): with `keep`, what `backward` wants to know.
        backward: (arrays, kept, cotangents) -> the gradients of those arrays that are floating.
        plain: the same function of XLA's operations, for the derivatives beyond the first.
    """

    @jax.custom_vjp
    def gradient(arrays: Any, kept: Any, cotangents: Any) -> Any:
        return backward(arrays, kept, cotangents)

    def gradient_forward(*given: Any) -> tuple[Any, Any]:
        return gradient(*given), given

    def gradient_backward(given: Any, d_gradients: Any) -> tuple[Any, ...]:
        arrays, _, cotangents = given
        which = [_is_number(array) for array in arrays]

        def function(*numbers: Array) -> Any:
            left = iter(numbers)
            return plain(*(next(left) if i else a for i, a in zip(which, arrays, strict=True)))

        def again(numbers: Any, cotangents: Any) -> Any:
            return jax.vjp(function, *numbers)[1](cotangents)

        numbers = tuple(filter(_is_number, arrays))
        d_numbers, d_cotangents = jax.vjp(again, numbers, cotangents)[1](d_gradients)
        left = iter(d_numbers)
        return tuple(next(left) if i else None for i in which), None, d_cotangents

    gradient.defvjp(gradient_forward, gradient_backward)

    # What is kept is a constant to derivatives beyond the first: `gradient` has all of them.
    keeping = jax.custom_vjp(partial(forward, True))
    keeping.defvjp(
        lambda *arrays: (keeping(*arrays), arrays),
        lambda arrays, d: jax.vjp(function, *arrays)[1](d[0]),
    )

    @jax.custom_vjp
    def function(*arrays: Array) -> Any:
        return forward(False, *arrays)[0]

    def function_forward(*arrays: Array) -> tuple[Any, Any]:
        results, kept = keeping(*arrays)
        return results, (arrays, kept)

    def function_backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        arrays, kept = residuals
        left = iter(gradient(arrays, kept, cotangents))
        return tuple(next(left) if _is_number(array) else None for array in arrays)

    function.defvjp(function_forward, function_backward)
    return function
