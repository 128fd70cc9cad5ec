"""Rollouts in JAX-native environments, compiled into one program."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from puffer_jax.environments.jax_native import AdaptedEnv, Step
from puffer_jax.environments.resets import autoreset_all
from puffer_jax.nn import random
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.devices import ALONE, Share
from puffer_jax.ppo.experience import Experience, Params, RecurrentState
from puffer_jax.ppo.moments import add
from puffer_jax.ppo.rollout import Arrival, Player, last_of, stored, with_following
from puffer_jax.ppo.sizes import Sizes, multiples
from puffer_jax.ppo.source import Stats


class Stream(NamedTuple):
    """JAX-native environments between two steps, with the agents' recurrent state.

    Attributes:
        env: the states of the environments, (agents, ...).
        arrival: what the environments handed out last.
        state: the policy's recurrent state.
        returns: the returns so far of the running episodes.
        lengths: their lengths so far, at most 2**31 - 1.
        lost: what rounding took from `returns`; None counts as 0.
    """

    env: PyTree
    arrival: Arrival
    state: RecurrentState | None
    returns: Float[Array, " agents"]
    lengths: Int[Array, " agents"]
    lost: Float[Array, " agents"] | None = None


class Episodes(NamedTuple):
    """Sums over the episodes that ended in a rollout: scalars, or one for each agent.

    Attributes:
        episodes: the number of episodes, int32.
        returns: the sum of their returns, float32.
        lengths: the sum of their lengths, float32, since an integer would overflow.
        steps: the number of agent steps that were played, int32.
    """

    episodes: Array
    returns: Array
    lengths: Array
    steps: Array

    def means(self) -> dict[str, Array]:
        """Mean return and length; NaN if no episode ended."""
        count = jnp.where(self.episodes == 0, jnp.nan, self.episodes)
        return {"episode_return": self.returns / count, "episode_length": self.lengths / count}


class JaxSource:
    """Experience from copies of a JAX-native environment; see `Source`.

    Args:
        config: how many copies to run, and what to store.
        env: the environment.
        policy: a policy with the structure of those that will act.
        share: `init` and `collect` are for one device of these, and its agents; they draw the same
            numbers for an agent on any number of devices.

    Raises:
        ValueError: the sizes do not fit together, or cannot be divided among the devices.
    """

    pure = True

    def __init__(
        self, config: PuffeRLConfig, env: AdaptedEnv, policy: nnx.Module, share: Share = ALONE
    ):
        self._agents, self._share = env.num_agents, share
        self.sizes, copies = _sizes(config, env.num_agents or 1, share.count)
        self._own, self._copies = self.sizes.divided(share.count), copies // share.count
        self._config, self._reset = config, jax.vmap(env.reset)
        self._step_envs = autoreset_all(env, self._copies, config.reset_ratio)
        self._playing = env.playing
        self._player = Player(config, policy, env.action_space)

    def init(self, key: PRNGKeyArray) -> Stream:
        """Start all episodes."""
        agents = self._own.agents
        obs, env = self._reset(self._keys(key))
        no, yes = jnp.zeros(agents, bool), jnp.ones(agents, bool)
        mask = yes if self._playing is None else self._rows(jax.vmap(self._playing)(env))
        obs = self._rows(obs)
        zero = jnp.zeros(agents, jnp.float32)
        state = self._player.initial_state(agents)
        final_value = zero.astype(self._player.value_dtype(obs, state))
        arrival = Arrival(obs, zero, no, no, yes, mask, final_value)
        return Stream(env, arrival, state, zero, jnp.zeros(agents, jnp.int32), zero)

    def collect(
        self, params: Params, stream: Stream, key: PRNGKeyArray
    ) -> tuple[Stream, Experience, Episodes]:
        """Play a batch; rows are by round and agent, on each device for itself."""
        config, agents, horizon = self._config, self._own.agents, self._own.horizon
        if not config.store_initial_state:
            stream = stream._replace(state=jax.tree.map(jnp.zeros_like, stream.state))

        def segment(carry: tuple[Stream, Episodes], keys: Array) -> tuple[PyTree, PyTree]:
            state = carry[0].state if config.store_initial_state else None
            carry, rows = jax.lax.scan(lambda c, k: self._step(params, c, k), carry, keys)
            return carry, (rows, state)

        keys = random.split(key, (self._own.segments // agents, horizon))
        keys = jax.vmap(jax.vmap(random.split))(keys)
        # Summed over the agents after the last step: a reduction in each is a launch on a GPU.
        kinds = jnp.int32, jnp.float32, jnp.float32, jnp.int32
        none = Episodes(*(jnp.zeros(agents, kind) for kind in kinds))
        (stream, sums), (rows, state) = jax.lax.scan(segment, (stream, none), keys)
        # (rounds, horizon, agents, ...) -> (rounds * agents, horizon, ...)
        rows = jax.tree.map(
            lambda x: jnp.swapaxes(x, 1, 2).reshape(-1, horizon, *x.shape[3:]), _apart(rows)
        )
        state = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), state)
        experience = Experience(**rows, state=state)
        if config.bootstrap_last:
            arrival = stream.arrival
            state = self._player.at_start(stream.state, arrival.start)
            values = self._player.value(params, arrival.obs, state)
            experience = with_following(experience, last_of(config, arrival, values), agents)
        totals = jax.tree.map(lambda x: x.sum(dtype=x.dtype), sums)
        return stream, experience, self._share.sum(totals)

    def summary(self, outcome: Episodes) -> tuple[int, Stats]:
        """Steps of a batch, and the mean once per episode, so that all episodes weigh the same."""
        count, returns, lengths, steps = (float(x) for x in outcome)
        stats = {}
        if count:
            stats["episode_return"] = [returns / count] * int(count)
            stats["episode_length"] = [lengths / count] * int(count)
        return int(steps), stats

    def advice(self) -> str:
        """Nothing: what absent agents would have done is left out."""
        return ""

    def close(self) -> None:
        """Do nothing."""

    def _step(
        self, params: Params, carry: tuple[Stream, Episodes], keys: Array
    ) -> tuple[tuple[Stream, Episodes], dict[str, PyTree]]:
        """One step of all agents; returns a column of the `Experience`, `_joined`."""
        stream, sums = carry
        arrival = stream.arrival
        act_key, env_key = keys
        action, logprob, values, state = self._player.act(
            *(params, arrival.obs, stream.state, arrival.start, act_key),
            rows=self._share.rows(self._own.agents),
        )
        several = self._agents is not None
        row = stored(self._config, arrival, masked=several) | {
            "actions": action,
            "logprobs": logprob,
            "values": values,
            "waits": ~arrival.mask if several else None,
        }
        out = self._act_on(env_key, stream.env, self._player.playable(action))
        final_value = self._final_value(params, out, state, arrival.final_value)
        done = out.terminated | out.truncated
        returns, lost = add(stream.returns, stream.lost, out.reward)
        played = arrival.mask & (stream.lengths < jnp.iinfo(jnp.int32).max)
        lengths = stream.lengths + played
        new = Episodes(done, jnp.where(done, returns, 0), jnp.where(done, lengths, 0), arrival.mask)
        sums = jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, new)
        mask = arrival.mask if out.playing is None else out.playing
        arrival = Arrival(
            out.obs, out.reward, out.terminated, out.truncated, out.start, mask, final_value
        )
        returns, lengths, lost = (jnp.where(done, 0, x) for x in (returns, lengths, lost))
        return (Stream(out.state, arrival, state, returns, lengths, lost), sums), _joined(row)

    def _act_on(self, key: PRNGKeyArray, env: PyTree, action: PyTree) -> Step:
        """A step of all environments, with a row for each agent (but for their states)."""
        keys = self._keys(key)
        if self._agents is None:
            return self._step_envs(keys, env, action)
        shape = (self._copies, self._agents)
        action = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), action)
        out = self._step_envs(keys, env, action)
        start = jnp.broadcast_to(out.start[:, None], shape)
        rows = self._rows(out._replace(state=None, info=None, start=start))
        return rows._replace(state=out.state, info=out.info)

    def _keys(self, key: PRNGKeyArray) -> Array:
        """A key for each environment."""
        return random.split(key, self._copies, self._share.rows(self._copies))

    def _rows(self, tree: PyTree) -> PyTree:
        """Arrays (copies, agents, ...) as (copies * agents, ...)."""
        if self._agents is None:
            return tree
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    def _final_value(
        self, params: Params, out: Step, state: RecurrentState | None, before: Array
    ) -> Array:
        """The value of the last observation where an episode was cut off, else 0."""
        cut = out.truncated & ~out.terminated
        if not self._config.bootstrap_truncation:
            return before  # zeros, which need not be written again
        zeros = jnp.zeros_like(before)
        return jax.lax.cond(
            cut.any(),
            lambda: jnp.where(cut, self._player.value(params, out.final_obs, state), 0),
            lambda: zeros,
        )


_TOGETHER = "rewards", "terminals", "logprobs", "values"


def _joined(row: dict[str, PyTree]) -> dict[str, PyTree]:
    """A step's row with its numbers in one array: on a GPU each array is written by a launch."""
    numbers = [row[name] for name in _TOGETHER]
    if len({x.dtype for x in numbers}) > 1:
        return row
    others = {name: x for name, x in row.items() if name not in _TOGETHER}
    return others | {"numbers": jnp.stack(numbers)}


def _apart(rows: dict[str, PyTree]) -> dict[str, PyTree]:
    """The rows (rounds, horizon, agents, ...) of what `_joined` returned at each step."""
    if "numbers" not in rows:
        return rows
    numbers = dict(zip(_TOGETHER, jnp.moveaxis(rows["numbers"], 2, 0), strict=True))
    return {name: x for name, x in rows.items() if name != "numbers"} | numbers


def _sizes(config: PuffeRLConfig, agents: int, devices: int) -> tuple[Sizes, int]:
    """The sizes for environments of so many agents each, and how many environments to run."""
    copies = config.num_envs or max(1, config.sizes(None).agents // agents)
    if copies % devices:
        raise ValueError(
            f"num_envs {copies} cannot be divided among {devices} devices; nearest: "
            + multiples(copies, devices)
        )
    return config.sizes(copies * agents, devices=devices), copies
