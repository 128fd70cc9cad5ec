"""The shapes of an epoch, and what training of those shapes amounts to."""

from typing import NamedTuple

# With less, none of the tasks in `examples/learning.py` was ever learned.
_FEWEST_EPOCHS, _FEWEST_UPDATES = 10, 200


def multiples(number: int, unit: int) -> str:
    """The multiples of `unit` around a number, in words."""
    below = number // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n > 0)


class Sizes(NamedTuple):
    """The shapes of one epoch, settled for a number of agents.

    Attributes:
        agents: number of agents that act at each step, over all environments.
        segments: number of rows of the experience buffer; `rounds` * agents.
        horizon: number of steps in a segment.
        minibatch_segments: number of rows in a minibatch.
        minibatches: number of minibatches in an epoch.
        accumulate: number of minibatches whose gradients make one optimizer step.
        epochs: number of epochs in the whole run.
        on_one: number of minibatches in an epoch if there were one device; 0: not known.
    """

    agents: int
    segments: int
    horizon: int
    minibatch_segments: int
    minibatches: int
    accumulate: int
    epochs: int
    on_one: int = 0

    def divided(self, devices: int) -> "Sizes":
        """What each of so many devices has of it; see `PuffeRLConfig.sizes`."""
        return self._replace(
            agents=self.agents // devices,
            segments=self.segments // devices,
            minibatch_segments=self.minibatch_segments // devices,
        )

    @property
    def batch(self) -> int:
        """Number of steps in an epoch."""
        return self.segments * self.horizon

    @property
    def updates(self) -> int:
        """Number of gradient steps in the whole training."""
        return self.epochs * self.minibatches // self.accumulate

    @property
    def plan(self) -> str:
        """The gradient steps in words, for people."""
        each = self.minibatches // self.accumulate
        return (
            f"{self.updates:,} gradient steps planned: {self.epochs:,} epochs of {self.batch:,} "
            f"steps, in each {each} minibatch{'es' if each > 1 else ''} of "
            f"{self.minibatch_segments * self.horizon * self.accumulate:,}"
        )

    @property
    def hopeless(self) -> str | None:
        """Why the plan cannot work, and what would help; None if it may."""
        if self.epochs < _FEWEST_EPOCHS or self.updates < _FEWEST_UPDATES:
            return (
                f"{self.plan}; that is too few to learn from. More total_timesteps, a smaller "
                "batch_size, fewer environments, or more update_epochs would help"
            )
        return None

    @property
    def coarser(self) -> str | None:
        """What many devices change in the plan, and how to keep it; None if nothing."""
        if self.minibatches >= self.on_one:
            return None
        return (
            f"{self.plan}; on one device there would be {self.on_one // self.accumulate} in each, "
            f"but of many each learns from whole segments of {self.horizon} steps. More "
            "environments, or a smaller bptt_horizon, would keep them"
        )
