"""`puffer-jax autotune`."""

from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from puffer_jax import environments, vector
from puffer_jax.cli.envs import naming_the_flag
from puffer_jax.cli.train import parse_arguments
from puffer_jax.environments import registry


@dataclass(frozen=True, kw_only=True)
class Autotune:
    """Find the fastest way to step many copies of an environment on this machine.

    Tries backends, numbers of environments and of workers with random actions, and prints a table,
    the fastest first. What `puffer-jax train` calls --vec.num-envs is `envs` here. Exit code 0.
    """

    env: str
    """An environment that runs on the host, as in `puffer-jax train`."""
    env_arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE for the environment's constructor; may be given several times."""
    batch_size: int = 8
    """How many environments act at once."""
    max_envs: int | None = None
    """Most environments in total; by default, twice as many."""
    cores: int | None = None
    """Most workers; by default, one for each core."""
    think: float = 0.0
    """Milliseconds that the policy takes for a batch, on another device."""
    seconds: float = 1.0
    """How long each trial takes."""

    def run(self) -> int:
        """Measure, print, and return the exit code."""
        with naming_the_flag():
            if registry.find(self.env)[0].in_jax:
                raise ValueError(
                    f"{self.env} is JAX-native: there are no workers to choose, since all its "
                    "copies step in one program"
                )
            environments.make(self.env, **parse_arguments(self.env_arg)).close()
        trials = vector.autotune(
            self.env,
            self.batch_size,
            self.max_envs,
            self.cores,
            self.think / 1000,
            self.seconds,
            env_kwargs=parse_arguments(self.env_arg),
        )
        title = f"batches of {self.batch_size} environments, {self.think:g} ms to act on one"
        Console().print(_table(title, trials))
        return 0


def _table(title: str, trials: list[vector.Trial]) -> Table:
    table = Table(title=title)
    for name in ("backend", "envs", "workers", "steps/s"):
        table.add_column(name, justify="left" if name == "backend" else "right")
    for options, rate in trials:
        name = options["backend"].__name__ + ", local_worker" * ("local_worker" in options)
        table.add_row(
            name, str(options["num_envs"]), str(options.get("num_workers", "")), f"{rate:,.0f}"
        )
    return table
