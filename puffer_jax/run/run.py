"""A run on disk and in the logs: its name, folder, checkpoints and logger."""

from pathlib import Path

from flax import nnx
from jaxtyping import PyTree

from puffer_jax.base.files import check_writable, write_atomically
from puffer_jax.run import checkpoint
from puffer_jax.run.loggers import Logger, Logs


class Run:
    """The name of a run, and where it writes.

    Args:
        data_dir: the folder of all runs.
        logger: where the numbers go; its `run_id` is the run's name.
        keep: how many checkpoints to keep.

    Attributes:
        logger: the logger; it may be replaced, and the run then takes the name of the new one.

    Raises:
        OSError: nothing can be written to `data_dir`.
    """

    def __init__(self, data_dir: str | Path, logger: Logger, keep: int):
        self._data_dir, self._keep = Path(data_dir), keep
        check_writable(self._data_dir)
        self.logger = logger

    @property
    def id(self) -> str:
        """The run's name."""
        return self.logger.run_id

    @property
    def folder(self) -> Path:
        """Folder of the run's checkpoints."""
        return self._data_dir / self.id

    def log(self, logs: Logs, step: int) -> None:
        """Log numbers at an agent step."""
        self.logger.log(logs, step)

    def save(
        self, epoch: int, policy: nnx.Module, state: PyTree, metadata: checkpoint.Metadata
    ) -> Path:
        """Write a checkpoint; returns the model's path."""
        return checkpoint.save(self.folder, epoch, policy, state, metadata, keep=self._keep)

    def restore(
        self, like: PyTree, folder: str | Path | None = None, epoch: int | None = None
    ) -> tuple[PyTree, checkpoint.Metadata, Path]:
        """Read a checkpoint of this run or of the one in `folder`; see `checkpoint.restore`.

        Returns:
            The state, the metadata, and the folder.
        """
        folder = self.folder if folder is None else Path(folder)
        return *checkpoint.restore(folder, like, epoch), folder

    def publish(self, model: Path) -> Path:
        """Copy a model to `data_dir/run_id.pt`, as the reference does; returns the copy's path."""
        path = self.folder.with_name(self.folder.name + model.suffix)
        write_atomically(path, lambda file: file.write(model.read_bytes()))
        return path

    def close(self, model: Path | None) -> None:
        """Close the logger; `model` is the final one, None if it could not be saved."""
        self.logger.close(model)
