"""The optimizers of PufferLib's trainer as optax transformations.

Every hyper-parameter may be a Python number or a traced scalar, so that one program can be
`vmap`ped over learning rates. No `init` depends on them: a transformation may be rebuilt inside a
traced function and continue from the old state. In float32 a Python `beta` is more exact than a
traced one: 1 - 0.999 is rounded once, after the subtraction, as in torch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PyTree

from puffer_jax.base.text import hint
from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.cpu import native
from puffer_jax.kernels.reductions import norm
from puffer_jax.nn.torch_layout import Conversion

# (params, opt_state, gradients, skip) -> (params, opt_state); where `skip`, they stay as they are.
OptimizerStep = Callable[[PyTree, PyTree, PyTree, Array], tuple[PyTree, PyTree]]

OPTIMIZERS = ("adam", "muon")

# One (a, b, c) for each of heavyball's five Newton-Schulz steps.
_NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def make(
    name: str,
    to_torch: Conversion,
    from_torch: Conversion,
    *,
    learning_rate: ArrayLike,
    max_grad_norm: ArrayLike,
    beta1: ArrayLike,
    beta2: ArrayLike,
    eps: ArrayLike,
) -> optax.GradientTransformation:
    """The trainer's optimizer: clip by norm, then "adam" or "muon".

    Args:
        name: "adam" or "muon". Muon ignores `beta2` and `eps`, as the reference's does.
        to_torch: with `from_torch`, what `nn.torch_layout.torch_layout(policy)` returned.
        from_torch: see `to_torch`.
        learning_rate: the learning rate of this step, after any schedule.
        max_grad_norm: see `clip_by_global_norm`.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: Adam's epsilon.

    Raises:
        ValueError: `name` is neither of the two.
    """
    if name == "adam":
        return _clipped_adam(learning_rate, max_grad_norm, beta1, beta2, eps)
    if name == "muon":
        optimizer = muon(learning_rate, beta1, to_torch, from_torch)
        return optax.chain(clip_by_global_norm(max_grad_norm), optimizer)
    raise ValueError(
        f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}"
        + hint(name, OPTIMIZERS, cutoff=0.4)
    )


def _clipped_adam(
    learning_rate: ArrayLike,
    max_grad_norm: ArrayLike,
    beta1: ArrayLike,
    beta2: ArrayLike,
    eps: ArrayLike,
) -> optax.GradientTransformation:
    return optax.chain(clip_by_global_norm(max_grad_norm), adam(learning_rate, beta1, beta2, eps))


def make_step(
    name: str, to_torch: Conversion, from_torch: Conversion, **numbers: ArrayLike
) -> OptimizerStep:
    """A step of the trainer's optimizer, as the update calls it.

    Args:
        name: see `make`.
        to_torch: see `make`.
        from_torch: see `make`.
        numbers: the other arguments of `make`.

    Returns:
        (params, opt_state, gradients, skip) -> (params, opt_state), with opt_state as `init` of
        `make(...)` returns it; where `skip`, a bool, is True, they stay as they are.
    """
    if name == "adam":
        return partial(_adam_step, **numbers)
    return partial(_optax_step, make(name, to_torch, from_torch, **numbers))


def _optax_step(
    transformation: optax.GradientTransformation,
    params: PyTree,
    state: PyTree,
    gradients: PyTree,
    skip: ArrayLike,
) -> tuple[PyTree, PyTree]:
    change, new_state = transformation.update(gradients, state, params)
    new = optax.apply_updates(params, change), new_state
    return jax.tree.map(lambda new, old: jnp.where(skip, old, new), new, (params, state))


def _adam_step_xla(*arrays: PyTree, **numbers: ArrayLike) -> tuple[PyTree, PyTree]:
    return _optax_step(_clipped_adam(**numbers), *arrays)


def _adam_step_cpu(
    params: PyTree,
    state: PyTree,
    gradients: PyTree,
    skip: ArrayLike,
    *,
    learning_rate: ArrayLike,
    max_grad_norm: ArrayLike,
    beta1: ArrayLike,
    beta2: ArrayLike,
    eps: ArrayLike,
) -> tuple[PyTree, PyTree]:
    scale = _clip_scale(gradients, max_grad_norm)
    empty, moments = state
    leaves, treedef = jax.tree.flatten(params)
    others = (treedef.flatten_up_to(x) for x in (moments.mu, moments.nu, gradients))
    rate, root = _adam_scalars(moments.count + 1, learning_rate, beta1, beta2)
    scalars = (scale, beta1, 1 - beta1, beta2, 1 - beta2, rate, 1 / root, eps, skip)

    def step(p: Array, m: Array, v: Array, g: Array) -> tuple[Array, ...]:
        numbers = jnp.stack([jnp.asarray(x, p.dtype) for x in scalars])
        return cpu.adam(numbers, g, p, m, v)

    new = [step(*arrays) for arrays in zip(leaves, *others, strict=True)]
    params, mu, nu = (treedef.unflatten(x) for x in zip(*new, strict=True))
    count = jnp.where(skip, moments.count, moments.count + 1)
    return params, (empty, optax.ScaleByAdamState(count, mu, nu))


def _adam_step_cpu_takes(
    params: PyTree, state: PyTree, gradients: PyTree, skip: ArrayLike, **numbers: ArrayLike
) -> bool:
    return native.takes(*jax.tree.leaves((params, gradients)))


_adam_step = Operation(
    "adam", xla=_adam_step_xla, cpu=Kernel(_adam_step_cpu, takes=_adam_step_cpu_takes)
)


def clip_by_global_norm(max_norm: ArrayLike) -> optax.GradientTransformation:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), norm over all of them together.

    The formula of `torch.nn.utils.clip_grad_norm_`; optax's lacks the 1e-6. As there, gradients
    that are not finite are not repaired: one NaN makes all NaN, and one infinity (or squares
    that overflow) makes every finite gradient 0 and itself NaN.
    """

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        scale = _clip_scale(updates, max_norm)
        return jax.tree.map(lambda g: g * jnp.asarray(scale, g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _clip_scale(gradients: PyTree, max_norm: ArrayLike) -> Array:
    return jnp.minimum(1, max_norm / (norm(jax.tree.leaves(gradients)) + 1e-6))


def adam(
    learning_rate: ArrayLike, beta1: ArrayLike, beta2: ArrayLike, eps: ArrayLike
) -> optax.GradientTransformation:
    """`torch.optim.Adam` without weight decay; moments in the parameters' dtype.

    The state is optax's `ScaleByAdamState`. Its `scale_by_adam` is not used: in float32 it takes
    1 - beta2^t from a rounded beta2, which with beta2 = 0.999 puts every update off by 1e-5.
    """

    def init(params: PyTree) -> optax.ScaleByAdamState:
        # two trees: donating one buffer twice is an error
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: _average(m, g, beta1), state.mu, updates)
        nu = jax.tree.map(lambda v, g: _average(v, g * g, beta2), state.nu, updates)
        scalars = *_adam_scalars(count, learning_rate, beta1, beta2), eps

        def step(m: Array, v: Array) -> Array:
            rate, root, epsilon = (jnp.asarray(x, m.dtype) for x in scalars)
            return rate * m / (jnp.sqrt(v) / root + epsilon)

        return jax.tree.map(step, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _adam_scalars(
    count: Array, learning_rate: ArrayLike, beta1: ArrayLike, beta2: ArrayLike
) -> tuple[Array, Array]:
    # 1 - beta^t, without the cancellation
    correction1, correction2 = (-jnp.expm1(count * jnp.log1p(beta - 1)) for beta in (beta1, beta2))
    return jnp.negative(learning_rate) / correction1, jnp.sqrt(correction2)


class MuonState(NamedTuple):
    """Muon's state: an exponential average of the gradients, in the layout of the parameters."""

    momentum: PyTree


def muon(
    learning_rate: ArrayLike,
    beta1: ArrayLike,
    to_torch: Conversion,
    from_torch: Conversion,
    newton_schulz_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Muon as the reference runs it: `heavyball.ForeachMuon` 2.3.1 with its defaults.

    With m = beta1 * m + (1 - beta1) * g, not corrected for its start at 0, the direction is
    g + m. A tensor of two or more axes in torch's layout, a (1, n) one included, is flattened to
    (rows, columns) = (out, rest), made nearly orthogonal by five Newton-Schulz steps, and scaled
    by sqrt(max(1, rows / columns)); any other follows g + m as it is.

    The momentum is kept in the parameters' dtype, or float32 where that is narrower; heavyball's
    is float32 even for float64 parameters.

    Args:
        learning_rate: step size.
        beta1: decay of the momentum.
        to_torch: with `from_torch`, what `nn.torch_layout.torch_layout(policy)` returned.
        from_torch: see `to_torch`.
        newton_schulz_dtype: dtype of the Newton-Schulz products; None is the momentum's.
            jnp.bfloat16 is what the reference does with `precision = bfloat16`, since its
            autocast is never left and so covers the optimizer too.
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(
            jax.tree.map(
                lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
            )
        )

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        momentum = jax.tree.map(lambda m, g: _average(m, g, beta1), state.momentum, updates)
        tensors = to_torch(jax.tree.map(jnp.add, updates, momentum))
        matrices = [name for name, x in tensors.items() if x.ndim >= 2]
        orthogonal = _orthogonalize(*map(tensors.get, matrices), dtype=newton_schulz_dtype)
        directions = tensors | dict(zip(matrices, orthogonal, strict=True))
        rate = jnp.negative(learning_rate)
        steps = jax.tree.map(lambda x: rate.astype(x.dtype) * x, from_torch(directions))
        return steps, MuonState(momentum)

    return optax.GradientTransformation(init, update)


def _average(average: Array, new: Array, decay: ArrayLike) -> Array:
    old_part, new_part = (jnp.asarray(x, average.dtype) for x in (decay, 1 - decay))
    return old_part * average + new_part * new.astype(average.dtype)


def _orthogonalize_xla(*tensors: Array, dtype: DTypeLike | None) -> tuple[Array, ...]:
    return tuple(_oriented(_newton_schulz(_lying(x), dtype), x) for x in tensors)


def _orthogonalize_joined(*tensors: Array, dtype: DTypeLike | None) -> tuple[Array, ...]:
    """As one batch of matrices after another: rows and columns of zeros stay zero, and add none."""
    matrices = [_lying(x) for x in tensors]
    results: dict[int, Array] = {}
    for group, (rows, columns) in _groups([x.shape for x in matrices]):
        batch = jnp.stack([
            jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))
            for x in (matrices[i] for i in group)
        ])  # fmt: skip
        done = jax.vmap(partial(_newton_schulz, dtype=dtype))(batch)
        for x, i in zip(done, group, strict=True):
            height, width = matrices[i].shape
            results[i] = _oriented(x[:height, :width], tensors[i])
    return tuple(results[i] for i in range(len(tensors)))


# A product with so many multiplications takes an H100 about as long as its launch.
_LAUNCH = 2**25


def _groups(shapes: Sequence[tuple[int, ...]]) -> list[tuple[list[int], tuple[int, int]]]:
    """Which matrices go together, and the shape that has room for each of them.

    Those of one shape do, and those small enough that a product costs its launch.
    """
    groups: list[tuple[list[int], tuple[int, int]]] = []
    for i in sorted(range(len(shapes)), key=lambda i: shapes[i], reverse=True):
        rows, columns = shapes[i]
        for j, (members, (height, width)) in enumerate(groups):
            joint = max(rows, height), max(columns, width)
            if joint == (rows, columns) == (height, width) or joint[0] ** 2 * joint[1] <= _LAUNCH:
                groups[j] = [*members, i], joint
                break
        else:
            groups.append(([i], (rows, columns)))
    return groups


def _orthogonalize_joined_takes(*tensors: Array, dtype: DTypeLike | None) -> bool:
    return len(tensors) > 1 and len({x.dtype for x in tensors}) == 1


_orthogonalize = Operation(
    "orthogonalize",
    xla=_orthogonalize_xla,
    gpu=Kernel(_orthogonalize_joined, takes=_orthogonalize_joined_takes),
    tpu=Kernel(_orthogonalize_joined, takes=_orthogonalize_joined_takes),
)


def _lying(tensor: Float[Array, "out *rest"]) -> Float[Array, "short long"]:
    """The tensor as a matrix (out, rest), transposed if it has more rows than columns."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _newton_schulz(x: Float[Array, "short long"], dtype: DTypeLike | None) -> Array:
    # The Frobenius norm bounds the largest singular value, which the steps need below about 1.
    x = (x / jnp.maximum(jnp.linalg.norm(x), 1e-7)).astype(dtype or x.dtype)
    identity = jnp.eye(x.shape[0], dtype=x.dtype)
    for a, b, c in _NEWTON_SCHULZ:
        gram = x @ x.T
        x = ((c * gram + b * identity) @ gram + a * identity) @ x
    return x


def _oriented(x: Float[Array, "short long"], like: Array) -> Array:
    """The matrix in the shape and dtype of a tensor, scaled as Muon does."""
    rows, columns = like.shape[0], like.size // like.shape[0]
    x = (x.T if rows > columns else x).astype(like.dtype)
    return (x * max(1, rows / columns) ** 0.5).reshape(like.shape)


def cosine_schedule(
    learning_rate: ArrayLike, total_epochs: ArrayLike, min_ratio: ArrayLike = 0.0
) -> Callable[[ArrayLike], Array]:
    """Learning rate by epoch: torch's `CosineAnnealingLR(T_max=total_epochs)`, stepped every epoch.

    It falls from `learning_rate` at epoch 0 to `min_ratio` times as much at `total_epochs` (torch's
    `eta_min`) and then, as in torch, rises again, to `learning_rate` at twice as many. Where
    `total_epochs` is 0 (fewer time steps than one batch), torch divides by zero at the first step;
    here the rate stays constant.

    Returns:
        A function of the epoch (a number or a traced scalar) giving a scalar array.
    """

    def schedule(epoch: ArrayLike) -> Array:
        phase = jnp.where(total_epochs == 0, 0, epoch / jnp.maximum(total_epochs, 1))
        share = (1 + jnp.cos(jnp.pi * phase)) / 2
        floor = jnp.asarray(min_ratio)
        return (floor + (1 - floor) * share) * jnp.asarray(learning_rate)

    return schedule
