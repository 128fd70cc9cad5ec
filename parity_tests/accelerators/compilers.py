"""JAX's compilers for an H100 and a TPU v5e, without either: see `.ci/compilers.py`.

One process compiles for one of them: `start` loads its library.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compiled import Program

# What XLA asks of a GPU: an H100's data sheet.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""

FOLDER = Path(
    os.environ.get("PUFFER_JAX_COMPILERS", Path(__file__).parents[2] / "build" / "compilers")
)


def start(platform: str) -> "Compiler":
    """Load the compiler for "cuda" or "tpu"; once a process, before JAX is used."""
    if not (FOLDER / "libtpu").is_dir():
        raise SystemExit(f"there are no compilers in {FOLDER}; `make accelerators` puts them there")
    flags = os.environ.get("XLA_FLAGS", "")
    if platform == "cuda":
        nvcc = FOLDER / "nvidia" / "cuda_nvcc"
        # What spills registers fails to compile. Nothing can be timed to choose between kernels.
        flags += f" --xla_gpu_cuda_data_dir={nvcc} --xla_gpu_autotune_level=0"
        flags += " --xla_gpu_fail_ptx_compilation_on_register_spilling=true"
    else:
        library = FOLDER / "libtpu" / "libtpu.so"
        os.environ |= {"TPU_LIBRARY_PATH": str(library), "TPU_SKIP_MDS_QUERY": "1"}
        # Two processes may compile at once, as there is no TPU to quarrel about.
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
    sys.path.append(str(FOLDER))
    import jax

    if platform == "cuda":
        from jax._src import xla_bridge

        # It loads the plugin, and misses a GPU.
        with contextlib.suppress(Exception):
            xla_bridge.discover_pjrt_plugins()
    return Compiler(platform, jax)


class Compiler:
    """Compiles for one platform; from `start`."""

    def __init__(self, platform: str, jax: Any):
        self.platform, self._jax = platform, jax
        one = self.devices("1x1x1" if platform == "cuda" else "v5e:2x2")[0]
        self._alone = jax.sharding.SingleDeviceSharding(one)

    def devices(self, topology: str) -> list[Any]:
        """The devices of a topology, such as "1x1x8" (one host of eight H100s) or "v5e:2x4"."""
        from jax.experimental import topologies

        of_gpus = {"target_config": _H100, "topology": topology}
        options = of_gpus if self.platform == "cuda" else {}
        return topologies.get_topology_desc(topology, platform=self.platform, **options).devices

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Program:
        """Compile a function for arguments: arrays, or what has a shape and a dtype.

        They are on one device, but for those that are a `ShapeDtypeStruct` with a sharding.
        """
        jax = self._jax

        def spec(x: Any) -> Any:
            placed = isinstance(x, jax.ShapeDtypeStruct) and x.sharding
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed or self._alone)

        import puffer_jax.kernels

        kernels = "gpu" if self.platform == "cuda" else self.platform
        # A new function each time: JAX remembers what it has traced for others.
        with puffer_jax.kernels.use("xla", kernels):
            traced = jax.jit(lambda *x: function(*x)).trace(*jax.tree.map(spec, arguments))
            lowered = traced.lower(lowering_platforms=(self.platform,))
        return Program(lowered.compile())
