"""Which model a path means, and the options of the run that it belongs to."""

from pathlib import Path

from puffer_jax.cli.train import SETTINGS, Train, read_settings
from puffer_jax.run import checkpoint


def find_model(path: Path) -> tuple[Path, Train | None]:
    """The weights, and the options of the run they belong to, if there is one."""
    # A run's final model lies beside its folder.
    beside = path.with_suffix("")
    folder = path if path.is_dir() else beside if beside.is_dir() else path.parent
    if path.is_dir():
        epoch = checkpoint.latest(path)
        found = [] if epoch is None else list(path.glob(f"model_{epoch:06d}.*"))
        if not found:
            raise FileNotFoundError(f"no complete checkpoint in the folder {path}")
        path = found[0]
    return path, read_settings(folder) if (folder / SETTINGS).exists() else None
