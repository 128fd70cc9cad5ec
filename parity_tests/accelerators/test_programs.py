"""Policies and training, compiled for a device that is not here, stay within their limits."""

import jax
import programs
from limits import LIMITS, Limit, faults

# With --every, what is not in the table only has to compile, to call no host and no CPU kernel.
ANY = Limit(10**6, (10**6,) * 100, 10**6, 10**6)
NETS = ("default", "lstm", "nature", "resnet", "mingru")
EVERY = [
    *(f"{kind}-{net}" for kind in ("act", "gradient") for net in NETS),
    *(f"{kind}-{net}" for kind in ("epoch", "train", "population") for net in NETS[:2]),
    "epoch-lstm-muon",
]


def pytest_generate_tests(metafunc):
    platform = metafunc.config.getoption("platform")
    cases = [case for case, limits in LIMITS.items() if platform in limits]
    if metafunc.config.getoption("every"):
        cases = [(name, precision) for name in EVERY for precision in programs.PRECISIONS]
    metafunc.parametrize("name, precision", cases)


def test_compiles_within_its_limits(compiler, name, precision):
    with jax.default_matmul_precision(programs.PRECISIONS[precision][0]):
        built = programs.build(name, precision)
        program = compiler(built.function, *built.arguments)
    print(f"{name} {precision}: {program}")
    limit = LIMITS.get((name, precision), {}).get(compiler.platform, ANY)
    assert faults(program, limit) == []
