"""A policy in the shape that CleanRL's loops expect of an agent.

PufferLib's wrappers of the same names (`pufferlib.frameworks.cleanrl`), with the PRNG key that
JAX asks for. They hold the policy and no parameters of their own: torch's names start with
`policy.`, as in checkpoints of PufferLib's wrappers.

As in CleanRL, what they sample may lie outside the bounds of a Box: keep it for the loss, and send
`puffer_jax.playable(action, envs)` to the environments.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray, PyTree

from puffer_jax.nn.sampling import sample_logits
from puffer_jax.policies.protocol import is_recurrent

State = dict[str, Array]


class Policy(nnx.Module):
    """An agent around a policy without memory.

    Args:
        policy: anything whose call gives (logits, values (batch, 1)).

    Raises:
        TypeError: the policy is recurrent.
    """

    def __init__(self, policy: Any):
        if is_recurrent(policy):
            raise TypeError(f"{type(policy).__name__} is recurrent; use RecurrentPolicy")
        self.policy = policy
        self.is_continuous = policy.is_continuous

    def get_value(self, x: PyTree, state: object = None) -> Array:
        """Values (batch, 1) of the observations `x`; `state` is not used.

        Raises:
            TypeError: `state` is an array.
        """
        _check_state(state)
        return self.policy(x)[1]

    def get_action_and_value(
        self,
        x: PyTree,
        state: object = None,
        action: ArrayLike | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Array, Array, Array, Array]:
        """Sample actions with `key`, or score the given `action`.

        CleanRL itself passes the action as the second argument; here, as in PufferLib, that is
        the state, so write `action=`.

        Returns:
            action, logprob (batch,) and entropy (batch,), see `sample_logits`; values (batch, 1).

        Raises:
            TypeError: `state` is an array.
            ValueError: not exactly one of `action` and `key` is given, or the action does not fit.
        """
        _check_state(state)
        logits, values = self.policy(x)
        return *sample_logits(logits, action, key=key), values


class RecurrentPolicy(nnx.Module):
    """An agent around a policy with memory.

    Observations may have a time axis, (batch, time, *obs), or not, (batch, *obs); either way the
    returned state has the form of `policy.initial_state`, so that it can be carried through
    `jax.jit` and `jax.lax.scan`.

    Args:
        policy: an `LSTMWrapper`, or a module with an `initial_state` and a `forward` like its.

    Raises:
        TypeError: the policy is not recurrent.
    """

    def __init__(self, policy: Any):
        if not is_recurrent(policy):
            raise TypeError(
                f"{type(policy).__name__} has no initial_state; use Policy, or an LSTMWrapper"
            )
        self.policy = policy
        self.is_continuous = policy.is_continuous

    def get_value(self, x: PyTree, state: object = None, *, done: ArrayLike | None = None) -> Array:
        """Values (batch, time); time is 1 if `x` has no time axis.

        Args:
            x: observations.
            state: before the first step; None is the zero state.
            done: (batch, time), or (batch,) without a time axis; where set, the observation
                starts a new episode.

        Raises:
            TypeError: `state` is not a dict.
            ValueError: a shape does not fit.
        """
        _check_state(state)
        return self.policy.forward(x, state, _array(done))[1]

    def get_action_and_value(
        self,
        x: PyTree,
        state: object = None,
        action: ArrayLike | None = None,
        key: PRNGKeyArray | None = None,
        *,
        done: ArrayLike | None = None,
    ) -> tuple[Array, Array, Array, Array, State]:
        """Sample actions with `key`, or score the given `action`.

        Args:
            x: observations.
            state: before the first step; None is the zero state.
            action: (batch, time, ...), as it was taken, or flat.
            key: to sample with.
            done: as in `get_value`.

        Returns:
            action, logprob (batch * time,), entropy (batch * time,), flat in row order, see
            `sample_logits`; values (batch, time); the state after the last step.

        Raises:
            TypeError: `state` is not a dict.
            ValueError: not exactly one of `action` and `key` is given, or a shape does not fit.
        """
        _check_state(state)
        logits, values, new = self.policy.forward(x, state, _array(done))
        if "hidden" in new:
            # It holds every step's output; a carried state must not grow a time axis.
            new = {**new, "hidden": new["hidden"][:, -1]}
        return *sample_logits(logits, action, key=key), values, new


def _check_state(state: object) -> None:
    if state is not None and not isinstance(state, Mapping):
        raise TypeError(
            f"the second argument is the state, a dict or None; got {type(state).__name__}. "
            "Write action=... if it is the action"
        )


def _array(done: ArrayLike | None) -> Array | None:
    return None if done is None else jnp.asarray(done)
