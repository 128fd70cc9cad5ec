"""Collecting experience: from JAX-native environments within one program, or step by step.

Both store what the reference's `PuffeRL.evaluate` stores, in its order: row `r * agents + i` is the
r-th segment of agent i, and a step's reward is the one that came with its observation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base import spaces
from puffer_jax.config import PuffeRLConfig, Sizes
from puffer_jax.environments.jax_native import AdaptedEnv, autoreset
from puffer_jax.nn import random
from puffer_jax.nn.params import merge, split
from puffer_jax.nn.sampling import sample_logits
from puffer_jax.ppo import Experience, Last, Params, is_recurrent

State = dict[str, Array]


class Arrival(NamedTuple):
    """What an environment hands to the agents at one step; arrays (agents, ...).

    Environments on the host leave out what the options do not ask for: None.

    Attributes:
        obs: an array or a tree of them.
        reward: float32, for the action before.
        terminated: whether the episode ended.
        truncated: whether it was cut off.
        start: whether `obs` is the first of an episode.
        mask: False where an action on `obs` is not played.
        final_value: the value of the last observation of an episode cut off just now, else 0.
    """

    obs: Any
    reward: Any  # JAX's arrays, or NumPy's on their way to the device
    terminated: Any
    truncated: Any
    start: Any
    mask: Any
    final_value: Any


class Actor(NamedTuple):
    """A policy in an environment, as pure functions of its parameters; see `make_actor`.

    Attributes:
        initial_state: agents -> the zero state, None for a feed-forward policy.
        act: (params, obs, state, start, key) -> (action, logprob, values, state).
        value: (params, obs, state) -> values (agents,).
        playable: the environment's action for a sampled one: within the bounds of a Box.
    """

    initial_state: Callable[[int], State | None]
    act: Callable[..., tuple[Array, Array, Array, State | None]]
    value: Callable[..., Array]
    playable: Callable[[Array], Array]


def make_actor(config: PuffeRLConfig, policy: nnx.Module, action_space: Any) -> Actor:
    """The actor of policies like `policy`."""
    graphdef, _ = split(policy)
    recurrent = is_recurrent(policy)

    def initial_state(agents: int) -> State | None:
        return policy.initial_state(agents) if recurrent else None  # type: ignore[attr-defined]

    def forward(params: Params, obs: Any, state: State | None) -> tuple[Any, Array, State | None]:
        outputs = merge(graphdef, params).forward_eval(obs, state)
        logits, values = outputs[:2]
        return logits, values.reshape(-1), outputs[2] if recurrent else None

    def act(
        params: Params, obs: Any, state: State | None, start: Array | None, key: PRNGKeyArray
    ) -> tuple[Array, Array, Array, State | None]:
        if config.reset_on_done:
            assert start is not None
            state = jax.tree.map(lambda s: jnp.where(start[:, None], 0, s), state)
        logits, values, state = forward(params, obs, state)
        action, logprob, _ = sample_logits(logits, key=key)
        return action, logprob, values, state

    def value(params: Params, obs: Any, state: State | None) -> Array:
        return forward(params, obs, state)[1]

    def playable(action: Array) -> Array:
        if spaces.kind_of(action_space) != "box":
            return action
        low, high = (jnp.asarray(b, action.dtype) for b in (action_space.low, action_space.high))
        return jnp.clip(action, low, high)

    return Actor(initial_state, act, value, playable)


def stored(config: PuffeRLConfig, arrival: Arrival, masked: bool) -> dict[str, Any]:
    """What of an arrival goes into the `Experience`, as the options say."""
    bound, reward = config.reward_clip, arrival.reward * config.reward_scale
    terminal = arrival.terminated
    if config.bootstrap_truncation:
        terminal = terminal | arrival.truncated
    return {
        "observations": arrival.obs,
        "rewards": reward if bound is None else jnp.clip(reward, -bound, bound),
        "terminals": terminal.astype(reward.dtype),
        "starts": arrival.start if config.reset_on_done else None,
        "mask": arrival.mask if masked else None,
        "final_values": arrival.final_value if config.bootstrap_truncation else None,
    }


def with_own_value(arrival: Arrival, values: Array) -> Arrival:
    """The arrival where the observation at an episode's end is the episode's last one."""
    cut = arrival.truncated & ~arrival.terminated
    return arrival._replace(final_value=jnp.where(cut, values, 0))


def last_of(config: PuffeRLConfig, arrival: Arrival, values: Array) -> Last:
    """What followed the last actions, from the arrival after them and its values."""
    row = stored(config, arrival, masked=False)
    return Last(row["rewards"], row["terminals"], values, row["final_values"])


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


def _with_following(experience: Experience, after: Last, agents: int) -> Last:
    """What followed each row: the first step of the agent's next row, or `after`."""
    first = Last(
        experience.rewards[:, 0],
        experience.terminals[:, 0],
        experience.values[:, 0],
        None if experience.final_values is None else experience.final_values[:, 0],
    )
    return jax.tree.map(lambda row, end: jnp.concatenate([row[agents:], end]), first, after)


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
