"""Where experience comes from: one protocol for JAX-native environments and those on the host."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import PRNGKeyArray, PyTree

from puffer_jax.ppo.experience import Experience, Params
from puffer_jax.ppo.sizes import Sizes

# name -> values, from the episodes that ended and from the environments' infos.
Stats = dict[str, list[Any]]


@runtime_checkable
class Source(Protocol):
    """Environments and a policy that acts in them, batch by batch.

    A *stream* is what lasts from one batch to the next: the states of the environments, and the
    policy's recurrent state. An *outcome* is what else there is to report about a batch.

    Attributes:
        sizes: the sizes of a batch and of the update.
        pure: whether `init` and `collect` are pure functions of their arguments. Then they can be
            compiled, `collect` in one program with the update, and a checkpoint of the stream
            continues a run exactly. Otherwise the environments have a state of their own.
    """

    sizes: Sizes
    pure: bool

    def init(self, key: PRNGKeyArray) -> PyTree:
        """Start all episodes; returns the stream."""

    def collect(
        self, params: Params, stream: PyTree, key: PRNGKeyArray
    ) -> tuple[PyTree, Experience, PyTree]:
        """Play a batch; returns the stream after it, the experience, and the outcome."""
        ...

    def summary(self, outcome: PyTree) -> tuple[int, Stats]:
        """How many agent steps were played, and the statistics of the episodes that ended."""
        ...

    def advice(self) -> str:
        """What there is to say if a number is not finite; empty if nothing."""
        ...

    def close(self) -> None:
        """Close the environments."""
