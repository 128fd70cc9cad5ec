"""Linear layers that read the same vectors, alone or after a linear layer and GELU."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.cpu import native


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


def linear(x: Float[Array, "batch inputs"], *layers: Array) -> tuple[Float[Array, "batch _"], ...]:
    """`x @ w + b` for each w (inputs, outputs), b (outputs,) of `layers`, all of one dtype.

    No forward-mode derivatives (`jax.jvp`) on CPUs.
    """
    return _linear(x, *layers)


def perceptron(
    x: Float[Array, "batch inputs"],
    w1: Float[Array, "inputs hidden"],
    b1: Float[Array, "hidden"],
    *layers: Array,
) -> tuple[Float[Array, "batch _"], ...]:
    """`gelu(x @ w1 + b1) @ w + b` for each w (hidden, outputs), b (outputs,) of `layers`.

    Without `layers` it is the hidden vectors, `(gelu(x @ w1 + b1),)`. All arrays are of one dtype.
    No forward-mode derivatives (`jax.jvp`) on CPUs.
    """
    return _perceptron(x, w1, b1, *layers)


def _linear_xla(x: Array, *layers: Array) -> tuple[Array, ...]:
    return tuple(x @ w + b for w, b in zip(layers[::2], layers[1::2], strict=True))


def _perceptron_xla(x: Array, w1: Array, b1: Array, *layers: Array) -> tuple[Array, ...]:
    hidden = gelu(x @ w1 + b1)
    return _linear_xla(hidden, *layers) if layers else (hidden,)


_linear = Operation(
    "linear",
    xla=_linear_xla,
    cpu=Kernel(
        cpu.differentiable(cpu.linear, cpu.linear_gradient, _linear_xla), takes=native.takes
    ),
)

_perceptron = Operation(
    "perceptron",
    xla=_perceptron_xla,
    cpu=Kernel(
        cpu.differentiable(cpu.perceptron, cpu.perceptron_gradient, _perceptron_xla),
        takes=native.takes,
    ),
)
