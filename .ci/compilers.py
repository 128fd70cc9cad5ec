"""Print what compiling for an H100 and a TPU takes, in the versions of the installed JAX."""

import re
from importlib.metadata import requires, version

jax = version("jax")
libtpu = re.compile(r"libtpu==([\d.*]+)")
tpu = next(found[1] for line in requires("jax") or () if (found := libtpu.match(line)))
# The last holds ptxas, which assembles for the GPU; any version from 12.6 on would do.
needed = {
    "libtpu": tpu,
    "jax-cuda12-pjrt": jax,
    "jax-cuda12-plugin": jax,
    "nvidia-cuda-nvcc-cu12": "12.9.86",
}
for name, its_version in needed.items():
    print(f"{name}=={its_version}")
