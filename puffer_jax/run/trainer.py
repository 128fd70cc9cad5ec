"""PuffeRL: collect, learn, log and save, with PufferLib's names (`pufferlib.pufferl.PuffeRL`)."""

import dataclasses
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base.profile import Profile
from puffer_jax.environments.jax_native import as_jax_env
from puffer_jax.nn.params import merge, split
from puffer_jax.ppo import optimizers
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.experience import Experience, TrainState
from puffer_jax.ppo.host_envs import as_host_env
from puffer_jax.ppo.host_rollout import _HostSource
from puffer_jax.ppo.jax_rollout import _JaxSource
from puffer_jax.ppo.rollout import _owned
from puffer_jax.ppo.training import _check_policy
from puffer_jax.ppo.update import make_learner
from puffer_jax.run import checkpoint
from puffer_jax.run.dashboard import Dashboard, Snapshot
from puffer_jax.run.loggers import Logger, NoLogger

_LOG_SECONDS = 0.25


class NonFiniteError(ArithmeticError):
    """A loss or a gradient was NaN or infinite, and `on_nonfinite` is "stop"."""


class PuffeRL:
    """Trains a policy in an environment; the interface of `pufferlib.pufferl.PuffeRL`.

        trainer = PuffeRL(config, vecenv, policy)
        while trainer.global_step < config.total_timesteps:
            trainer.evaluate()
            trainer.train()
        trainer.close()

    `run()` is that loop; with a JAX-native environment it compiles a rollout and its update to
    one program. Ctrl-C and SIGTERM then end it after the running epoch, with a checkpoint.

    Args:
        config: a `PuffeRLConfig`, or a PufferLib `args["train"]` dict.
        vecenv: a PufferLib vecenv, a `gymnasium.vector.VectorEnv`, or a JAX-native environment
            (see `puffer_jax.as_jax_env`), of which `config.num_envs` are run.
        policy: its parameters are copied; `trainer.policy` has the trained ones.
        logger: see `puffer_jax.loggers`; its `run_id` names the run's folder.

    Attributes:
        config: the `PuffeRLConfig`.
        epoch: updates of a whole batch so far.
        global_step: agent steps so far.
        stats: name -> values, of the episodes since the last log.
        losses: name -> value, of the last logged update.
        experience: what `evaluate` collected last.
        total_agents, segments, total_epochs: sizes.

    Raises:
        ValueError: sizes that do not fit together, or a policy that does not fit the config.
        TypeError: an environment of no known kind.

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
    ):
        self.config = config = PuffeRLConfig.from_dict(config)
        self.vecenv = vecenv
        self.logger = NoLogger() if logger is None else logger
        self._graphdef, params = split(policy)
        _check_policy(config, policy)

        host = as_host_env(vecenv)
        if host is None:
            self._source: _JaxSource | _HostSource = _JaxSource(config, as_jax_env(vecenv), policy)
        else:
            self._source = _HostSource(config, host, policy)
        self.sizes = sizes = self._source.sizes
        self.total_agents, self.segments = sizes.agents, sizes.segments
        self.total_epochs = sizes.epochs

        self._learner = make_learner(config, sizes, policy)
        self.state: TrainState = _owned(self._learner.init(params))
        self._key, reset_key = jax.random.split(jax.random.key(config.seed))
        self._source.reset(self.state.params, reset_key)
        self._update = jax.jit(self._updated, donate_argnums=0)
        self._fused: Callable[..., Any] | None = None

        self.experience: Experience | None = None
        self.global_step = 0
        self.stats: dict[str, list[Any]] = defaultdict(list)
        self.losses: dict[str, float] = {}
        self.message = ""
        self.profile = Profile()
        self.dashboard = Dashboard()
        self._last_stats: dict[str, float] = {}
        self._new_losses: dict[str, Array] = {}
        self._stop = False
        self._start_time = self._last_log_time = time.time()
        self._last_log_step = 0
        self._closed = False

    # --- what a user reads ------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Updates of a whole batch so far."""
        return int(self.state.epoch)

    @property
    def policy(self) -> Any:
        """The policy with its present parameters."""
        return merge(self._graphdef, jax.tree.map(jnp.copy, self.state.params))

    @property
    def uptime(self) -> float:
        """Seconds since the trainer was built."""
        return time.time() - self._start_time

    @property
    def sps(self) -> float:
        """Agent steps per second since the last log."""
        seconds = time.time() - self._last_log_time
        return (self.global_step - self._last_log_step) / max(seconds, 1e-9)

    @property
    def run_folder(self) -> Path:
        """Folder of this run's checkpoints."""
        return Path(self.config.data_dir) / self.logger.run_id

    @property
    def done(self) -> bool:
        """Whether `total_timesteps` are reached."""
        return self.global_step >= self.config.total_timesteps

    # --- the loop ---------------------------------------------------------------------------

    def evaluate(self) -> dict[str, list[Any]]:
        """Collect one batch of experience; returns `stats`."""
        self._key, key = jax.random.split(self._key)
        with self.profile("evaluate"):
            self.experience, steps, stats = self._source.collect(
                self.state.params, key, self.profile
            )
        self._count(steps, stats)
        return self.stats

    def train(self) -> dict[str, Any] | None:
        """Learn from the collected batch.

        Returns:
            What was logged, if it was time to: at most every quarter of a second, as in the
            reference.

        Raises:
            RuntimeError: nothing was collected.
            NonFiniteError: see `PuffeRLConfig.on_nonfinite`; a checkpoint has been saved.
        """
        if self.experience is None:
            raise RuntimeError(
                "call evaluate() before train(): there is no experience to learn from"
            )
        self._key, key = jax.random.split(self._key)
        with self.profile("train"):
            self.state, losses = self._update(self.state, self.experience, key)
            jax.block_until_ready(losses)
        self.experience = None
        return self._after_update(losses)

    def run(self) -> dict[str, Any]:
        """Train until `total_timesteps`, or until Ctrl-C or SIGTERM, and close.

        Returns:
            The last logs.
        """
        logs: dict[str, Any] | None = None
        with self._signals(), self.dashboard, self:
            while not (self.done or self._stop):
                if isinstance(self._source, _JaxSource):
                    logs = self._fused_epoch(self._source) or logs
                else:
                    self.evaluate()
                    logs = self.train() or logs
            logs = logs if logs and logs["agent_steps"] == self.global_step else self.mean_and_log()
            self.print_dashboard()
        return logs

    def _updated(self, state: TrainState, experience: Experience, key: PRNGKeyArray) -> Any:
        state, losses, _ = self._learner.update(state, experience, key)
        return state, losses

    def _fused_epoch(self, source: "_JaxSource") -> dict[str, Any] | None:
        if self._fused is None:

            def epoch(state: TrainState, stream: Any, keys: tuple[Any, Any]) -> Any:
                stream, experience, episodes = source.collector.collect(
                    state.params, stream, keys[0]
                )
                return *self._updated(state, experience, keys[1]), stream, episodes

            self._fused = jax.jit(epoch, donate_argnums=(0, 1))
        self._key, collect_key = jax.random.split(self._key)
        self._key, update_key = jax.random.split(self._key)
        with self.profile("train"):
            self.state, losses, source.stream, episodes = self._fused(
                self.state, source.stream, (collect_key, update_key)
            )
            jax.block_until_ready(losses)
        self._count(self.sizes.batch, source.stats(episodes))
        return self._after_update(losses)

    def _count(self, steps: int, stats: Mapping[str, list[Any]]) -> None:
        self.global_step += steps
        for name, values in stats.items():
            self.stats[name].extend(values)

    def _after_update(self, losses: dict[str, Array]) -> dict[str, Any] | None:
        self._new_losses = losses
        if self.config.on_nonfinite == "stop" and int(self.state.nonfinite):
            path = self.save_checkpoint()
            raise NonFiniteError(
                f"epoch {self.epoch}: the first array with a NaN or an infinity is "
                f"{self._learner.names[int(self.state.culprit)]!r}. No such update was applied; "
                f"the last good parameters are in {path}. on_nonfinite='skip' trains on"
            )
        logs = None
        if self.done or time.time() > self._last_log_time + _LOG_SECONDS:
            logs = self.mean_and_log()
            self.print_dashboard()
        if self.epoch % self.config.checkpoint_interval == 0:
            self.save_checkpoint()
        return logs

    # --- logs and checkpoints ---------------------------------------------------------------

    def mean_and_log(self) -> dict[str, Any]:
        """Log the means of `stats` and the losses, and start new means; returns the logs."""
        self.losses = {name: float(value) for name, value in self._new_losses.items()}
        means = {}
        for name, values in self.stats.items():
            numbers = [float(v) for v in values if isinstance(v, int | float | np.number)]
            if numbers:
                means[name] = sum(numbers) / len(numbers)
        rate = self.config.learning_rate
        if self.config.anneal_lr:
            rate = float(optimizers.cosine_schedule(rate, self.total_epochs)(self.epoch))
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
        self.logger.log(logs, self.global_step)
        self._last_stats = means or self._last_stats
        self._last_sps = logs["SPS"]
        self.stats = defaultdict(list)
        self._last_log_time, self._last_log_step = time.time(), self.global_step
        return logs

    def print_dashboard(self) -> None:
        """Draw the dashboard, if standard output is a terminal."""
        self.dashboard.update(
            Snapshot(
                env=self.config.env,
                params=sum(x.size for x in jax.tree.leaves(self.state.params)),
                steps=self.global_step,
                total_steps=self.config.total_timesteps,
                sps=getattr(self, "_last_sps", 0.0),
                epoch=self.epoch,
                uptime=self.uptime,
                phases=self.profile.seconds(),
                losses=self.losses,
                stats=self._last_stats,
                message=self.message,
            )
        )

    def save_checkpoint(self) -> Path:
        """Write `model_{epoch:06d}.pt` and the full train state; returns the model's path."""
        metadata = {
            "config": dataclasses.asdict(self.config),
            "global_step": self.global_step,
            "epoch": self.epoch,
        }
        path = checkpoint.save(
            self.run_folder,
            self.epoch,
            self.policy,
            self._saved(),
            metadata,
            keep=self.config.checkpoint_keep,
        )
        self.message = f"saved {path}"
        return path

    def restore(self, run: str | Path | None = None, epoch: int | None = None) -> None:
        """Go on from a checkpoint: of this run or another, the latest or that of `epoch`.

        With a JAX-native environment the run goes on bit for bit as if it had not stopped. Host
        environments start new episodes.

        Raises:
            FileNotFoundError: there is no complete checkpoint.
            ValueError: it is of another policy, optimizer or environment.
        """
        folder = self.run_folder if run is None else Path(run)
        saved, metadata = checkpoint.restore(folder, self._saved(), epoch)
        saved = _owned(saved)
        self.state, self._key = saved["train"], saved["key"]
        if isinstance(self._source, _JaxSource):
            self._source.stream = saved["stream"]
        self.global_step = self._last_log_step = int(metadata["global_step"])
        self.experience = None
        self.message = f"resumed from {folder} at epoch {self.epoch}"

    def _saved(self) -> dict[str, Any]:
        saved = {"train": self.state, "key": self._key}
        if isinstance(self._source, _JaxSource):
            saved["stream"] = self._source.stream
        return saved

    def close(self) -> Path:
        """Save, close the environments and the logger; returns the path of the final model.

        As in the reference, the model is also copied to `data_dir/run_id.pt`.
        """
        if self._closed:
            return self._final_path
        self._closed = True
        self._source.close()
        model = self.save_checkpoint()
        self._final_path = self.run_folder.with_name(self.run_folder.name + model.suffix)
        shutil.copyfile(model, self._final_path)
        self.logger.close(model)
        self.dashboard.close()
        return self._final_path

    def __enter__(self) -> "PuffeRL":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the loop after the epoch; a second one ends it at once."""

        def stop(number: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            self.message = "stopping after this epoch"

        old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                old[number] = signal.signal(number, stop)
        except ValueError:  # not in the main thread: the signals are not ours
            pass
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
