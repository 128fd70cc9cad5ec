"""Actions drawn from a policy's logits, with their log-probability and entropy."""

import math
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num, PRNGKeyArray, PyTree

from puffer_jax.kernels import cpu
from puffer_jax.kernels.choice import Kernel, Operation
from puffer_jax.kernels.random import can_draw, words_of
from puffer_jax.nn import random
from puffer_jax.nn.distributions import Logits, Normal, at_least_float32, entropy, pick


def sample_logits(
    logits: Logits,
    action: ArrayLike | None = None,
    *,
    key: PRNGKeyArray | None = None,
    deterministic: bool = False,
    rows: random.Rows | None = None,
) -> tuple[Num[Array, "..."], Float[Array, " batch"], Float[Array, " batch"]]:
    """Sample actions, or score given ones (reference: `pufferlib.pytorch.sample_logits`).

    Give exactly one of `action`, `key` and `deterministic=True`. A sampled action is a constant
    to `grad`, so the log-probability has the score-function gradient, as in the reference.

    A bad row of logits (NaN, +inf, or -inf throughout; -inf beside finite logits is a mask) or a
    bad element of a Normal (loc or scale not finite, scale not positive) does no harm elsewhere:
    its action is drawn uniformly, or from N(0, 1), or is 0 if deterministic; its row's
    log-probability and entropy are NaN, with gradient 0; other rows are untouched.

    Args:
        logits: Discrete: (batch, n). MultiDiscrete: a tuple or list of k arrays (batch, n_i).
            Continuous: `Normal` or `TanhNormal` with loc (batch, k); more axes are flattened.
        action: any shape of batch * k elements in row order, say (segments, horizon) for
            logits of segments * horizon rows; for Discrete k = 1.
        key: a PRNG key to sample with.
        deterministic: take the first most likely action (a Normal's `mode()`).
        rows: with `key`, which rows of a larger batch these are: their actions are those that they
            would have in the whole. None: all.

    Returns:
        action: sampled: int32 (batch,), int32 (batch, k), or (batch, k) in loc's dtype; given:
            its own dtype, (batch,), (batch, k), or as given for continuous actions.
        logprob: (batch,), summed over k. NaN for an index outside 0..n-1 (but see Raises).
        entropy: (batch,), summed over k; a batch of one keeps its axis, unlike in the reference.

    Raises:
        TypeError: `logits` is none of the above.
        ValueError: not exactly one of the three ways is given; wrong shapes or number of
            elements; an action index outside 0..n-1 when nothing is traced.

    Example:
        >>> import jax, puffer_jax
        >>> logits = jax.numpy.zeros((8, 4))
        >>> action, logprob, entropy = puffer_jax.sample_logits(logits, key=jax.random.key(0))
        >>> action.shape, logprob.shape, entropy.shape
        ((8,), (8,), (8,))
        >>> _, logprob, _ = puffer_jax.sample_logits(logits, action=action)
        >>> print(f"{logprob[0]:.4f}")
        -1.3863
    """
    ways = {"action": action is not None, "key": key is not None, "deterministic": deterministic}
    chosen = [way for way, is_chosen in ways.items() if is_chosen]
    if len(chosen) != 1:
        got = " and ".join(chosen) or "none of them"
        raise ValueError(f"give exactly one of action, key and deterministic=True; got {got}")
    if isinstance(logits, Normal):
        return _sample_continuous(logits, action, key, rows)
    is_multi = isinstance(logits, tuple | list)
    components: list[Any] = list(logits) if isinstance(logits, tuple | list) else [logits]
    if not all(isinstance(x, jax.Array | np.ndarray) for x in components):
        raise TypeError(
            "logits must be an array, a tuple or list of arrays, a Normal or a TanhNormal; got "
            + ("a sequence of " if is_multi else "")
            + ", ".join(type(x).__name__ for x in components)
        )
    shapes = [x.shape for x in components]
    if not shapes or any(len(s) != 2 or s[0] != shapes[0][0] or s[1] == 0 for s in shapes):
        raise ValueError(f"logits must be (batch, n) with one batch and n > 0; got shapes {shapes}")
    k = len(components)
    actions = [None] * k if action is None else _rows(action, shapes[0][0], k, shapes).T
    labels = [f" (component {i})" if is_multi else "" for i in range(k)]
    if key is None:
        parts = map(_score, components, actions, labels)
    else:
        parts = [_draw(key, rows, i, k, logits) for i, logits in enumerate(components)]
    columns, logprobs, entropies = zip(*parts, strict=True)
    if not is_multi:
        return columns[0], logprobs[0], entropies[0]
    return jnp.stack(columns, 1), jnp.stack(logprobs).sum(0), jnp.stack(entropies).sum(0)


def _rows(action: ArrayLike, batch: int, k: int, shapes: object) -> Array:
    action = jnp.asarray(action)
    if action.size != batch * k:
        raise ValueError(
            f"action of shape {action.shape} does not fit logits of shape {shapes}: "
            f"they need {batch} * {k} elements"
        )
    return action.reshape(batch, k)


def _normalised(logits: Array) -> tuple[Array, Array]:
    """Normalised logits (batch, n), those of bad rows uniform; and which rows are bad (batch,)."""
    masked = logits == -jnp.inf  # no max here: XLA's CPU reduction drops NaNs of large arrays
    bad = ~(jnp.isfinite(logits) | masked).all(-1) | masked.all(-1)
    safe = jnp.where(bad[:, None], 0, logits)
    return safe - jax.nn.logsumexp(safe, axis=-1, keepdims=True), bad


def _score(logits: ArrayLike, action: Array | None, label: str = "") -> tuple[Array, Array, Array]:
    """(action, logprob, entropy) of a given action, or of the most likely one."""
    logits = at_least_float32(logits)
    if action is None or not isinstance(logits, Tracer):
        return _score_xla(logits, action, label=label)
    return action, *_score_given(logits, action)


def _score_xla(
    logits: Array, action: Array | None, *, label: str = ""
) -> tuple[Array, Array, Array]:
    normalised, bad = _normalised(logits)
    if action is None:
        action = normalised.argmax(-1).astype(jnp.int32)
    logprob = jnp.where(bad, jnp.nan, pick(normalised, action, label))
    return action, logprob, jnp.where(bad, jnp.nan, entropy(normalised))


# A reduction over a row's few actions is a launch of its own on GPUs and TPUs; sums and maxima of
# that many columns, written out, become one together with all around them.
_FEW = 32


def _few(logits: Array, *others: object) -> bool:
    return logits.shape[-1] <= _FEW


def _columns(logits: Array) -> tuple[list[Array], list[Array], Array]:
    """Normalised logits and probabilities column by column, and which rows are bad (batch,)."""
    columns = [logits[:, i] for i in range(logits.shape[1])]
    masked = [x == -jnp.inf for x in columns]
    finite = [jnp.isfinite(x) | out for x, out in zip(columns, masked, strict=True)]
    bad = ~reduce(jnp.logical_and, finite) | reduce(jnp.logical_and, masked)
    safe = [jnp.where(bad, 0, x) for x in columns]
    top = jax.lax.stop_gradient(reduce(jnp.maximum, safe))
    weights = [jnp.exp(x - top) for x in safe]
    total = reduce(jnp.add, weights)
    log_total = top + jnp.log(total)
    return [x - log_total for x in safe], [x / total for x in weights], bad


def _score_columns(logits: Array, action: Array) -> tuple[Array, Array]:
    normalised, probs, bad = _columns(logits)
    index = action.astype(jnp.promote_types(action.dtype, jnp.int32)).astype(jnp.int32)
    chosen = [jnp.where(index == i, x, 0) for i, x in enumerate(normalised)]
    # As in `entropy`, where p = 0 the product is 0 whatever the logit.
    terms = [jnp.where(p != 0, x, 0) * p for x, p in zip(normalised, probs, strict=True)]
    valid = (index >= 0) & (index < len(normalised))
    logprob = jnp.where(valid & ~bad, reduce(jnp.add, chosen), jnp.nan)
    return logprob, jnp.where(bad, jnp.nan, -reduce(jnp.add, terms))


_score_given = Operation(
    "score",
    xla=lambda logits, action: _score_xla(logits, action)[1:],
    gpu=Kernel(_score_columns, takes=_few),
    tpu=Kernel(_score_columns, takes=_few),
)


def _draw(
    key: PRNGKeyArray,
    rows: random.Rows | None,
    component: int,
    components: int,
    logits: ArrayLike,
) -> tuple[Array, Array, Array]:
    """(action, logprob, entropy) of a random action for one of the components."""
    logits = at_least_float32(logits)
    return _sample(key, logits, rows, component=component, components=components)


def _sample_xla(
    key: Array, logits: Array, rows: random.Rows | None, *, component: int, components: int
) -> tuple[Array, Array, Array]:
    key = random.split(key, components)[component]
    # Noise added to large logits would be rounded off, hence the normalised ones.
    return _score_xla(logits, random.categorical(key, _normalised(logits)[0], rows))


def _sample_columns(
    key: Array, logits: Array, rows: random.Rows | None, *, component: int, components: int
) -> tuple[Array, Array, Array]:
    key = random.split(key, components)[component]
    # The draw of `random.categorical`.
    noise = random.gumbel(key, logits, rows)
    columns = [noise[:, i] + x for i, x in enumerate(_columns(jax.lax.stop_gradient(logits))[0])]
    action, best = jnp.zeros(logits.shape[0], jnp.int32), columns[0]
    for i, x in enumerate(columns[1:], 1):
        action, best = jnp.where(x > best, i, action), jnp.maximum(x, best)
    return action, *_score_columns(logits, action)


def _sample_cpu(
    key: Array, logits: Array, rows: random.Rows | None, *, component: int, components: int
) -> tuple[Array, Array, Array]:
    words = words_of(key)
    return _sample_kernel(component, words if rows is None else rows.after(words), logits)


def _sample_cpu_takes(
    key: Array, logits: Array, rows: random.Rows | None, **components: int
) -> bool:
    return can_draw(key, logits, rows)


def _sample_columns_takes(key: Array, logits: Array, *_: object, **components: int) -> bool:
    return _few(logits)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sample_kernel(component: int, key: Array, logits: Array) -> tuple[Array, Array, Array]:
    return tuple(cpu.sample(key, logits, component))  # type: ignore[return-value]


@_sample_kernel.defjvp
def _sample_kernel_jvp(
    component: int, primals: PyTree, tangents: PyTree
) -> tuple[tuple[Array, ...], PyTree]:
    (key, logits), (_, d_logits) = primals, tangents
    results = action, *_ = _sample_kernel(component, key, logits)
    d_scores = jax.jvp(lambda x: _score(x, action)[1:], (logits,), (d_logits,))[1]
    return results, (np.zeros(action.shape, jax.dtypes.float0), *d_scores)


_sample = Operation(
    "sample",
    xla=_sample_xla,
    cpu=Kernel(_sample_cpu, takes=_sample_cpu_takes),
    gpu=Kernel(_sample_columns, takes=_sample_columns_takes),
    tpu=Kernel(_sample_columns, takes=_sample_columns_takes),
)


def _sample_continuous(
    normal: Normal,
    action: ArrayLike | None,
    key: PRNGKeyArray | None,
    rows: random.Rows | None,
) -> tuple[Array, Array, Array]:
    loc, scale = normal.parameters()
    if loc.ndim == 0:
        raise ValueError("loc must be (batch, k); got a scalar")
    batch, k = loc.shape[0], math.prod(loc.shape[1:])
    bad = ~(jnp.isfinite(loc) & jnp.isfinite(scale) & (scale > 0)).reshape(batch, k)
    loc = jnp.where(bad, 0, normal.narrow(loc).reshape(batch, k))
    safe = type(normal)(loc, jnp.where(bad, 1, scale.reshape(batch, k)))
    if action is None:
        which = () if rows is None else (rows,)  # a user's own distribution may not know them
        action = jax.lax.stop_gradient(safe.mode() if key is None else safe.sample(key, *which))
    # Drawn or given, an action is scored by its value: a trainer that scores a stored action
    # again starts from a ratio of exactly 1, also where tanh was rounded to +-1.
    logprob = safe.log_prob(_rows(action, batch, k, f"({batch}, {k})"))
    logprob, total = (jnp.where(bad, jnp.nan, x).sum(1) for x in (logprob, safe.entropy()))
    return jnp.asarray(action), logprob, total
