"""`python -m puffer_jax`, which is the command `puffer-jax`."""

import sys

from puffer_jax.cli import main

sys.exit(main())
