"""Rollouts in environments on the host, step by step."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base.profile import Profile
from puffer_jax.nn import random
from puffer_jax.ppo import host_rollout, rollout
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.experience import Experience, Params
from puffer_jax.ppo.host_envs import Received
from puffer_jax.ppo.rollout import (
    Actor,
    Arrival,
    State,
    _with_following,
    last_of,
    stored,
    with_own_value,
)


class Outputs(NamedTuple):
    """What a policy's step leaves for the experience.

    Attributes:
        action: (agents, ...), as `sample_logits` gives them.
        scores: (agents, 2), log-probability and value; of a whole rollout (segments, time, 2).
    """

    action: Any
    scores: Any


def make_host_step(actor: Actor) -> Callable[..., tuple[Any, ...]]:
    """The one dispatch of an environment step; what happened is kept on the host (`Rows`).

    On CPUs XLA runs a program of at most eight operations in the calling thread, and hands those
    of longer ones from thread to thread, which takes 0.2 ms: hence so few here and in the kernels.

    Returns:
        (params, state, obs, start, key) -> (state, Outputs, played), with key as
        `jax.random.key_data`, since typed ones cost 20 us a dispatch, and `played` what to send
        instead of the action sampled: within the bounds of a Box; None: the same.
    """
    # That of the trainer's keys, which are made where this is; the default may change.
    impl = jax.random.key_impl(jax.random.key(0))

    def host_step(
        params: Params, state: State | None, obs: Any, start: Array | None, key: Array
    ) -> tuple[State | None, Outputs, Array | None]:
        act_key = jax.random.wrap_key_data(key, impl=impl)
        action, logprob, values, state = actor.act(params, obs, state, start, act_key)
        played = actor.playable(action)
        outputs = Outputs(action, jnp.stack([logprob, values], axis=1))
        return state, outputs, None if played is action else played

    return host_step


class Rows:
    """Trees of arrays (segments, time, ...) on the host, filled block by block.

    Args:
        segments: rows of each array.
        horizon: steps of each row.
    """

    def __init__(self, segments: int, horizon: int):
        self._shape = (segments, horizon)
        self._leaves: list[np.ndarray] = []
        self._treedef: Any = None

    def write(self, row: int, time: int, tree: Any) -> None:
        """Set the step `time` of the rows from `row` on; arrays (rows, ...), JAX's or NumPy's."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        if self._treedef is None:
            self._treedef = jax.tree.structure(tree)
            self._leaves = [np.empty(self._shape + x.shape[1:], x.dtype) for x in leaves]
        for buffer, leaf in zip(self._leaves, leaves, strict=True):
            buffer[row : row + len(leaf), time] = leaf

    def tree(self) -> Any:
        """The arrays themselves, in the form that was written."""
        return jax.tree.unflatten(self._treedef, self._leaves)


def make_finish(
    config: PuffeRLConfig,
    actor: Actor,
    agents: int,
    masked: bool,
    own_last: bool,
) -> Callable[..., Experience]:
    """The experience of a rollout in host environments, but for its observations.

    Args:
        config: says what to store.
        actor: has acted.
        agents: in all.
        masked: keep the mask.
        own_last: the observation that comes with an episode's end is the episode's last one.

    Returns:
        (params, arrivals, outputs, firsts, state, after) -> Experience, with arrivals and outputs
        (segments, time, ...), firsts a list of the states before the segments, in the order of
        rows, and with `bootstrap_last` the present state and the arrival after the last actions.
    """

    def own(arrival: Arrival, values: Array) -> Arrival:
        if own_last and config.bootstrap_truncation:
            return with_own_value(arrival, values)
        return arrival

    def finish(
        params: Params,
        arrivals: Arrival,
        outputs: Outputs,
        firsts: list[Any],
        state: Any,
        after: Arrival | None,
    ) -> Experience:
        action, scores = map(jnp.asarray, outputs)
        logprobs, values = scores[..., 0], scores[..., 1]
        arrivals = jax.tree.map(jnp.asarray, arrivals)
        experience = Experience(
            **stored(config, own(arrivals, values), masked),
            actions=action,
            logprobs=logprobs,
            values=values,
        )
        if config.store_initial_state:
            first = jax.tree.map(lambda *parts: jnp.concatenate(parts), *firsts)
            experience = experience._replace(state=first)
        if after is None:
            return experience
        if config.reset_on_done:
            state = jax.tree.map(lambda s: jnp.where(after.start[:, None], 0, s), state)
        values = actor.value(params, after.obs, state)
        last = last_of(config, own(after, values), values)
        return experience._replace(last=_with_following(experience, last, agents))

    return finish


class _HostSource:
    """Experience from environments on the host."""

    def __init__(self, config: PuffeRLConfig, env: Any, policy: nnx.Module):
        self.sizes = config.sizes(env.num_agents, env.agents_per_batch)
        self._config, self._env = config, env
        if config.bootstrap_last and env.agents_per_batch != env.num_agents:
            raise ValueError(
                "bootstrap_last needs all agents in one batch; the vecenv hands out "
                f"{env.agents_per_batch} of {env.num_agents}"
            )
        masked = env.masked or config.use_mask
        actor = rollout.make_actor(config, policy, env.single_action_space)
        self._masked = masked
        agents, batch = self.sizes.agents, env.agents_per_batch
        self._step = jax.jit(host_rollout.make_host_step(actor))
        finish = host_rollout.make_finish(config, actor, agents, masked, env.own_last)
        self._finish = jax.jit(finish)
        steps = self.sizes.segments // batch * self.sizes.horizon

        def final_value(params: Any, state: Any, obs: Any, cut: Array) -> Array:
            return jnp.where(cut, actor.value(params, obs, state), 0)

        self._keys = jax.jit(lambda key: jax.random.key_data(random.split(key, steps)))
        self._value = jax.jit(final_value)
        self._firsts = range(0, agents, batch)  # numbers of the batches' first agents
        self._zero = actor.initial_state(batch)
        self._states = dict.fromkeys(self._firsts, self._zero)
        self._pending: Received | None = None

    def reset(self, params: Any, key: PRNGKeyArray) -> None:
        self._env.async_reset(self._config.seed)

    def _arrival(self, params: Any, received: Received) -> rollout.Arrival:
        config, final_value = self._config, None
        if config.bootstrap_truncation and not self._env.own_last:
            cut = received.truncated & ~received.terminated
            final_value = np.zeros(len(cut), np.float32)
            if received.final_obs is not None and cut.any():
                state = self._states[received.agent]
                final_value = self._value(params, state, received.final_obs, cut)
        return rollout.Arrival(
            received.obs,
            received.reward,
            received.terminated,
            received.truncated if config.bootstrap_truncation else None,
            received.start if config.reset_on_done else None,
            received.mask if self._masked else None,
            final_value,
        )

    def collect(
        self, params: Any, key: PRNGKeyArray, profile: Profile
    ) -> tuple[Experience, int, dict[str, list[Any]]]:
        env, sizes = self._env, self.sizes
        row_of = {agent: agent for agent in self._firsts}
        times = dict.fromkeys(row_of, 0)
        free, full, steps = sizes.agents, 0, 0
        stats: dict[str, list[Any]] = defaultdict(list)
        keys = iter(np.asarray(self._keys(key)))
        arrivals, outputs = (host_rollout.Rows(sizes.segments, sizes.horizon) for _ in range(2))
        steps_taken: list[tuple[int, int, host_rollout.Outputs]] = []
        first_states: dict[int, Any] = {}  # of a segment's first row
        if not self._config.store_initial_state:
            self._states = dict.fromkeys(self._firsts, self._zero)
        lap = profile.laps()
        while full < sizes.segments:
            received = self._pending or env.recv()
            self._pending = None
            lap("env")
            agent, batch = received.agent, len(received.reward)
            row, time = row_of[agent], times[agent]
            if row + batch > sizes.segments:
                raise RuntimeError(
                    f"agents {agent} to {agent + batch - 1} filled their segments before others "
                    "began: the vecenv must hand out its batches in turn (sync_traj=True)"
                )
            arrival = self._arrival(params, received)
            if time == 0:
                first_states[row] = self._states[agent]
            self._states[agent], output, played = self._step(
                params, self._states[agent], arrival.obs, arrival.start, next(keys)
            )
            lap("forward")
            arrivals.write(row, time, arrival)  # while the device is busy
            steps_taken.append((row, time, output))
            for name, values in received.stats.items():
                stats[name].extend(values)
            steps += int(received.mask.sum()) if self._masked else batch
            times[agent] += 1
            if times[agent] == sizes.horizon:
                row_of[agent], times[agent] = free, 0
                free, full = free + batch, full + batch
            lap("copy")
            action = output.action if played is None else played
            if not env.overlaps:
                action = np.asarray(action)
                lap("forward")
            env.send(action)
            lap("env")
        state = after = None
        if self._config.bootstrap_last:
            self._pending = received = env.recv()
            lap("env")
            state, after = self._states[0], self._arrival(params, received)
        for step in steps_taken:
            outputs.write(*step)
        arrival = arrivals.tree()
        firsts = [first_states[row] for row in sorted(first_states)]
        experience = self._finish(
            params, arrival._replace(obs=None), outputs.tree(), firsts, state, after
        )
        # Nobody writes to them any more, so that a CPU need not copy them.
        experience = experience._replace(observations=jax.device_put(arrival.obs))
        lap("copy")
        return experience, steps, stats

    def close(self) -> None:
        self._env.close()
