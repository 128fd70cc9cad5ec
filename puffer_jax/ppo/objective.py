"""The clipped PPO loss of a minibatch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from puffer_jax.kernels.reductions import sums
from puffer_jax.nn.sampling import sample_logits
from puffer_jax.policies.protocol import forward_of, is_recurrent
from puffer_jax.ppo.advantage import advantage_of
from puffer_jax.ppo.experience import Experience, Hypers, Metrics

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


def _means(arrays: list[Array], mask: Array | None) -> list[Array]:
    """The mean of each array (rows, time) over the steps that were played."""
    if mask is None:
        return [total / arrays[0].size for total in sums(arrays)]
    count = jnp.maximum(mask.sum(), 1)
    return [total / count for total in sums([jnp.where(mask, x, 0) for x in arrays])]


def _standardise(x: Array, mask: Array | None) -> Array:
    count = x.size if mask is None else mask.sum()
    centred = x - _mean(x, mask)
    squares = centred**2 if mask is None else jnp.where(mask, centred**2, 0)
    # Of a single step nothing is known about the deviation.
    return centred / (jnp.sqrt(squares.sum() / jnp.maximum(count - 1, 1)) + 1e-8)


def loss(
    policy: Any,
    batch: Experience,
    advantages: Float[Array, "rows time"],
    weights: Float[Array, "rows 1"],
    hypers: Hypers,
    recompute_advantage: bool = False,
) -> tuple[Array, Metrics]:
    """The clipped PPO loss of a minibatch.

    Args:
        policy: the policy to improve.
        batch: the minibatch's rows; its `values` are what the value loss is clipped around.
        advantages: the advantages of its steps.
        weights: importance weights of its rows, to correct for drawing by priority.
        hypers: `PuffeRLConfig.hypers()`.
        recompute_advantage: see `PuffeRLConfig`.

    Returns:
        The loss, and the metrics by the reference's names, plus "ratio" and "values" (rows, time).
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
    scaled = weights * _standardise(advantages, mask)
    policy_loss = jnp.maximum(-scaled * ratio, -scaled * _clamp(ratio, 1 - clip, 1 + clip))
    bound = hypers["vf_clip_coef"]
    clipped = batch.values + _clamp(values - batch.values, -bound, bound)
    value_loss = jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    entropy = entropy.reshape(ratio.shape)
    outside = (jnp.abs(ratio - 1) > clip).astype(ratio.dtype)
    parts = [policy_loss, value_loss, entropy, -logratio, (ratio - 1) - logratio, outside, ratio]
    metrics = dict(zip(METRICS, _means(parts, mask), strict=True))
    metrics["value_loss"] = 0.5 * metrics["value_loss"]
    total = (
        metrics["policy_loss"]
        + hypers["vf_coef"] * metrics["value_loss"]
        - hypers["ent_coef"] * metrics["entropy"]
    )
    return total, metrics | {"ratio": ratio, "values": values}
