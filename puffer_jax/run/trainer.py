"""PuffeRL: collect, learn, log and save, with PufferLib's names (`pufferlib.pufferl.PuffeRL`)."""

import dataclasses
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array

from puffer_jax.base.profile import Profile
from puffer_jax.environments.jax_native import as_jax_env
from puffer_jax.nn.params import merge, split
from puffer_jax.ppo import devices, optimizers
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.epoch import Loop
from puffer_jax.ppo.experience import Experience, Metrics, TrainState
from puffer_jax.ppo.host.envs import as_host_env
from puffer_jax.ppo.host.rollout import HostSource
from puffer_jax.ppo.host.stats import numbers_of
from puffer_jax.ppo.jax_rollout import JaxSource
from puffer_jax.ppo.rollout import check_fits
from puffer_jax.ppo.source import Source, Stats
from puffer_jax.run import processes
from puffer_jax.run.dashboard import Dashboard, Snapshot
from puffer_jax.run.fingerprint import fingerprint
from puffer_jax.run.loggers import Logger, NoLogger
from puffer_jax.run.run import Run
from puffer_jax.run.signals import StopRequest

# The eye sees no more.
_PICTURE_SECONDS = 0.25

# What is logged, by name.
Numbers = dict[str, float | int]


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a parameter was not finite, and `on_nonfinite` is "stop"."""


@jax.jit  # by itself each of a dozen operations would be compiled
def _annealed(rate: ArrayLike, epochs: ArrayLike, floor: ArrayLike, epoch: ArrayLike) -> Array:
    return optimizers.cosine_schedule(rate, epochs, floor)(epoch)


class PuffeRL:
    """Trains a policy in an environment; the interface of `pufferlib.pufferl.PuffeRL`.

        trainer = PuffeRL(config, vecenv, policy)
        while trainer.global_step < config.total_timesteps:
            trainer.evaluate()
            trainer.train()
        trainer.close()

    `run()` is that loop; with a JAX-native environment it compiles a rollout and its update into
    one program. Ctrl-C and SIGTERM then end it after the running epoch, with a checkpoint.

    Args:
        config: a `PuffeRLConfig`, or a PufferLib `args["train"]` dict.
        vecenv: a PufferLib vecenv, a `gymnasium.vector.VectorEnv`, or a JAX-native environment
            (see `puffer_jax.as_jax_env`), which is run in `config.num_envs` copies.
        policy: its parameters are copied; `trainer.policy` has the trained ones.
        logger: see `puffer_jax.loggers`; its `run_id` names the run's folder.
        mesh: the devices to train on, see `puffer_jax.mesh`; None: JAX's default one. Where there
            are several processes (`puffer_jax.distributed`), all of theirs: each process makes the
            same trainer and the same calls, checkpoints are written by all of them to one
            `data_dir`, and everything else by process 0, whose logger counts.

    Attributes:
        config: the `PuffeRLConfig`.
        vecenv: the environments.
        logger: where the numbers go; it may be replaced.
        loop: does the work of an epoch, and holds the train state.
        epoch: number of batches learned from so far.
        global_step: agent steps so far.
        stats: name -> values, for the episodes since the last log.
        losses: name -> value, for the last update that was logged.
        experience: what `evaluate` collected last, until `train` has learned from it.
        sizes: see `puffer_jax.config.Sizes`; three are also attributes under the reference's names,
            total_agents, segments and total_epochs.
        profile: wall time by phase.
        dashboard: what `print_dashboard` draws.
        message: the last thing that happened, for the dashboard.
        log_seconds: least time between two logs; 0: each epoch is logged.
        last_log_time: when the last log was written, as `time.time` gives it.

    Raises:
        ValueError: the sizes do not fit together, or the policy does not fit the config.
        TypeError: the environment is of an unknown kind.
        ProcessLostError: another process failed, or is gone; any method that needs it may say so.

    Example:
        >>> import puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> config = puffer_jax.PuffeRLConfig.recommended(
        ...     num_envs=4, bptt_horizon=8, total_timesteps=64, data_dir="runs"
        ... )
        >>> policy = puffer_jax.Default(env, rngs=nnx.Rngs(0))
        >>> trainer = puffer_jax.PuffeRL(config, env, policy)
        >>> while not trainer.done:
        ...     _ = trainer.evaluate()
        ...     _ = trainer.train()
        >>> trainer.global_step
        64
    """

    def __init__(
        self,
        config: PuffeRLConfig | Mapping[str, Any],
        vecenv: Any,
        policy: nnx.Module,
        logger: Logger | None = None,
        mesh: Mesh | None = None,
    ):
        self.config = config = PuffeRLConfig.from_dict(config)
        self.vecenv = vecenv
        self.profile = Profile()
        self.dashboard = Dashboard()
        self._graphdef, _ = split(policy)
        mesh = None if mesh is None else devices.checked(mesh)
        processes.check_mesh(mesh)
        with processes.together():
            host = as_host_env(vecenv)
            if processes.count() > 1:
                spaces = as_jax_env(vecenv) if host is None else vecenv
                processes.check_same(fingerprint(config, spaces, policy, mesh))
            check_fits(config, policy)
            logger = NoLogger() if logger is None else logger
            self._run = Run(config.data_dir, logger, config.checkpoint_keep)
            if host is None:
                share = devices.share_of(mesh)
                source: Source = JaxSource(config, as_jax_env(vecenv), policy, share)
            else:
                source = HostSource(config, host, policy, self.profile, mesh)
            self.loop = Loop(config, source, policy, self.profile, mesh)
        self.sizes = sizes = source.sizes
        self.total_agents, self.segments = sizes.agents, sizes.segments
        self.total_epochs = sizes.epochs

        self.experience: Experience | None = None
        self.global_step = self._learned_step = 0
        self._nonfinite = 0
        self.stats: Stats = defaultdict(list)
        self.losses: dict[str, float] = {}
        self.message = ""
        self.log_seconds = 0.25
        self._last_picture = -math.inf
        self.last_log_time = self._start_time = time.time()
        self._last_log_step = 0
        self._last_sps = 0.0
        self._last_means: dict[str, float] = {}
        self._new_losses: Metrics = {}
        self._closed = False
        self._final_path: Path | None = None

    # --- what a user reads ------------------------------------------------------------------

    @property
    def state(self) -> TrainState:
        """What updates change."""
        return self.loop.state

    @state.setter
    def state(self, state: TrainState) -> None:
        self.loop.state = state

    @property
    def logger(self) -> Logger:
        """Where the numbers go; it may be replaced."""
        return self._run.logger

    @logger.setter
    def logger(self, logger: Logger) -> None:
        self._run.logger = logger

    @property
    def epoch(self) -> int:
        """Number of batches learned from so far."""
        return int(self.state.epoch)

    @property
    def policy(self) -> Any:
        """The policy with its current parameters; it takes observations as they come."""
        params = devices.here(self.loop.mesh, self.loop.acting())
        return merge(self._graphdef, jax.tree.map(jnp.copy, params))

    @property
    def uptime(self) -> float:
        """Seconds since the trainer was built."""
        return time.time() - self._start_time

    @property
    def sps(self) -> float:
        """Agent steps per second since the last log."""
        seconds = time.time() - self.last_log_time
        return (self.global_step - self._last_log_step) / max(seconds, 1e-9)

    @property
    def run_folder(self) -> Path:
        """Folder of this run's checkpoints."""
        return self._run.folder

    @property
    def done(self) -> bool:
        """Whether `total_timesteps` have been reached."""
        return self.global_step >= self.config.total_timesteps

    # --- the loop ---------------------------------------------------------------------------

    @processes.together()
    def evaluate(self) -> Stats:
        """Collect one batch of experience; returns `stats`."""
        self.experience, steps, stats = self.loop.evaluate()
        self._count(steps, stats)
        return self.stats

    @processes.together()
    def train(self) -> Numbers | None:
        """Learn from the collected batch.

        Returns:
            What was logged, if it was time to: at most every quarter of a second, as in the
            reference.

        Raises:
            RuntimeError: nothing has been collected.
            NonFiniteError: see `PuffeRLConfig.on_nonfinite`; a checkpoint has been saved.
        """
        if self.experience is None:
            raise RuntimeError(
                "call evaluate() before train(): there is no experience to learn from"
            )
        losses = self.loop.train(self.experience)
        self.experience = None
        return self._after_update(losses)

    @processes.together()
    def run_epoch(self, apart: bool = False) -> Numbers | None:
        """`evaluate` and `train`; with a JAX-native environment in one program, unless `apart`."""
        losses, steps, stats = self.loop.advance(apart)
        self._count(steps, stats)
        return self._after_update(losses)

    @processes.together()
    def run(
        self, after_epoch: Callable[["PuffeRL"], object] | None = None, *, apart: bool = False
    ) -> Numbers:
        """Train until `total_timesteps`, or until Ctrl-C or SIGTERM, and close.

        Args:
            after_epoch: called with the trainer after each epoch; see
                `puffer_jax.run.evaluation.Evaluation`.
            apart: with a JAX-native environment, whether rollout and update are two programs, so
                that `profile` knows the time of each. Sums may then be rounded in another order.

        Returns:
            The last logs.

        Raises:
            RuntimeError: another process writes to the run's folder.
        """
        self._run.claim()
        logs: Numbers | None = None
        for reason in filter(None, (self.sizes.hopeless, self.sizes.coarser)):
            warnings.warn(reason, stacklevel=3)  # `together` is between
        with StopRequest(self._announce_stop) as stop, self.dashboard, self:
            self._say("compiling ...")
            first, start = self.epoch + 1, time.monotonic()
            while not (self.done or any(processes.exchange(stop.made))):
                logs = self.run_epoch(apart) or logs
                if self.epoch == first:
                    self._say(f"compiled and ran an epoch in {time.monotonic() - start:.1f} s")
                if after_epoch is not None:
                    after_epoch(self)
            logs = logs if logs and logs["agent_steps"] == self.global_step else self.mean_and_log()
            self.print_dashboard()
        return logs

    def _announce_stop(self) -> None:
        self.message = "stopping after this epoch"

    def _say(self, message: str) -> None:
        self.message = message
        self.print_dashboard()
        if processes.index() == 0:
            self.dashboard.say(message)

    def _count(self, steps: int, stats: Stats) -> None:
        self.global_step += steps
        everywhere = [stats]
        if processes.count() > 1 and not self.loop.source.pure:
            everywhere = processes.exchange(numbers_of(stats))
        for some in everywhere:
            for name, values in some.items():
                self.stats[name].extend(values)

    def _after_update(self, losses: Metrics) -> Numbers | None:
        self._new_losses, self._learned_step = losses, self.global_step
        known, self._nonfinite = self._nonfinite, int(self.state.nonfinite)
        if self.config.on_nonfinite == "stop" and self._nonfinite > known:
            path = self.save_checkpoint()
            raise NonFiniteError(
                f"epoch {self.epoch}: the first array with a NaN or an infinity is "
                f"{self.loop.names[int(self.state.culprit)]!r}. No such update was applied; "
                f"the last good parameters are in {path}. on_nonfinite='skip' trains on"
                + self.loop.source.advice()
            )
        logs = None
        if self.done or time.time() > self.last_log_time + self.log_seconds:
            logs = self.mean_and_log()
            if self.done or time.monotonic() > self._last_picture + _PICTURE_SECONDS:
                self.print_dashboard()
        if self.epoch % self.config.checkpoint_interval == 0:
            self.save_checkpoint()
        return logs

    # --- logs and checkpoints ---------------------------------------------------------------

    def mean_and_log(self) -> Numbers:
        """Log the means of `stats` and the losses, and start new means; returns the logs."""
        self.losses = {name: float(value) for name, value in self._new_losses.items()}
        means = {name: sum(x) / len(x) for name, x in numbers_of(self.stats).items() if x}
        rate = self.config.learning_rate
        if self.config.anneal_lr:
            epoch = self.loop.schedule_epoch(devices.here(self.loop.mesh, self.state))
            rate = float(_annealed(rate, self.total_epochs, self.config.min_lr_ratio, epoch))
        logs = {
            "SPS": self.sps,
            "agent_steps": self.global_step,
            "uptime": self.uptime,
            "epoch": self.epoch,
            "learning_rate": rate,
            **{f"environment/{name}": value for name, value in means.items()},
            **{f"losses/{name}": value for name, value in self.losses.items()},
            **{f"performance/{name}": value for name, value in self.profile.seconds().items()},
        }
        self._run.log(logs, self.global_step)
        self._last_means = means or self._last_means
        self._last_sps = logs["SPS"]
        self.stats = defaultdict(list)
        self.last_log_time, self._last_log_step = time.time(), self.global_step
        return logs

    def print_dashboard(self) -> None:
        """Draw the dashboard, if standard output is a terminal; of several processes the first."""
        if processes.index() > 0:
            return
        self._last_picture = time.monotonic()
        self.dashboard.update(
            Snapshot(
                env=self.config.env,
                params=sum(x.size for x in jax.tree.leaves(self.state.params)),
                steps=self.global_step,
                total_steps=self.config.total_timesteps,
                sps=self._last_sps,
                epoch=self.epoch,
                uptime=self.uptime,
                phases=self.profile.seconds(),
                losses=self.losses,
                stats=self._last_means,
                message=self.message,
            )
        )

    @processes.together()
    def save_checkpoint(self) -> Path:
        """Write `model_{epoch:06d}.pt` and the full train state; returns the model's path.

        It is the state after the last update: what has been collected since then is played again.
        """
        metadata = {
            "config": dataclasses.asdict(self.config),
            "global_step": self._learned_step,
            "epoch": self.epoch,
        }
        path = self._run.save(self.epoch, self.policy, self.loop.saved(), metadata)
        self.message = f"saved {path}"
        return path

    @processes.together()
    def restore(self, run: str | Path | None = None, epoch: int | None = None) -> None:
        """Resume from a checkpoint of this run or another, the latest or that of `epoch`.

        With a JAX-native environment the run continues bit for bit as if it had not stopped. Host
        environments start new episodes.

        Raises:
            FileNotFoundError: there is no complete checkpoint.
            ValueError: the checkpoint is of another policy, optimizer or environment.
        """
        saved, metadata, folder = self._run.restore(self.loop.saved(), run, epoch)
        self.loop.restore(saved)
        self.global_step = self._last_log_step = int(metadata["global_step"])
        self._learned_step, self._nonfinite = self.global_step, int(self.state.nonfinite)
        self.experience = None
        self.message = f"resumed from {folder} at epoch {self.epoch}"
        planned, now = metadata["config"]["total_timesteps"], self.config.total_timesteps
        if planned != now:
            self.message += (
                f"; total_timesteps was {planned:,} and is {now:,}, so the schedules go on from "
                f"{min(1.0, self.global_step / now):.0%} of the way"
            )

    def close(self) -> Path:
        """Save, close the environments and the logger; returns the path of the final model.

        As in the reference, the model is also copied to `data_dir/run_id.pt`. If it cannot be
        saved, all else is closed all the same, and another `close` tries again.
        """
        if self._final_path is not None:
            return self._final_path
        model = None
        with ExitStack() as last:
            if not self._closed:
                last.callback(self.dashboard.close)
                last.callback(lambda: self._run.close(model))
                last.callback(self.loop.source.close)
                self._closed = True
            model = self.save_checkpoint()
            self._final_path = self._run.publish(model)
        return self._final_path

    def __enter__(self) -> "PuffeRL":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or processes.count() == 1:
            self.close()
            return
        processes.fail(error)
        with suppress(processes.ProcessLostError):  # one alone saves nothing
            self.close()
