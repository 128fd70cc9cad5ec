"""One session tests both precisions: x64 is on, so float64 and float32 arrays live side by side."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the session is compilation, and its second half, in Flax's other mode, compiles the same.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")

INSTALL = (
    "the parity tests need the reference: `pip install torch==2.13.0 psutil` and "
    "`pip install --no-deps pufferlib-core==3.0.23`; where there is no wheel of it, "
    "PUFFER_JAX_GOLDEN_ONLY=1 tests against the golden files alone"
)
GOLDEN_ONLY = os.environ.get("PUFFER_JAX_GOLDEN_ONLY") == "1"
if not GOLDEN_ONLY:
    try:
        import pufferlib.models  # noqa: F401
        import torch
    except ImportError as error:
        raise pytest.UsageError(f"{INSTALL} ({error})") from error

    torch.set_num_threads(1)
install_import_hook("puffer_jax", "beartype.beartype")


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_reference: not run with PUFFER_JAX_GOLDEN_ONLY=1")


def pytest_ignore_collect(collection_path):
    if GOLDEN_ONLY and collection_path.is_file() and collection_path.name != "test_golden.py":
        return True
    return None


def pytest_collection_modifyitems(config, items):
    if GOLDEN_ONLY:
        left_out = [item for item in items if item.get_closest_marker("needs_reference")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
