"""The clipped PPO loss of a minibatch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from puffer_jax.kernels.reductions import sums
from puffer_jax.nn.sampling import sample_logits
from puffer_jax.policies.protocol import forward_of, is_recurrent
from puffer_jax.ppo.advantage import Importance, advantage_of
from puffer_jax.ppo.devices import ALONE, Share
from puffer_jax.ppo.experience import Experience, Hypers, Metrics
from puffer_jax.ppo.moments import Samples, joined

METRICS = (
    *("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"),
    "importance",
)
"""What `loss` returns about a minibatch: scalars by the reference's names."""


def evaluate_segments(
    policy: Any, experience: Experience
) -> tuple[PyTree, Float[Array, "segments time"]]:
    """Logits, flat (segments * time, ...), and values (segments, time) of stored segments."""
    shape = experience.logprobs.shape
    if is_recurrent(policy):
        starts = {} if experience.starts is None else {"done": experience.starts}
        logits, values, _ = policy.forward(experience.observations, experience.state, **starts)
    else:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), experience.observations)
        logits, values = forward_of(policy, "forward")(flat)
    return logits, values.reshape(shape)


def _clamp(x: Array, low: ArrayLike, high: ArrayLike) -> Array:
    # Like torch's, this passes the gradient at the bounds; jnp.clip halves it there.
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def _where_played(mask: Array, logits: PyTree, values: Array) -> tuple[PyTree, Array]:
    """Logits and values, with some that are finite for steps that were not played."""
    flat = mask.reshape(-1)

    def finite(x: Array) -> Array:
        return jnp.where(flat.reshape(-1, *[1] * (x.ndim - 1)), x, 1)

    return jax.tree.map(finite, logits), jnp.where(mask | jnp.isfinite(values), values, 0)


def _mean(x: Array, mask: Array | None) -> Array:
    if mask is None:
        return x.mean()
    return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1)


def _means(arrays: list[Array], mask: Array | None, count: int | Array) -> list[Array]:
    """What this device adds to the mean of each array (rows, time) over `count` played steps."""
    if mask is None:
        return [total / count for total in sums(arrays)]
    return [total / count for total in sums([jnp.where(mask, x, 0) for x in arrays])]


def _standardised(
    x: Array, mask: Array | None, weights: Array | Importance, share: Share
) -> tuple[Array, int | Array]:
    """Advantages of unit deviation, weighted, and how many steps were played; on all devices."""
    count = x.size if mask is None else mask.sum()
    mean = _mean(x, mask)
    centred = x - mean
    squares = centred**2 if mask is None else jnp.where(mask, centred**2, 0)
    squares = squares.sum()
    if share.axis is not None:
        own = Samples(jnp.asarray(count, x.dtype), mean, squares)
        totals = (weights.total,) if isinstance(weights, Importance) else ()
        (count, mean, squares), totals = joined(own, share, *totals)
        centred = x - mean
        if isinstance(weights, Importance):
            weights = weights.weights(*totals)
    assert not isinstance(weights, Importance)
    # Of a single step nothing is known about the deviation.
    scaled = centred / (jnp.sqrt(squares / jnp.maximum(count - 1, 1)) + 1e-8)
    return weights * scaled, count if mask is None else jnp.maximum(count, 1)


def loss(
    policy: Any,
    batch: Experience,
    advantages: Float[Array, "rows time"],
    weights: Float[Array, "rows 1"] | Importance,
    hypers: Hypers,
    recompute_advantage: bool = False,
    share: Share = ALONE,
) -> tuple[Array, Metrics]:
    """The clipped PPO loss of a minibatch.

    Args:
        policy: the policy to improve.
        batch: the minibatch's rows; its `values` are what the value loss is clipped around.
        advantages: the advantages of its steps.
        weights: importance weights of its rows, to correct for drawing by priority; or, of one
            device among others, what they follow from.
        hypers: `PuffeRLConfig.hypers()`.
        recompute_advantage: see `PuffeRLConfig`.
        share: the rows are those of one device of these.

    Returns:
        The loss, and the metrics by the reference's names, plus "ratio" and "values" (rows, time).
        Of one device among others the loss and the metrics are its part: their sum over devices is
        what one device would have of all rows.
    """
    logits, values = evaluate_segments(policy, batch)
    if batch.mask is not None:
        # What was not played may have neither a possible action nor a number for a value.
        logits, values = _where_played(batch.mask, logits, values)
    _, logprobs, entropy = sample_logits(logits, action=batch.actions)
    logratio = logprobs.reshape(batch.logprobs.shape) - batch.logprobs
    ratio = jnp.exp(logratio)
    clip, mask = hypers["clip_coef"], batch.mask
    returns = advantages + batch.values
    if recompute_advantage:
        advantages = advantage_of(batch, jax.lax.stop_gradient(ratio), hypers)
    scaled, count = _standardised(advantages, mask, weights, share)
    policy_loss = jnp.maximum(-scaled * ratio, -scaled * _clamp(ratio, 1 - clip, 1 + clip))
    bound = hypers["vf_clip_coef"]
    clipped = batch.values + _clamp(values - batch.values, -bound, bound)
    value_loss = jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    entropy = entropy.reshape(ratio.shape)
    outside = (jnp.abs(ratio - 1) > clip).astype(ratio.dtype)
    parts = [policy_loss, value_loss, entropy, -logratio, (ratio - 1) - logratio, outside, ratio]
    metrics = dict(zip(METRICS, _means(parts, mask, count), strict=True))
    metrics["value_loss"] = 0.5 * metrics["value_loss"]
    total = (
        metrics["policy_loss"]
        + hypers["vf_coef"] * metrics["value_loss"]
        - hypers["ent_coef"] * metrics["entropy"]
    )
    return total, metrics | {"ratio": ratio, "values": values}
