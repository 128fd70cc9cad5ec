"""Linear layers of the same vectors, alone or behind a linear layer and GELU."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from puffer_jax.kernels import cpu


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """The exact (erf) GELU, torch's default; JAX's default is the tanh approximation."""
    # jax.nn.gelu's exact form asks for erfc, twice the time of erf on CPUs.
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    # Fewer passes over the array than JAX's own derivative makes.
    below = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * below, (below + x * density) * dx


def _perceptron_by_xla(x: Array, w1: Array, b1: Array, *layers: Array) -> tuple[Array, ...]:
    activations = gelu(x @ w1 + b1)
    return _linear_by_xla(activations, *layers) if layers else (activations,)


_perceptron_by_us = cpu.differentiable(cpu.perceptron, cpu.perceptron_gradient, _perceptron_by_xla)


def _linear_by_xla(x: Array, *layers: Array) -> tuple[Array, ...]:
    return tuple(x @ w + b for w, b in zip(layers[::2], layers[1::2], strict=True))


_linear_by_us = cpu.differentiable(cpu.linear, cpu.linear_gradient, _linear_by_xla)
