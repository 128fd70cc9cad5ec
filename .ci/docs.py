"""Write the API reference of the public modules, from their docstrings: `make docs`."""

import importlib
import sys
import warnings
from pathlib import Path

import pdoc

import puffer_jax

for name in (*puffer_jax._SUBMODULES, *puffer_jax._EXTRAS):
    module = importlib.import_module(f"puffer_jax.{name}")
    if not hasattr(module, "__all__"):  # without, pdoc leaves out what a module re-exports
        module.__all__ = [
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and getattr(value, "__module__", "").startswith("puffer_jax")
        ]
# RLlib's own annotations name packages that it does not need.
warnings.filterwarnings("ignore", r"Error parsing type annotation .* for ray\.")
pdoc.render.configure(docformat="google", footer_text=f"puffer_jax {puffer_jax.__version__}")
extras = (f"puffer_jax.{name}" for name in puffer_jax._EXTRAS)
pdoc.pdoc("puffer_jax", *extras, output_directory=Path(sys.argv[1]))
