"""Where the numbers of a run go."""

from puffer_jax.run.loggers import JSONLLogger as JSONLLogger
from puffer_jax.run.loggers import Logger as Logger
from puffer_jax.run.loggers import MultiLogger as MultiLogger
from puffer_jax.run.loggers import NoLogger as NoLogger
from puffer_jax.run.loggers import TensorBoardLogger as TensorBoardLogger
from puffer_jax.run.loggers import WandbLogger as WandbLogger
from puffer_jax.run.loggers import new_run_id as new_run_id
