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
OPTIMISED = os.environ.get("PUFFER_JAX_OPTIMISED") == "1"
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
    config.addinivalue_line("markers", "tree: run in Flax's tree mode, too")


def pytest_ignore_collect(collection_path):
    if GOLDEN_ONLY and collection_path.is_file() and collection_path.name != "test_golden.py":
        return True
    return None


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.name.startswith("test_ours["):  # the golden files
            item.add_marker("tree")
    if GOLDEN_ONLY:
        left_out = [item for item in items if item.get_closest_marker("needs_reference")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def rbg():
    """Random keys whose programs compile several times faster than threefry's."""
    with jax.default_prng_impl("rbg"):
        yield


@pytest.fixture
def quick(rbg):
    """Compile without LLVM's optimiser, which is half of a compilation.

    (Nine tenths of a float64 convolution's.) What XLA makes of a program, its fusions included, is
    the same without. PUFFER_JAX_OPTIMISED=1, as in `make test`'s second half, leaves it on. Not
    for tests that compute for long.
    """
    jax.config.update("jax_disable_most_optimizations", not OPTIMISED)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def forget():
    """No file needs the programs of another, and thousands of them fill gigabytes."""
    yield
    jax.clear_caches()
