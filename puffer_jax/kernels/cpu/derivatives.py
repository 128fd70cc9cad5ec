"""Functions computed by kernels whose gradients are computed by kernels, too."""

from collections.abc import Hashable
from functools import cache, partial

import jax
from jaxtyping import Array, PyTree

from puffer_jax.kernels.choice import Function
from puffer_jax.kernels.cpu.native import is_floating


def differentiable(forward: Function, backward: Function, plain: Function) -> Function:
    """A function computed by a kernel whose gradient is computed by kernels, too.

    Args:
        forward: (keep, *arrays, **options) -> (results, kept): with `keep`, what `backward` needs
            besides the arrays.
        backward: (arrays, kept, cotangents, **options) -> the gradients of the floating arrays.
        plain: the same function in XLA's operations, for the derivatives beyond the first.

    Returns:
        (*arrays, **options) -> results; options are hashable.
    """

    @cache
    def bound(**options: Hashable) -> Function:
        functions = (partial(function, **options) for function in (forward, backward, plain))
        return _differentiable(*functions)

    def function(*arrays: PyTree, **options: Hashable) -> PyTree:
        return bound(**options)(*arrays)

    return function


def _differentiable(forward: Function, backward: Function, plain: Function) -> Function:
    @jax.custom_vjp
    def gradient(arrays: PyTree, kept: PyTree, cotangents: PyTree) -> PyTree:
        return backward(arrays, kept, cotangents)

    def gradient_forward(*operands: PyTree) -> tuple[PyTree, PyTree]:
        return gradient(*operands), operands

    def gradient_backward(operands: PyTree, d_gradients: PyTree) -> tuple[PyTree, ...]:
        arrays, _, cotangents = operands
        floating = [is_floating(array) for array in arrays]

        def plain_of_floating(*some: Array) -> PyTree:
            rest = iter(some)
            return plain(*(next(rest) if f else a for f, a in zip(floating, arrays, strict=True)))

        def plain_gradient(some: PyTree, cotangents: PyTree) -> PyTree:
            return jax.vjp(plain_of_floating, *some)[1](cotangents)

        some = tuple(filter(is_floating, arrays))
        d_some, d_cotangents = jax.vjp(plain_gradient, some, cotangents)[1](d_gradients)
        rest = iter(d_some)
        return tuple(next(rest) if f else None for f in floating), None, d_cotangents

    gradient.defvjp(gradient_forward, gradient_backward)

    # To derivatives beyond the first, what is kept is a constant: `gradient` has all of them.
    keeping = jax.custom_vjp(partial(forward, True))
    keeping.defvjp(
        lambda *arrays: (keeping(*arrays), arrays),
        lambda arrays, d: jax.vjp(function, *arrays)[1](d[0]),
    )

    @jax.custom_vjp
    def function(*arrays: PyTree) -> PyTree:
        return forward(False, *arrays)[0]

    def function_forward(*arrays: PyTree) -> tuple[PyTree, PyTree]:
        results, kept = keeping(*arrays)
        return results, (arrays, kept)

    def function_backward(residuals: PyTree, cotangents: PyTree) -> tuple[PyTree, ...]:
        arrays, kept = residuals
        rest = iter(gradient(arrays, kept, cotangents))
        return tuple(next(rest) if is_floating(array) else None for array in arrays)

    function.defvjp(function_forward, function_backward)
    return function
