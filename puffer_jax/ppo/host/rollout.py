"""Rollouts in environments on the host."""

from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree

from puffer_jax.base.profile import Profile
from puffer_jax.nn import random
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.devices import ALIKE, ALONE, DIVIDED, Host, Share, here, on_each, place
from puffer_jax.ppo.experience import Experience, Params, RecurrentState
from puffer_jax.ppo.host.envs import HostBatch, HostEnv
from puffer_jax.ppo.rollout import Arrival, Player, last_of, stored, with_following
from puffer_jax.ppo.sizes import Sizes
from puffer_jax.ppo.source import Stats


class Outputs(NamedTuple):
    """What a policy's step leaves for the experience.

    Attributes:
        action: (agents, ...), as `sample_logits` returns it.
        scores: (agents, 2), log-probability and value; (segments, time, 2) for a whole rollout.
    """

    action: PyTree
    scores: PyTree


class HostStream(NamedTuple):
    """What lasts from one rollout on the host to the next.

    Attributes:
        states: the policy's states, one for each batch of agents, by the number of the first agent.
        pending: a batch that has been received but not yet acted on.
    """

    states: dict[int, RecurrentState | None]
    pending: HostBatch | None


class HostStep:
    """The only dispatch of an environment step; what happened is kept on the host.

    On CPUs XLA runs a program of at most eight operations in the calling thread, and passes a
    longer one from thread to thread, which takes 0.2 ms: hence so few here and in the kernels.

    Args:
        player: the policy.
        sends: whether what it returns is sent as it is, and must be playable.
        share: it is called by one device of these.
    """

    def __init__(self, player: Player, sends: bool = False, share: Share = ALONE):
        self._player, self._sends, self._share = player, sends, share
        # As for the trainer's keys, which are made at the same time; the default may change.
        self._impl = jax.random.key_impl(jax.random.key(0))

    def __call__(
        self,
        params: Params,
        state: RecurrentState | None,
        obs: PyTree,
        start: PyTree,
        key: Array,
    ) -> tuple[RecurrentState | None, Outputs, Array | None]:
        """Act.

        Args:
            params: the policy's parameters.
            state: the state before the step.
            obs: the observations of a batch of agents.
            start: whether they are the first of an episode.
            key: as `jax.random.key_data`, since typed keys cost 20 us a dispatch.

        Returns:
            The state after the step, the outputs, and the action to send, None if it is the sampled
            one or if that is still to be made playable.
        """
        act_key = jax.random.wrap_key_data(key, impl=self._impl)
        rows = self._share.rows(len(jax.tree.leaves(obs)[0]))
        action, logprob, values, state = self._player.act(params, obs, state, start, act_key, rows)
        played = self._player.playable(action) if self._sends else action
        outputs = Outputs(action, jnp.stack([logprob, values], axis=1))
        return state, outputs, None if played is action else played


class Rows:
    """Trees of arrays (segments, time, ...) on the host, filled step by step.

    Args:
        segments: how many rows each array has.
        horizon: how many steps each row has.
    """

    def __init__(self, segments: int, horizon: int):
        self._shape = (segments, horizon)
        self._leaves: list[np.ndarray] = []
        self._treedef: PyTree = None

    def write(self, row: int, time: int, tree: PyTree) -> None:
        """Set the step `time` of the rows from `row` on; arrays (rows, ...), JAX's or NumPy's."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        if self._treedef is None:
            self._treedef = jax.tree.structure(tree)
            self._leaves = [np.empty(self._shape + x.shape[1:], x.dtype) for x in leaves]
        for buffer, leaf in zip(self._leaves, leaves, strict=True):
            buffer[row : row + len(leaf), time] = leaf

    def tree(self) -> PyTree:
        """The arrays themselves, in a tree like those that were written."""
        return jax.tree.unflatten(self._treedef, self._leaves)


class Recording:
    """What happens in a rollout, kept on the host.

    Args:
        sizes: the sizes of the rollout.
        batches: the numbers of the batches' first agents.

    Attributes:
        steps: how many agent steps were played.
        stats: the statistics of the episodes that ended.
    """

    def __init__(self, sizes: Sizes, batches: range):
        self._sizes = sizes
        self._row = {agent: agent for agent in batches}
        self._time = dict.fromkeys(batches, 0)
        self._free, self._full = sizes.agents, 0
        self._arrivals = Rows(sizes.segments, sizes.horizon)
        self._outputs: list[tuple[int, int, Outputs]] = []
        self._first_states: dict[int, RecurrentState | None] = {}
        self.steps = 0
        self.stats: Stats = defaultdict(list)

    @property
    def full(self) -> bool:
        """Whether every step of every segment has been played."""
        return self._full >= self._sizes.segments

    def begin(self, batch: HostBatch, state: RecurrentState | None) -> None:
        """Find room for a step of a batch; `state` is the one before it.

        Raises:
            RuntimeError: there is no room left.
        """
        agent, count = batch.agent, len(batch.reward)
        row = self._row[agent]
        if row + count > self._sizes.segments:
            raise RuntimeError(
                f"agents {agent} to {agent + count - 1} filled their segments before others "
                "began: the vecenv must hand out its batches in turn (sync_traj=True)"
            )
        if self._time[agent] == 0:
            self._first_states[row] = state

    def add(self, batch: HostBatch, arrival: Arrival, outputs: Outputs) -> None:
        """Keep a step of a batch."""
        agent, count = batch.agent, len(batch.reward)
        row, time = self._row[agent], self._time[agent]
        self._arrivals.write(row, time, arrival)
        self._outputs.append((row, time, outputs))
        for name, values in batch.stats.items():
            self.stats[name].extend(values)
        self.steps += count if arrival.mask is None else int(batch.mask.sum())
        self._time[agent] += 1
        if self._time[agent] == self._sizes.horizon:
            self._row[agent], self._time[agent] = self._free, 0
            self._free, self._full = self._free + count, self._full + count

    def arrivals(self) -> Arrival:
        """All arrivals, (segments, time, ...)."""
        return self._arrivals.tree()

    def outputs(self) -> Outputs:
        """All outputs, (segments, time, ...); waits for the device."""
        rows = Rows(self._sizes.segments, self._sizes.horizon)
        for step in self._outputs:
            rows.write(*step)
        return rows.tree()

    def first_states(self) -> list[RecurrentState | None]:
        """The states before the segments, in row order."""
        return [self._first_states[row] for row in sorted(self._first_states)]


class HostSource:
    """Experience from environments on the host; see `Source`.

    Args:
        config: what to store, and the seed.
        env: the environments, as `as_host_env` returns them.
        policy: a policy with the structure of those that will act.
        profile: counts the time of the phases "env", "forward" and "copy".
        mesh: the devices that act, each for its share of every batch; the environments are those of
            this process, others step their own. None: there is one device.

    Attributes:
        step: `HostStep`, compiled.

    Raises:
        ValueError: the sizes do not fit together, `bootstrap_last` does not fit the batches, or
            there is a `reset_ratio`.
    """

    pure = False

    def __init__(
        self,
        config: PuffeRLConfig,
        env: HostEnv,
        policy: nnx.Module,
        profile: Profile,
        mesh: Mesh | None = None,
    ):
        self._host = host = Host.of(mesh)
        agents, together = (n * host.processes for n in (env.num_agents, env.agents_per_batch))
        self.sizes = config.sizes(agents, together, host.share.count)
        self._own = self.sizes.divided(host.processes)
        self._config, self._env, self._profile = config, env, profile
        if config.bootstrap_last and env.agents_per_batch != env.num_agents:
            raise ValueError(
                "bootstrap_last needs all agents in one batch; the vecenv hands out "
                f"{env.agents_per_batch} of {env.num_agents}"
            )
        if config.reset_ratio is not None:
            raise ValueError(
                f"reset_ratio={config.reset_ratio} is for JAX-native environments; on the host, "
                "only those are reset whose episode ended"
            )
        self._masked = env.needs_mask or config.use_mask
        self._unplayed: set[int] = set()
        self._batches = range(0, self._own.agents, env.agents_per_batch)
        self._player = Player(config, policy, env.single_action_space)
        self._zero = place(host.mesh, self._player.initial_state(env.agents_per_batch), DIVIDED)
        steps = self._own.segments // env.agents_per_batch * self._own.horizon
        self._keys = jax.jit(lambda key: jax.random.key_data(random.split(key, steps)))
        step = HostStep(self._player, env.overlaps, host.share)
        takes = ALIKE, DIVIDED, DIVIDED, DIVIDED, ALIKE
        self.step = on_each(host.mesh, step, takes, DIVIDED)
        takes = DIVIDED, ALIKE, DIVIDED, DIVIDED
        self._value_where = on_each(host.mesh, self._values_where, takes, DIVIDED)
        self._finish = jax.jit(self._experience)
        self._playing, self._interruptions = False, 0

    def init(self, key: PRNGKeyArray) -> HostStream:
        """Start all episodes; the environments are seeded with `config.seed`."""
        return self._begin(self._config.seed)

    def _begin(self, seed: int) -> HostStream:
        # As if all processes' environments were in one vecenv.
        self._env.async_reset(seed + self._host.number * self._own.agents)
        return HostStream(dict.fromkeys(self._batches, self._zero), None)

    def collect(
        self, params: Params, stream: HostStream, key: PRNGKeyArray
    ) -> tuple[HostStream, Experience, tuple[int, Stats]]:
        """Play a batch.

        If the last call was interrupted (Ctrl-C), nobody knows how far the environments have come:
        then all episodes start anew, with other seeds.
        """
        if self._playing:
            self._interruptions += 1
            stream = self._begin(self._config.seed + 1_000_003 * self._interruptions)
        self._playing = True
        env, states, pending = self._env, dict(stream.states), stream.pending
        if not self._config.store_initial_state:
            states = dict.fromkeys(self._batches, self._zero)
        params, key = self._host.alike(params), here(self._host.mesh, key)
        keys = iter(np.asarray(self._keys(key)))
        recording = Recording(self._own, self._batches)
        lap = self._profile.laps()
        while not recording.full:
            batch = pending or env.recv()
            pending = None
            lap("env")
            state = states[batch.agent]
            recording.begin(batch, state)
            arrival = self._arrival(params, state, batch)
            obs, start = self._divided((arrival.obs, arrival.start))
            states[batch.agent], outputs, played = self.step(params, state, obs, start, next(keys))
            lap("forward")
            recording.add(batch, arrival, outputs)  # while the device is busy
            lap("copy")
            action = outputs.action if played is None else played
            if not env.overlaps:
                action = self._player.playable(np.asarray(action))
                lap("forward")
            env.send(action)
            lap("env")
        state = after = None
        if self._config.bootstrap_last:
            pending = env.recv()
            lap("env")
            state = states[0]
            after = self._arrival(params, state, pending)
        arrivals, outputs = recording.arrivals(), recording.outputs()
        played = arrivals._replace(obs=None), outputs, recording.first_states(), state, after
        experience = self._whole(params, arrivals.obs, played)
        lap("copy")
        self._playing = False
        return HostStream(states, pending), experience, (recording.steps, recording.stats)

    def summary(self, outcome: tuple[int, Stats]) -> tuple[int, Stats]:
        """The steps of all processes, and the statistics of this one."""
        steps, stats = outcome
        return self._host.total(steps), stats

    def advice(self) -> str:
        """Which agents' rows are learned from although they did not play."""
        if not self._unplayed:
            return ""
        first = ", ".join(map(str, sorted(self._unplayed)[:8]))
        return (
            f"; there were steps that agents did not play ({len(self._unplayed)} of "
            f"{self._own.agents}: {first}{', ...' if len(self._unplayed) > 8 else ''}), and "
            "use_mask=False learns from them, too: use_mask=True leaves them out"
        )

    def close(self) -> None:
        """Close the environments."""
        self._env.close()

    def _whole(
        self, params: Params, observations: PyTree, played: tuple[PyTree, ...]
    ) -> Experience:
        """The experience of a rollout on the devices; see `_experience`."""
        host = self._host
        if host.mesh is None:
            experience = self._finish(params, *played)
            # Nothing writes to them any more, so on CPUs they need not be copied.
            return experience._replace(observations=jax.device_put(observations))
        # All but the observations is little: one device puts it together.
        played = jax.tree.map(np.asarray, played)
        experience = self._finish(here(host.mesh, params), *played)
        return host.divide(experience._replace(observations=observations), self._own.agents)

    def _arrival(self, params: Params, state: RecurrentState | None, batch: HostBatch) -> Arrival:
        """The parts of a batch that the options ask for; `state` is the one before it."""
        config, final_value = self._config, None
        if not (self._masked or batch.mask.all()):
            self._unplayed.update((batch.agent + np.flatnonzero(~batch.mask)).tolist())
        if config.bootstrap_truncation and not self._env.shows_final:
            cut = batch.truncated & ~batch.terminated
            final_value = np.zeros(len(cut), np.float32)
            if batch.final_obs is not None and cut.any():
                cut, obs = self._divided((cut, batch.final_obs))
                final_value = self._value_where(cut, params, obs, state)
        return Arrival(
            batch.obs,
            batch.reward,
            batch.terminated,
            batch.truncated if config.bootstrap_truncation else None,
            batch.start if config.reset_on_done else None,
            batch.mask if self._masked else None,
            final_value,
        )

    def _divided(self, tree: PyTree) -> PyTree:
        """NumPy's rows among this process's devices; of one process alone the programs do that."""
        return tree if self._host.processes == 1 else place(self._host.mesh, tree, DIVIDED)

    def _values_where(
        self, cut: Array, params: Params, obs: PyTree, state: RecurrentState | None
    ) -> Array:
        return jnp.where(cut, self._player.value(params, obs, state), 0)

    def _with_final_value(self, arrival: Arrival, values: Array) -> Arrival:
        """The arrival with its `final_value`, where `obs` itself is the final observation."""
        if not (self._env.shows_final and self._config.bootstrap_truncation):
            return arrival
        cut = arrival.truncated & ~arrival.terminated
        return arrival._replace(final_value=jnp.where(cut, values, 0))

    def _experience(
        self,
        params: Params,
        arrivals: Arrival,
        outputs: Outputs,
        first_states: list[RecurrentState | None],
        state: RecurrentState | None,
        after: Arrival | None,
    ) -> Experience:
        """The experience of a rollout, except its observations.

        Args:
            params: the policy's parameters.
            arrivals: (segments, time, ...), without observations.
            outputs: (segments, time, ...).
            first_states: the states before the segments, in row order.
            state: the state after the last actions; None without `bootstrap_last`.
            after: the arrival after the last actions; None without `bootstrap_last`.
        """
        config, player = self._config, self._player
        action, scores = map(jnp.asarray, outputs)
        logprobs, values = scores[..., 0], scores[..., 1]
        arrivals = self._with_final_value(jax.tree.map(jnp.asarray, arrivals), values)
        experience = Experience(
            **stored(config, arrivals, self._masked),
            actions=action,
            logprobs=logprobs,
            values=values,
        )
        if config.store_initial_state:
            first = jax.tree.map(lambda *parts: jnp.concatenate(parts), *first_states)
            experience = experience._replace(state=first)
        if after is None:
            return experience
        values = player.value(params, after.obs, player.at_start(state, after.start))
        last = last_of(config, self._with_final_value(after, values), values)
        return with_following(experience, last, self._own.agents)
