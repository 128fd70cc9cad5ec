"""Policies and training, compiled for a device that is not here, stay within their limits."""

import jax
import jax.numpy as jnp
import programs
from limits import LIMITS, Limit, faults

from puffer_jax.kernels.lstm import lstm_scan

# With --every, what is not in the table only has to compile, to call no host and no CPU kernel.
ANY = Limit(10**6, (10**6,) * 100, 10**6, 10**6)
NETS = ("default", "lstm", "nature", "resnet", "mingru")
EVERY = [
    *(f"{kind}-{net}" for kind in ("act", "gradient") for net in NETS),
    *(f"{kind}-{net}" for kind in ("epoch", "train", "population") for net in NETS[:2]),
    "epoch-lstm-muon",
]
# Hidden sizes of an LSTM besides the policies' 128. (With more, some of XLA's own products spill.)
WIDTHS = [32, 64]


def pytest_generate_tests(metafunc):
    platform = metafunc.config.getoption("platform")
    every = metafunc.config.getoption("every")
    if "hidden" in metafunc.fixturenames:
        cases = [(hidden, precision) for hidden in WIDTHS for precision in programs.PRECISIONS]
        metafunc.parametrize("hidden, precision", cases if every else [(64, "float32")])
        return
    cases = [case for case, limits in LIMITS.items() if platform in limits]
    if every:
        cases = [(name, precision) for name in EVERY for precision in programs.PRECISIONS]
    metafunc.parametrize("name, precision", cases)


def test_compiles_within_its_limits(compiler, name, precision):
    with jax.default_matmul_precision(programs.PRECISIONS[precision][0]):
        built = programs.build(name, precision)
        program = compiler(built.function, *built.arguments)
    print(f"{name} {precision}: {program}")
    limit = LIMITS.get((name, precision), {}).get(compiler.platform, ANY)
    assert faults(program, limit) == []


def test_a_narrow_lstm_compiles(compiler, hidden, precision):
    """On a GPU also without spilling a register, which would be an error."""
    batch, time, inputs = 512, 16, 96
    shapes = [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (batch, time, inputs)]
    results = [(batch, time, hidden), (batch, hidden), (batch, hidden)]
    arrays, cotangents = (
        tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in kind)
        for kind in (shapes + results[1:], results)
    )
    done = jax.ShapeDtypeStruct((batch, time), jnp.bool_)
    dtype = programs.PRECISIONS[precision][1]

    def function(arrays, cotangents, done):
        return jax.vjp(lambda *arrays: lstm_scan(*arrays, done, dtype), *arrays)[1](cotangents)

    with jax.default_matmul_precision(programs.PRECISIONS[precision][0]):
        # A TPU's kernel is the same one with and without resets.
        for resets in (done, None) if compiler.platform == "cuda" else (done,):
            assert compiler(function, arrays, cotangents, resets).loops() == []
