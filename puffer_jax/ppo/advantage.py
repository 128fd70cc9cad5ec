"""Advantages, and how often segments are drawn."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from puffer_jax.kernels.recurrence import recurrence
from puffer_jax.ppo.experience import Experience, Hypers, Number


def puff_advantage(
    values: Float[ArrayLike, "segments time"],
    rewards: Float[ArrayLike, "segments time"],
    terminals: Float[ArrayLike, "segments time"],
    ratio: Float[ArrayLike, "segments time"],
    *,
    gamma: ArrayLike,
    gae_lambda: ArrayLike,
    vtrace_rho_clip: ArrayLike,
    vtrace_c_clip: ArrayLike,
    mask: Bool[ArrayLike, "segments time"] | None = None,
    waits: Bool[ArrayLike, "segments time"] | None = None,
) -> Float[Array, "segments time"]:
    """Generalised advantages with V-trace's clipped ratios (reference: `compute_puff_advantage`).

        delta_t = min(ratio_t, rho) (r_{t+1} + gamma (1 - d_{t+1}) v_{t+1} - v_t)
        A_t = delta_t + gamma lambda min(ratio_t, c) (1 - d_{t+1}) A_{t+1}

    Quirk kept: the last step has no successor, and its advantage is 0. With ratio 1 this is GAE
    (Schulman et al. 2016); with lambda 1, V-trace (Espeholt et al. 2018).

    Args:
        values: the values of the observations.
        rewards: the rewards that came with the observations.
        terminals: 1.0 where the episode had ended when the observation came.
        ratio: the current policy's probability of the action over the acting policy's.
        gamma: the discount.
        gae_lambda: the decay of the trace.
        vtrace_rho_clip: rho, the bound of the ratio in delta.
        vtrace_c_clip: c, the bound of the ratio in the trace.
        mask: where it is False, the step was not played and its advantage is 0.
        waits: where it is True, the agent waits for others: the advantages are those of its own
            steps alone, where each has the rewards of the steps until its next one.
    """
    values, rewards, terminals, ratio = map(jnp.asarray, (values, rewards, terminals, ratio))
    alive = 1 - terminals[:, 1:]
    current = values[:, :-1]
    waiting = None if waits is None else jnp.asarray(waits)[:, :-1]
    if waiting is not None:
        # What a step is worth in which nothing is done: what comes, undiscounted.
        kept = jnp.where(waiting, rewards[:, 1:], current)
        kept = jnp.concatenate([kept, values[:, -1:]], axis=1)
        passed = jnp.pad(jnp.where(waiting, alive, 0), ((0, 0), (0, 1)))
        values = recurrence(kept, passed)
    rho = jnp.minimum(ratio[:, :-1], vtrace_rho_clip)
    c = jnp.minimum(ratio[:, :-1], vtrace_c_clip)
    delta = rho * (rewards[:, 1:] + gamma * values[:, 1:] * alive - current)
    decay = jnp.asarray(gamma * gae_lambda * c * alive)
    if mask is not None:
        played = jnp.asarray(mask)[:, :-1]
        # Not a product: what was not played may be no number.
        delta, decay = jnp.where(played, delta, 0), jnp.where(played, decay, 0)
    if waiting is not None:
        delta, decay = jnp.where(waiting, 0, delta), jnp.where(waiting, alive, decay)
    advantages = recurrence(delta, decay)
    if waiting is not None:
        advantages = jnp.where(waiting, 0, advantages)
    return jnp.pad(advantages, ((0, 0), (0, 1)))


def priorities(
    advantages: Float[Array, "segments time"], prio_alpha: ArrayLike
) -> Float[Array, " segments"]:
    """Weights for drawing segments, (sum |A|) ** alpha, scaled to sum to 1 up to 1e-6."""
    weights = unscaled_priorities(advantages, prio_alpha)
    return (weights + 1e-6) / (weights.sum() + 1e-6)


def unscaled_priorities(
    advantages: Float[Array, "segments time"], prio_alpha: ArrayLike
) -> Float[Array, " segments"]:
    """(sum |A|) ** alpha; 0 where that is not finite."""
    weights = jnp.abs(advantages).sum(axis=1) ** prio_alpha
    return jnp.where(jnp.isfinite(weights), weights, 0)


class Importance(NamedTuple):
    """What corrects for drawing rows by priority, before the sum over all devices is known.

    Attributes:
        priorities: `unscaled_priorities` of the rows.
        total: their sum over the segments of this device.
        segments: the number of segments on all devices.
        beta: the importance exponent.
    """

    priorities: Float[Array, "rows 1"]
    total: Float[Array, ""]
    segments: int
    beta: Number

    def weights(self, total: Float[Array, ""]) -> Float[Array, "rows 1"]:
        """The rows' weights, where the priorities of all segments have this sum."""
        return (self.segments * (self.priorities + 1e-6) / (total + 1e-6)) ** -self.beta


def advantage_of(
    experience: Experience, ratio: Float[Array, "segments time"], hypers: Hypers
) -> Float[Array, "segments time"]:
    """`puff_advantage` of stored segments, using whatever the options made the rollout store."""
    names = ("gamma", "gae_lambda", "vtrace_rho_clip", "vtrace_c_clip")
    rewards, terminals = experience.rewards, experience.terminals
    values, mask, last = experience.values, experience.mask, experience.last
    waits = experience.waits
    if experience.final_values is not None:
        rewards = rewards + hypers["gamma"] * experience.final_values
    if last is not None:
        extra = last.rewards
        if last.final_values is not None:
            extra = extra + hypers["gamma"] * last.final_values
        rewards, terminals, values, ratio = (
            jnp.concatenate([x, y[:, None]], axis=1)
            for x, y in (
                (rewards, extra),
                (terminals, last.terminals),
                (values, last.values),
                (ratio, jnp.ones_like(last.values)),
            )
        )
        mask, waits = (x if x is None else jnp.pad(x, ((0, 0), (0, 1))) for x in (mask, waits))
    chosen = {name: hypers[name] for name in names}
    advantages = puff_advantage(values, rewards, terminals, ratio, **chosen, mask=mask, waits=waits)
    return advantages[:, : experience.values.shape[1]]
