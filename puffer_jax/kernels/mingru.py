"""A layer of the MinGRU over time: its gates, its recurrence and its highway."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.cpu import native
from puffer_jax.kernels.gates import highway_gates
from puffer_jax.kernels.gpu import mingru as gpu
from puffer_jax.kernels.recurrence import recurrence_onwards


# Jitted here so that eager calls do not trace and compile the recurrence anew each time.
@jax.jit
def mingru_layer(
    x: Float[Array, "time batch hidden"],
    projected: Float[Array, "time batch gates"],
    h: Float[Array, "batch hidden"],
    starts: Bool[Array, "time batch"] | None = None,
) -> tuple[Float[Array, "time batch hidden"], Float[Array, "batch hidden"]]:
    """The outputs of a layer, and its state after the last step.

    With (u, g, p) = `projected`, cut into three:

        z = sigmoid(g)    c = u + 0.5 where u >= 0, else sigmoid(u)
        h' = (1 - z) * h + z * c        y = sigmoid(p) * h' + (1 - sigmoid(p)) * x

    where the state h is zeroed before steps where `starts` is set.

    Its gradient is written out (`jax.custom_vjp`): the gates are computed anew, all steps at once,
    and the state's is the same recurrence from the last step to the first. The price: no
    forward-mode derivatives (`jax.jvp`, `jax.hessian`).
    """
    none = jnp.zeros((0, 0), bool)  # a kernel's arguments are arrays
    return _mingru_layer(x, projected, h, none if starts is None else starts)


def _gates(projected: Array, starts: Array | None) -> tuple[Array, ...]:
    """Of all steps: see `highway_gates`; and what is kept of the state."""
    gates = highway_gates(*jnp.split(projected, 3, axis=-1))
    kept = gates[1] if starts is None else jnp.where(starts[..., None], 0, gates[1])
    return *gates, kept


@jax.custom_vjp
def _layer(x: Array, projected: Array, h: Array, starts: Array) -> tuple[Array, Array]:
    return _forward(x, projected, h, starts)[0]


def _forward(x: Array, projected: Array, h: Array, starts: Array):
    z, _, candidate, _, passed, kept = _gates(projected, starts if starts.size else None)
    states = recurrence_onwards(kept, z * candidate, h)
    results = passed * states + (1 - passed) * x, states[-1]
    return results, (x, projected, h, starts, states)


def _backward(residuals: tuple[Array, ...], d_results: tuple[Array, Array]):
    x, projected, h, starts, states = residuals
    starts = starts if starts.size else None
    d_outputs, d_last = d_results
    z, closed, candidate, slope, passed, kept = _gates(projected, starts)
    # What reaches a state: from its own output, and from the state after it.
    after = jnp.concatenate([kept[1:], jnp.ones_like(kept[:1])])
    d_states = recurrence_onwards(after, d_outputs * passed, d_last, reverse=True)
    before = jnp.concatenate([h[None], states[:-1]])
    before = before if starts is None else jnp.where(starts[..., None], 0, before)
    du = d_states * z * slope
    dg = d_states * (candidate - before) * (z * closed)
    dp = d_outputs * (states - x) * (passed * (1 - passed))
    dx = d_outputs * (1 - passed)
    return dx, jnp.concatenate([du, dg, dp], axis=-1), d_states[0] * kept[0], None


_layer.defvjp(_forward, _backward)


def _takes(x: Array, projected: Array, h: Array, starts: Array) -> bool:
    return native.takes(x, projected, h)


_mingru_layer = Operation(
    "mingru_layer",
    xla=_layer,
    cpu=Kernel(cpu.differentiable(cpu.mingru, cpu.mingru_gradient, _layer), takes=_takes),
    gpu=Kernel(cpu.differentiable(gpu.mingru, gpu.mingru_gradient, _layer), takes=gpu.takes),
)
