"""One session tests both precisions: x64 is on, so float64 and float32 arrays live side by side."""

import functools
import gc
import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The second half of the session, in Flax's other mode, compiles much of the same.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Without LLVM's optimiser, also in processes that tests start; see `optimised`.
os.environ.setdefault(
    "JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(os.environ.get("PUFFER_JAX_OPTIMISED") != "1"))
)

import jax
import numpy as np
import pytest
from jax._src import compilation_cache, core, literals
from jax._src.interpreters import mlir
from jaxtyping import install_import_hook
from support import typecheck as typecheck  # which the import hook finds by its name

gc.disable()  # while all is imported, which stays
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")

INSTALL = (
    "the parity tests need the reference: `pip install torch==2.13.0 psutil` and "
    "`pip install --no-deps pufferlib-core==3.0.23`; where there is no wheel of it, "
    "PUFFER_JAX_GOLDEN_ONLY=1 tests against the golden files alone"
)
REFERENCE = re.compile(
    r"^(import|from) (torch|pufferlib|support\.(reference|trainer)|support import reference)\b"
    r"|^from stable_baselines3\b"
    r"|^from test_vector import",
    re.M,
)
OPTIMISED = os.environ.get("PUFFER_JAX_OPTIMISED") == "1"
# Most of the session is compilation, of which this saves more than a third, also in processes that
# tests start: one process a core, and fusions without MLIR where XLA still can. The tests of Flax's
# tree mode in `make test` have XLA's own settings.
XLA_FLAGS = os.environ.get("XLA_FLAGS", "").split()
if not OPTIMISED:
    XLA_FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
    if jax.__version_info__ < (0, 11):
        XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
# Eight devices for the tests of many, which cost the others nothing: all else is on the first.
os.environ["XLA_FLAGS"] = " ".join([*XLA_FLAGS, "--xla_force_host_platform_device_count=8"])
jax.devices()
os.environ["XLA_FLAGS"] = " ".join(XLA_FLAGS)
# `make accelerators` runs these in processes of their own.
collect_ignore = ["accelerators"]
GOLDEN_ONLY = os.environ.get("PUFFER_JAX_GOLDEN_ONLY") == "1"
# Its releases so far cannot be installed beside jax 0.12, so what tests it may be left out, too.
NO_GYMNAX = os.environ.get("PUFFER_JAX_NO_GYMNAX") == "1"
LEFT_OUT = ["needs_reference"] * GOLDEN_ONLY + ["needs_gymnax"] * NO_GYMNAX
if not GOLDEN_ONLY:
    try:
        import pufferlib.models  # noqa: F401
        import torch
    except ImportError as error:
        raise pytest.UsageError(f"{INSTALL} ({error})") from error

    torch.set_num_threads(1)
install_import_hook("puffer_jax", "support.typecheck.checked")
# JAX makes an MLIR context for every program, which takes a third of lowering and compiling a small
# one. They may share one; `forget` makes another at times, as a context keeps what was in it.
if hasattr(mlir, "make_ir_context"):  # in JAX 0.10
    mlir.make_ir_context = shared_context = functools.cache(mlir.make_ir_context)
else:
    shared_context = functools.cache(lambda: None)
# Flax asks every value that it sets for its sharding. A tracer has none, and JAX looks through all
# of the program so far for what the error says; without the property the error is a short one.
del core.Tracer.sharding
# And in newer versions `jnp.asarray` of a NumPy array is a program that returns its argument, and
# every shape has its own.
if hasattr(core, "stage_p"):
    stage = core.stage_p.impl

    def put(x):
        strong = isinstance(x, literals.TypedNdArray) and not x.weak_type
        return jax.device_put(np.array(x)) if strong else stage(x)

    core.stage_p.def_impl(put)
# What was compiled in this process is at hand: the cache on the disk would read and link it anew.
executables = {}
read_executable = compilation_cache.get_executable_and_time
write_executable = compilation_cache.put_executable_and_time


def get_executable_and_time(key, options, backend, devices, *callbacks):
    found = None if any(callbacks) else executables.get(key)  # a key does not know its callbacks
    return found or read_executable(key, options, backend, devices, *callbacks)


def put_executable_and_time(key, name, executable, backend, compile_time):
    executables[key] = executable, compile_time
    write_executable(key, name, executable, backend, compile_time)


compilation_cache.get_executable_and_time = get_executable_and_time
compilation_cache.put_executable_and_time = put_executable_and_time


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_reference: not run with PUFFER_JAX_GOLDEN_ONLY=1")
    config.addinivalue_line("markers", "needs_gymnax: not run with PUFFER_JAX_NO_GYMNAX=1")
    config.addinivalue_line("markers", "tree: run in Flax's tree mode, too")


def imports_the_reference(path):
    return path.suffix == ".py" and REFERENCE.search(path.read_text()) is not None


def pytest_ignore_collect(collection_path):
    return True if GOLDEN_ONLY and imports_the_reference(collection_path) else None


# The files that take longest, so that none of them begins when the other process is done.
LONGEST = ("fast_paths", "pufferl", "example_policies", "models", "parity", "vector", "examples")


def place(item):
    name = item.path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=place)
    for item in items:
        if item.name.startswith("test_ours["):  # the golden files
            item.add_marker("tree")
    left_out = [item for item in items if any(map(item.get_closest_marker, LEFT_OUT))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish():
    """The garbage collector need not look through what was imported, again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 20)
    gc.enable()


def pytest_sessionfinish():
    """Nor through what the tests left, now that all of it goes."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    for marker in LEFT_OUT:
        terminalreporter.line(f"not run: the tests marked {marker}")
    if GOLDEN_ONLY:
        files = sorted(Path(__file__).parent.rglob("test_*.py"))
        names = " ".join(path.name for path in files if imports_the_reference(path))
        terminalreporter.line(f"not run, as they import the reference: {names}")


@pytest.fixture
def rbg():
    """Random keys whose programs compile several times faster than threefry's."""
    with jax.default_prng_impl("rbg"):
        yield


@pytest.fixture
def optimised():
    """Compile with LLVM's optimiser, for tests that compute for long.

    It would be half of a compilation, and nine tenths of a float64 convolution's. What XLA makes of
    a program, its fusions included, is the same without. PUFFER_JAX_OPTIMISED=1, as in
    `make test`'s second half, leaves it on for all.
    """
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", not OPTIMISED)


@pytest.fixture
def unoptimised():
    """What all tests are unless `optimised`."""


@pytest.fixture
def quick(rbg):
    """Compile as little as possible."""


# Bytes of this process from which on programs are forgotten.
ENOUGH = 3 * 2**29


def resident():
    """Bytes of this process in memory; where Linux does not tell, as many as are enough."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return ENOUGH
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Files share small programs, initial weights' above all, but thousands fill gigabytes."""
    yield
    if resident() >= ENOUGH:
        jax.clear_caches()
        executables.clear()
        shared_context.cache_clear()
