"""An epoch: a batch of experience, and the update that learns from it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from puffer_jax.base.profile import Profile
from puffer_jax.nn.params import split
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.devices import ALIKE, DIVIDED, on_each, place, share_of
from puffer_jax.ppo.experience import Experience, Hypers, Metrics, Params, TrainState
from puffer_jax.ppo.source import Source, Stats
from puffer_jax.ppo.update import Learner, make_learner


def epoch(
    collect: Callable[..., tuple[PyTree, Experience, PyTree]],
    update: Callable[..., tuple[Any, ...]],
    acting: Callable[[TrainState], Params],
    state: TrainState,
    stream: PyTree,
    keys: tuple[PRNGKeyArray, PRNGKeyArray],
    hypers: Hypers | None = None,
) -> tuple[TrainState, PyTree, Metrics, PyTree]:
    """Collect a batch and learn from it; pure if the three functions are.

    Args:
        collect: see `Source.collect`.
        update: see `Learner.update`.
        acting: see `Learner.acting`.
        state: the train state before the epoch.
        stream: the source's stream before the epoch.
        keys: one for each half.
        hypers: see `Learner.update`.

    Returns:
        The new state and stream, the losses, and the outcome of the batch.
    """
    stream, experience, outcome = collect(acting(state), stream, keys[0])
    state, losses, *_ = update(state, experience, keys[1], hypers)
    return state, stream, losses, outcome


def specs_of(state: TrainState) -> PyTree:
    """How a train state lies on many devices: all alike, but for what belongs to an agent."""
    specs = jax.tree.map(lambda _: ALIKE, state)
    known = specs.normalization
    if known is None or known.discounted is None:
        return specs
    return specs._replace(normalization=known._replace(discounted=DIVIDED))


def compiled(
    source: Source, learner: Learner, specs: PyTree, mesh: Mesh | None = None
) -> dict[str, Callable[..., Any]]:
    """The programs of a training, for all devices of the mesh, compiled when they are called.

    Args:
        source: where experience comes from.
        learner: what learns from it; made, as the source, for one device of the mesh.
        specs: see `specs_of`.
        mesh: the devices among which the work is divided; None: there is one.

    Returns:
        "update" and "acting"; of a pure source also "init", "collect" and "epoch".
    """

    def update(*args: Any) -> tuple[TrainState, Metrics]:
        return learner.update(*args)[:2]

    on = partial(on_each, mesh)
    programs = {
        "update": on(update, (specs, DIVIDED, ALIKE, ALIKE), (specs, ALIKE)),
        "acting": on(learner.acting, (specs,), ALIKE),
    }
    if source.pure:
        whole = partial(epoch, source.collect, learner.update, learner.acting)
        programs |= {
            "init": on(source.init, (ALIKE,), DIVIDED),
            "collect": on(source.collect, (ALIKE, DIVIDED, ALIKE), (DIVIDED, DIVIDED, ALIKE)),
            "epoch": on(whole, (specs, DIVIDED, ALIKE), (specs, DIVIDED, ALIKE, ALIKE)),
        }
    return programs


class Loop:
    """Training, an epoch at a time: its state, and the programs that advance it.

    Everything that training needs compiled is compiled here, except a policy's step on the host.
    No program is given its arguments' memory: whatever interrupts or fails an epoch, what the last
    finished one left is whole, and `saved` returns that.

    Args:
        config: the options of the update, and the seed.
        source: where experience comes from.
        policy: its parameters are copied.
        profile: counts the time of the phases "evaluate" and "train", or of "epoch" where both are
            one program; the first pass of each program counts as "compile", which most of it is.
        mesh: the devices among which the work is divided; None: there is one. A pure source must
            have been made for one device of these.

    Attributes:
        source: where experience comes from.
        state: the train state after the last update.
        stream: the source's stream at that time, see `Source`.
        key: the key at that time; split for every batch and every update.
        names: see `Learner`.
        schedule_epoch: see `Learner`.
        programs: see `compiled`.
        mesh: the devices, or None.
    """

    def __init__(
        self,
        config: PuffeRLConfig,
        source: Source,
        policy: nnx.Module,
        profile: Profile,
        mesh: Mesh | None = None,
    ):
        learner = make_learner(config, source.sizes, policy, share_of(mesh))
        self.source, self.names, self._profile = source, learner.names, profile
        self.schedule_epoch, self.mesh = learner.schedule_epoch, mesh
        # Whoever holds the policy may give its arrays away.
        state: TrainState = jax.tree.map(jnp.copy, learner.init(split(policy)[1]))
        specs = specs_of(state)
        self.state = place(mesh, state, specs)
        self.key, reset_key = place(mesh, jax.random.split(jax.random.key(config.seed)), ALIKE)
        self.programs = compiled(source, learner, specs, mesh)
        self.stream = self.programs.get("init", source.init)(reset_key)
        # The stream and the key after what has been collected since the last update.
        self._ahead: tuple[PyTree, PRNGKeyArray] | None = None
        self._passed: set[str] = set()

    def evaluate(self) -> tuple[Experience, int, Stats]:
        """Collect a batch; returns it, the agent steps that were played, and statistics."""
        stream, key = self._latest()
        key, collect_key = jax.random.split(key)
        stream, experience, outcome = self._collect(self.acting(), stream, collect_key)
        self._ahead = stream, key
        return experience, *self.source.summary(outcome)

    def train(self, experience: Experience) -> Metrics:
        """Learn from a batch; returns the losses."""
        stream, key = self._latest()
        key, update_key = jax.random.split(key)
        state, losses = self._update(self.state, experience, update_key, None)
        self._finish(state, stream, key)
        return losses

    def advance(self, apart: bool = False) -> tuple[Metrics, int, Stats]:
        """`evaluate` and `train`; in one program if the source is pure, unless `apart`."""
        stream, key = self._latest()
        key, collect_key = jax.random.split(key)
        key, update_key = jax.random.split(key)
        before = self.state, stream, (collect_key, update_key)
        if self.source.pure and not apart:
            with self._phase("epoch"):
                done = jax.block_until_ready(self.programs["epoch"](*before))
        else:
            done = epoch(self._collect, self._update, self.acting, *before)
        state, stream, losses, outcome = done
        self._finish(state, stream, key)
        return losses, *self.source.summary(outcome)

    def acting(self, state: TrainState | None = None) -> Params:
        """The parameters to act with, see `Learner.acting`; without a state, the current ones."""
        state = self.state if state is None else state
        if state.normalization is None:
            return state.params
        return self.programs["acting"](state)

    def saved(self) -> dict[str, PyTree]:
        """What a checkpoint holds, including the stream if the source is pure."""
        saved = {"train": self.state, "key": self.key}
        return saved | {"stream": self.stream} if self.source.pure else saved

    def restore(self, saved: dict[str, PyTree]) -> None:
        """Go on from what `saved` returned."""
        stream, _ = self._latest()  # environments on the host go on from where they are
        self._finish(saved["train"], saved["stream"] if self.source.pure else stream, saved["key"])

    def _latest(self) -> tuple[PyTree, PRNGKeyArray]:
        return self._ahead or (self.stream, self.key)

    def _finish(self, state: TrainState, stream: PyTree, key: PRNGKeyArray) -> None:
        self.state, self.stream, self.key, self._ahead = state, stream, key, None

    def _collect(self, *args: Any) -> tuple[PyTree, Experience, PyTree]:
        collect = self.programs.get("collect", self.source.collect)
        # A rollout on the host has phases of its own, one of which is the policy's compiled step.
        with self._phase("evaluate") if self.source.pure else self._profile("evaluate"):
            stream, experience, outcome = collect(*args)
            return stream, experience, jax.block_until_ready(outcome)

    def _update(self, *args: Any) -> tuple[TrainState, Metrics]:
        with self._phase("train"):
            return jax.block_until_ready(self.programs["update"](*args))

    def _phase(self, name: str) -> AbstractContextManager[None]:
        first = name not in self._passed
        self._passed.add(name)
        return self._profile("compile" if first else name)
