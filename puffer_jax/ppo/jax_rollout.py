"""Rollouts in JAX-native environments, within one program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base.profile import Profile
from puffer_jax.environments.jax_native import AdaptedEnv, autoreset
from puffer_jax.nn import random
from puffer_jax.nn.params import split
from puffer_jax.ppo import jax_rollout
from puffer_jax.ppo.config import PuffeRLConfig, Sizes
from puffer_jax.ppo.experience import Experience, Params
from puffer_jax.ppo.rollout import (
    Arrival,
    State,
    _owned,
    _with_following,
    last_of,
    make_actor,
    stored,
)


class Stream(NamedTuple):
    """JAX-native environments between two steps, with the agents' recurrent state.

    Attributes:
        env: states of the environments, (agents, ...).
        arrival: what they handed out last.
        state: the policy's.
        returns: sums of rewards of the running episodes, (agents,).
        lengths: their steps, (agents,).
    """

    env: Any
    arrival: Arrival
    state: State | None
    returns: Array
    lengths: Array


class Episodes(NamedTuple):
    """Sums over the episodes that ended in a rollout; all scalars."""

    episodes: Array
    returns: Array
    lengths: Array

    def means(self) -> dict[str, Array]:
        """Mean return and length; NaN if no episode ended."""
        count = jnp.where(self.episodes == 0, jnp.nan, self.episodes)
        return {"episode_return": self.returns / count, "episode_length": self.lengths / count}


class Collector(NamedTuple):
    """Rollouts of one policy in JAX-native environments; see `make_collector`.

    Attributes:
        init: key -> Stream.
        collect: (params, stream, key) -> (stream, Experience, Episodes).
    """

    init: Callable[[PRNGKeyArray], Stream]
    collect: Callable[..., tuple[Stream, Experience, Episodes]]


def make_collector(
    config: PuffeRLConfig, sizes: Sizes, env: AdaptedEnv, policy: nnx.Module
) -> Collector:
    """Rollouts in `sizes.agents` copies of a JAX-native environment."""
    actor = make_actor(config, policy, env.action_space)
    agents, horizon, rounds = sizes.agents, sizes.horizon, sizes.segments // sizes.agents
    env_step = jax.vmap(autoreset(env))

    def init(key: PRNGKeyArray) -> Stream:
        obs, state = jax.vmap(env.reset)(random.split(key, agents))
        no, yes = jnp.zeros(agents, bool), jnp.ones(agents, bool)
        zero = jnp.zeros(agents, jnp.float32)
        # A float64 policy has float64 values.
        _, params = split(policy)
        recurrent = actor.initial_state(agents)
        dtype = jax.eval_shape(actor.value, params, obs, recurrent).dtype
        arrival = Arrival(obs, zero, no, no, yes, yes, zero.astype(dtype))
        return Stream(state, arrival, recurrent, zero, jnp.zeros(agents, jnp.int32))

    def step(
        params: Params, carry: tuple[Stream, Episodes], key: PRNGKeyArray
    ) -> tuple[tuple[Stream, Episodes], dict[str, Any]]:
        stream, episodes = carry
        arrival = stream.arrival
        act_key, env_key = random.split(key)
        action, logprob, values, state = actor.act(
            params, arrival.obs, stream.state, arrival.start, act_key
        )
        row = stored(config, arrival, masked=False) | {
            "actions": action,
            "logprobs": logprob,
            "values": values,
        }
        out = env_step(random.split(env_key, agents), stream.env, actor.playable(action))
        cut = out.truncated & ~out.terminated
        final_value = jnp.zeros_like(values)
        if config.bootstrap_truncation:
            final_value = jax.lax.cond(
                cut.any(),
                lambda: jnp.where(cut, actor.value(params, out.final_obs, state), 0),
                lambda: final_value,
            )
        done = out.terminated | out.truncated
        returns, lengths = stream.returns + out.reward, stream.lengths + 1
        episodes = Episodes(
            episodes.episodes + done.sum(dtype=jnp.int32),
            episodes.returns + jnp.where(done, returns, 0).sum(),
            episodes.lengths + jnp.where(done, lengths, 0).sum(dtype=jnp.int32),
        )
        arrival = Arrival(
            out.obs, out.reward, out.terminated, out.truncated, done, arrival.mask, final_value
        )
        stream = Stream(
            out.state, arrival, state, jnp.where(done, 0, returns), jnp.where(done, 0, lengths)
        )
        return (stream, episodes), row

    def collect(
        params: Params, stream: Stream, key: PRNGKeyArray
    ) -> tuple[Stream, Experience, Episodes]:
        if not config.store_initial_state:
            stream = stream._replace(state=jax.tree.map(jnp.zeros_like, stream.state))

        def segment(carry: Any, keys: Any) -> tuple[Any, Any]:
            state = carry[0].state if config.store_initial_state else None
            carry, rows = jax.lax.scan(lambda c, k: step(params, c, k), carry, keys)
            return carry, (rows, state)

        zero = jnp.zeros((), jnp.float32)
        nothing = Episodes(jnp.zeros((), jnp.int32), zero, jnp.zeros((), jnp.int32))
        keys = random.split(key, (rounds, horizon))
        (stream, episodes), (rows, state) = jax.lax.scan(segment, (stream, nothing), keys)
        # (rounds, horizon, agents, ...) -> (rounds * agents, horizon, ...)
        rows = jax.tree.map(
            lambda x: jnp.swapaxes(x, 1, 2).reshape(-1, horizon, *x.shape[3:]), rows
        )
        state = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), state)
        experience = Experience(**rows, state=state)
        if config.bootstrap_last:
            values = actor.value(params, stream.arrival.obs, _next_state(config, stream))
            after = last_of(config, stream.arrival, values)
            experience = experience._replace(last=_with_following(experience, after, agents))
        return stream, experience, episodes

    return Collector(init, collect)


def _next_state(config: PuffeRLConfig, stream: Stream) -> State | None:
    if not config.reset_on_done:
        return stream.state
    start = stream.arrival.start
    return jax.tree.map(lambda s: jnp.where(start[:, None], 0, s), stream.state)


class _JaxSource:
    """Experience from a JAX-native environment."""

    def __init__(self, config: PuffeRLConfig, env: Any, policy: nnx.Module):
        self.sizes = config.sizes(None)
        self.collector = jax_rollout.make_collector(config, self.sizes, env, policy)
        self._collect = jax.jit(self.collector.collect, donate_argnums=1)
        self.stream: jax_rollout.Stream

    def reset(self, params: Any, key: PRNGKeyArray) -> None:
        self.stream = _owned(jax.jit(self.collector.init)(key))

    def collect(
        self, params: Any, key: PRNGKeyArray, profile: Profile
    ) -> tuple[Experience, int, dict[str, list[Any]]]:
        self.stream, experience, episodes = self._collect(params, self.stream, key)
        return experience, self.sizes.batch, self.stats(episodes)

    @staticmethod
    def stats(episodes: jax_rollout.Episodes) -> dict[str, list[Any]]:
        count, returns, lengths = (float(x) for x in episodes)
        if count == 0:
            return {}
        # Every episode counts alike, in whichever rollout it ended.
        return {
            "episode_return": [returns / count] * int(count),
            "episode_length": [lengths / count] * int(count),
        }

    def close(self) -> None:
        pass
