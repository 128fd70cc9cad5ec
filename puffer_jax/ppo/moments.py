"""Running sums, means and variances, updated batch by batch."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from puffer_jax.ppo.devices import ALONE, Share

# A feature that varies less counts as constant, so that its first change does not explode.
_LEAST_DEVIATION = 1e-3


def add(total: Array, lost: Array | None, x: Array) -> tuple[Array, Array]:
    """Kahan's sum: the total and what rounding took from it (None: nothing), after adding x."""
    x = x if lost is None else x + lost
    new = total + x
    return new, x - (new - total)


class Samples(NamedTuple):
    """What is known of samples: arrays of one shape, or a scalar `count` for many features.

    Attributes:
        count: how many there are.
        mean: their mean.
        squares: the sum of their squared deviations from it.
    """

    count: Array  # type: ignore[reportIncompatibleMethodOverride]
    mean: Array
    squares: Array


def joined(samples: Samples, share: Share, *more: Array) -> tuple[Samples, tuple[Array, ...]]:
    """The samples of all devices together, and the sums of other scalars; in one gathering.

    Reference: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm".
    """
    (counts, means, squares), others = share.gather((samples, more))
    total = counts.sum(0)
    counts = counts.reshape(len(counts), *[1] * (means.ndim - counts.ndim), *counts.shape[1:])
    mean = (counts * means).sum(0) / jnp.maximum(total, 1)
    squares = (squares + counts * (means - mean) ** 2).sum(0)
    return Samples(total, mean, squares), tuple(x.sum(0) for x in others)


class Moments(NamedTuple):
    """Mean and variance of all that has been seen, (features,) or scalars.

    Attributes:
        seen: how many samples there were; a scalar.
        mean: their mean; 0 before the first.
        variance: their variance; 1 before the first.
    """

    seen: Array
    mean: Array
    variance: Array

    @classmethod
    def none(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "Moments":
        """Of no sample."""
        return cls(jnp.zeros((), dtype), jnp.zeros(shape, dtype), jnp.ones(shape, dtype))

    def including(
        self,
        samples: Float[Array, "samples *features"],
        weights: Float[Array, " samples"],
        share: Share = ALONE,
    ) -> "Moments":
        """With more samples, where `weights` is 1 and not 0, and those of all other devices.

        Reference: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm".
        """
        weights = weights.reshape(-1, *[1] * (samples.ndim - 1))
        new = weights.sum()
        mean = (samples * weights).sum(0) / jnp.maximum(new, 1)
        squares = ((samples - mean) ** 2 * weights).sum(0)
        if share.axis is not None:
            (new, mean, squares), _ = joined(Samples(new, mean, squares), share)
        variance = squares / jnp.maximum(new, 1)
        total = jnp.maximum(self.seen + new, 1)
        ratio, gap = new / total, mean - self.mean
        spread = (1 - ratio) * self.variance + ratio * variance
        return Moments(
            self.seen + new,
            self.mean + ratio * gap,
            jnp.where(new > 0, spread + ratio * (1 - ratio) * gap**2, self.variance),
        )

    @property
    def deviation(self) -> Array:
        """The standard deviation."""
        return jnp.maximum(jnp.sqrt(self.variance), _LEAST_DEVIATION)


class Normalization(NamedTuple):
    """What is known about observations and returns.

    Attributes:
        observations: moments of each feature; None: they are left as they are.
        returns: moments of the running discounted return; None: rewards are left as they are.
        discounted: the discounted return of the running episode of each agent, (agents,); None
            like `returns`.
    """

    observations: Moments | None
    returns: Moments | None
    discounted: Array | None
