"""Prove that a torch policy and its JAX port compute the same function, or show where they part.

    report = compare(torch_policy, jax_policy, observations)
    print(report)
    report.assert_close()

Both run in float64 and in float32. In float64 only a different formula makes a visible difference.
In float32 both are held to torch's float64 result, and torch's own error is the yardstick for
ours.
"""

from puffer_jax.parity.comparison import compare as compare
from puffer_jax.parity.reference import reference_env as reference_env
from puffer_jax.parity.reference import reference_policy as reference_policy
from puffer_jax.parity.report import Report as Report
