"""A run on disk and in the logs: its name, folder, checkpoints and logger."""

from pathlib import Path
from typing import Any

from flax import nnx
from jaxtyping import PyTree

from puffer_jax.base import locks
from puffer_jax.base.files import check_writable, write_atomically
from puffer_jax.run import checkpoint, processes
from puffer_jax.run.loggers import Logger, Logs


class Run:
    """The name of a run, and where it writes.

    Its folder is claimed by `claim`, the first checkpoint or a resume, until `close`: meanwhile
    no other process can write to it. Of several processes that train together (see
    `puffer_jax.run.processes`) process 0 claims it, names the run, and alone logs.

    Args:
        data_dir: the folder of all runs.
        logger: where the numbers go; its `run_id` is the run's name.
        keep: how many checkpoints to keep.

    Raises:
        OSError: nothing can be written to `data_dir`.
    """

    def __init__(self, data_dir: str | Path, logger: Logger, keep: int):
        self._data_dir, self._keep = Path(data_dir), keep
        check_writable(self._data_dir)
        self._first = processes.index() == 0
        self.logger = logger

    @property
    def logger(self) -> Logger:
        """The logger; setting it renames the run, in all processes at once."""
        return self._logger

    @logger.setter
    def logger(self, logger: Logger) -> None:
        self._logger = logger
        self._name = None if processes.count() == 1 else processes.exchange(logger.run_id)[0]

    @property
    def id(self) -> str:
        """The run's name."""
        return self._name or self.logger.run_id

    @property
    def folder(self) -> Path:
        """Folder of the run's checkpoints."""
        return self._data_dir / self.id

    def claim(self) -> None:
        """Keep other processes from writing to the folder.

        Raises:
            RuntimeError: another process writes to it.
        """
        if self._first:
            locks.claim(self.folder)

    def log(self, logs: Logs, step: int) -> None:
        """Log numbers at an agent step."""
        if self._first:
            self.logger.log(logs, step)

    def save(
        self, epoch: int, policy: nnx.Module, state: PyTree, metadata: checkpoint.Metadata
    ) -> Path:
        """Write a checkpoint; returns the model's path.

        Raises:
            RuntimeError: another process writes to the run's folder.
        """
        self.claim()
        return checkpoint.save(self.folder, epoch, policy, state, metadata, keep=self._keep)

    def restore(
        self, like: PyTree, folder: str | Path | None = None, epoch: int | None = None
    ) -> tuple[PyTree, checkpoint.Metadata, Path]:
        """Read a checkpoint of this run or of the one in `folder`; see `checkpoint.restore`.

        Returns:
            The state, the metadata, and the folder.

        Raises:
            RuntimeError: it is this run, and another process writes to its folder.
            ValueError: also if the metadata are not a trainer's.
        """
        folder = self.folder if folder is None else Path(folder)
        if folder.is_dir() and folder.resolve() == self.folder.resolve():
            self.claim()
        state, metadata = checkpoint.restore(folder, like, epoch)
        _check_metadata(folder, metadata)
        return state, metadata, folder

    def publish(self, model: Path) -> Path:
        """Copy a model to `data_dir/run_id.pt`, as the reference does; returns the copy's path."""
        path = self.folder.with_name(self.folder.name + model.suffix)
        if self._first:
            write_atomically(path, lambda file: file.write(model.read_bytes()))
        return path

    def close(self, model: Path | None) -> None:
        """Close the logger, and let others write to the folder.

        Args:
            model: the final model; None if it could not be saved.
        """
        try:
            self.logger.close(model)
        finally:
            if self._first:
                locks.release(self.folder)


def _check_metadata(folder: Path, metadata: Any) -> None:
    """Whether the trainer can go on from them; before anything of it is changed."""

    def check(name: str, value: object, least: int) -> None:
        if type(value) is not int or not least <= value < 2**63:
            raise ValueError(
                f"{folder}: {name} in the state's metadata is {value!r}; it must be a whole number "
                f"from {least} to 2**63 - 1"
            )

    metadata = metadata if isinstance(metadata, dict) else {}
    config = metadata.get("config")
    check("global_step", metadata.get("global_step"), 0)
    check("epoch", metadata.get("epoch"), 0)
    planned = config.get("total_timesteps") if isinstance(config, dict) else None
    check("config.total_timesteps", planned, 1)
