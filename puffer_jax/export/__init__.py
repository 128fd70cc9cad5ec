"""A policy's step as a file for elsewhere: StableHLO, which JAX alone runs, or ONNX.

    export_step(policy, "policy.stablehlo")
    step = load_step("policy.stablehlo")
    logits, values, state = step(observations, step.initial_state(8))

Parameters are inside, and none of our kernels. `puffer_jax/export/README.md` compares the ways out.
"""

from puffer_jax.export.files import export_step as export_step
from puffer_jax.export.files import load_step as load_step
from puffer_jax.export.loaded import LoadedStep as LoadedStep
