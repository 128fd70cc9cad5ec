"""Functions by kernels whose gradients are by kernels, too."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
from jaxtyping import Array

from puffer_jax.kernels.cpu.library import is_floating

Function = Callable[..., Any]


def differentiable(forward: Function, backward: Function, plain: Function) -> Function:
    """A function by kernels whose gradient is by kernels, too.

    Args:
        forward: (keep, *arrays, **options) -> (results, kept): with `keep`, what `backward` needs
            beside the arrays.
        backward: (arrays, kept, cotangents, **options) -> the gradients of the floating arrays.
        plain: the same function by XLA's operations, for the derivatives beyond the first.

    Returns:
        (*arrays, **options) -> results; options are hashable.
    """

    @cache
    def bound(**options: Any) -> Function:
        functions = (partial(function, **options) for function in (forward, backward, plain))
        return _differentiable(*functions)

    def function(*arrays: Array, **options: Any) -> Any:
        return bound(**options)(*arrays)

    return function


def _differentiable(forward: Function, backward: Function, plain: Function) -> Function:
    @jax.custom_vjp
    def gradient(arrays: Any, kept: Any, cotangents: Any) -> Any:
        return backward(arrays, kept, cotangents)

    def gradient_forward(*operands: Any) -> tuple[Any, Any]:
        return gradient(*operands), operands

    def gradient_backward(operands: Any, d_gradients: Any) -> tuple[Any, ...]:
        arrays, _, cotangents = operands
        floating = [is_floating(array) for array in arrays]

        def plain_of_floating(*some: Array) -> Any:
            rest = iter(some)
            return plain(*(next(rest) if f else a for f, a in zip(floating, arrays, strict=True)))

        def plain_gradient(some: Any, cotangents: Any) -> Any:
            return jax.vjp(plain_of_floating, *some)[1](cotangents)

        some = tuple(filter(is_floating, arrays))
        d_some, d_cotangents = jax.vjp(plain_gradient, some, cotangents)[1](d_gradients)
        rest = iter(d_some)
        return tuple(next(rest) if f else None for f in floating), None, d_cotangents

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
        rest = iter(gradient(arrays, kept, cotangents))
        return tuple(next(rest) if is_floating(array) else None for array in arrays)

    function.defvjp(function_forward, function_backward)
    return function
