"""Learning curves from the log files of runs."""

from puffer_jax.run.plot import curve as curve
from puffer_jax.run.plot import plot_runs as plot_runs
