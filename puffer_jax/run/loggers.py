"""Where the numbers of a run go: nowhere, a file, TensorBoard, Weights & Biases, or several.

A logger is anything with the three members of `Logger`; none of the classes here is required. The
trainer keeps the checkpoints of a run in the folder `data_dir/run_id`.
"""

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from puffer_jax.base.packages import require

PathLike = str | os.PathLike[str]

# Numbers by name: Python's, NumPy's or JAX's.
Logs = Mapping[str, Any]


@runtime_checkable
class Logger(Protocol):
    """What the trainer needs of a logger.

    An error in `log` ends the training, so that lost numbers are noticed at once.

    Attributes:
        run_id: the run's name, fit for a folder.
    """

    run_id: str

    def log(self, logs: Logs, step: int) -> None:
        """Record `logs`, numbers by name, at agent step `step`."""
        ...

    def close(self, model_path: PathLike | None) -> None:
        """Finish the run; `model_path` is the final model, if there is one."""
        ...


def new_run_id() -> str:
    """A new name for a run, such as 20261121-074301-123-9f0c2a.

    UTC time, so that names sort by age, and random digits, so that runs started together differ.
    """
    now = datetime.now(UTC)
    return f"{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}-{secrets.token_hex(3)}"


def _folder_name(folder: Path, run_id: str | None) -> str:
    """The name of a run whose log is in `folder`."""
    return run_id or folder.resolve().name or new_run_id()


class NoLogger:
    """Records nothing, but gives the run a name.

    Args:
        run_id: the run's name; a new one by default.

    Example:
        >>> import puffer_jax
        >>> puffer_jax.NoLogger("cartpole_seed0").run_id
        'cartpole_seed0'
    """

    def __init__(self, run_id: str | None = None):
        self.run_id = run_id or new_run_id()

    def log(self, logs: Logs, step: int) -> None:
        """Do nothing."""

    def close(self, model_path: PathLike | None) -> None:
        """Do nothing."""


class JSONLLogger:
    """Appends one strict JSON object per line: {"step": ..., "agent_steps": ..., ...}.

    Every line is handed to the operating system at once, so killing the process loses none; half a
    line left by a killed predecessor is removed. NaN and infinity become null.

    Args:
        path: the file; its folder is created. `puffer_jax.plot` reads `data_dir/run_id/log.jsonl`.
        run_id: the run's name; by default, the name of the file's folder.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import puffer_jax
        >>> logger = puffer_jax.JSONLLogger("runs/cartpole_seed0/log.jsonl")
        >>> logger.log({"loss": 0.5}, step=64)
        >>> logger.close(None)
        >>> print(logger.path.read_text().strip())
        {"step": 64, "loss": 0.5}
    """

    def __init__(self, path: PathLike, run_id: str | None = None):
        self.path = Path(path)
        self.run_id = _folder_name(self.path.parent, run_id)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def log(self, logs: Logs, step: int) -> None:
        """Append a line.

        Raises:
            TypeError: a value is not a number, a string or None.
            ValueError: the logger was closed.
        """
        record = {"step": int(step)} | {name: _strict(value) for name, value in logs.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self, model_path: PathLike | None) -> None:
        """Close the file."""
        self._file.close()


def _strict(value: Any) -> object:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoardLogger:
    """Writes scalars for TensorBoard, through tensorboardX (which needs neither torch nor TF).

    Args:
        folder: where the event file goes; created if missing.
        run_id: the run's name; by default, the name of the folder.

    Raises:
        ImportError: tensorboardX is missing.

    Example:
        >>> import puffer_jax
        >>> logger = puffer_jax.TensorBoardLogger("runs/cartpole_seed0")  # doctest: +SKIP
    """

    def __init__(self, folder: PathLike, run_id: str | None = None):
        writer = require("tensorboardX", "TensorBoardLogger").SummaryWriter
        self.run_id = _folder_name(Path(folder), run_id)
        # It writes in a thread of its own: a killed process loses the last second or two.
        self._writer = writer(str(folder), flush_secs=1)

    def log(self, logs: Logs, step: int) -> None:
        """Write one scalar per name."""
        for name, value in logs.items():
            self._writer.add_scalar(name, float(value), int(step))

    def close(self, model_path: PathLike | None) -> None:
        """Close the event file."""
        self._writer.close()


class WandbLogger:
    """Logs to Weights & Biases; with WANDB_MODE=offline, to files to be synced later.

    Args:
        project: the project's name.
        **init: further arguments of `wandb.init`, such as config, group, tags, dir. `id` is the
            run's name, by default a new one.

    Raises:
        ImportError: wandb is missing.
        RuntimeError: it does not begin a run, say without a login.

    Example:
        >>> import puffer_jax
        >>> logger = puffer_jax.WandbLogger("cartpole", group="ppo")  # doctest: +SKIP
    """

    def __init__(self, project: str, **init: Any):
        wandb = self._wandb = require("wandb", "WandbLogger")
        options: dict[str, Any] = {"id": new_run_id(), "resume": "allow"} | init
        try:
            self._run: Any = wandb.init(project=project, **options)
        except wandb.errors.Error as error:
            raise RuntimeError(
                f"Weights & Biases: {error} (with WANDB_MODE=offline it writes files)"
            ) from error
        # A step of our own: below the last of its own steps, W&B drops whatever is logged, and a
        # run may be resumed from an earlier checkpoint.
        self._run.define_metric("agent_steps")
        self._run.define_metric("*", step_metric="agent_steps")
        self.run_id: str = self._run.id

    def log(self, logs: Logs, step: int) -> None:
        """Log one row; all is drawn over the metric "agent_steps"."""
        self._run.log({**logs, "agent_steps": int(step)})

    def close(self, model_path: PathLike | None) -> None:
        """Upload the model as an artifact, as the reference does, and finish the run."""
        try:
            if model_path is not None:
                artifact = self._wandb.Artifact(self.run_id, type="model")
                artifact.add_file(str(model_path))
                self._run.log_artifact(artifact)
        finally:
            self._run.finish()


class MultiLogger:
    """Several loggers as one; the run has the name that the first one gives it.

    Args:
        loggers: at least one.

    Raises:
        ValueError: `loggers` is empty.

    Example:
        >>> import puffer_jax
        >>> file = puffer_jax.JSONLLogger("runs/cartpole_seed0/log.jsonl")
        >>> puffer_jax.MultiLogger([file, puffer_jax.NoLogger()]).run_id
        'cartpole_seed0'
    """

    def __init__(self, loggers: Sequence[Logger]):
        if not loggers:
            raise ValueError("MultiLogger needs at least one logger; NoLogger records nothing")
        self.loggers = list(loggers)
        self.run_id = self.loggers[0].run_id

    def log(self, logs: Logs, step: int) -> None:
        """Log to each, in order."""
        for logger in self.loggers:
            logger.log(logs, step)

    def close(self, model_path: PathLike | None) -> None:
        """Close each, even if others fail.

        Raises:
            Exception: what one logger raised, or an ExceptionGroup of what several did.
        """
        errors = []
        for logger in self.loggers:
            try:
                logger.close(model_path)
            except Exception as error:
                errors.append(error)
        if len(errors) > 1:
            raise ExceptionGroup("loggers failed to close", errors)
        if errors:
            raise errors[0]
