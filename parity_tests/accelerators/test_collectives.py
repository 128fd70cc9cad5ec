"""What devices exchange in an epoch, compiled for topologies that are not here."""

import jax
from programs import PRECISIONS, whole_epoch

# By platform: the topology, its devices, the policy, and how many numbers its gradient has, of an
# LSTM without those of the second bias, which are the first one's. With --every all of them.
CASES = {
    "cuda": [("2x1x8", 16, "lstm", 132_611), ("1x1x8", 8, "default", 1_027)],
    "tpu": [
        *(("v5e:4x8", 32, "default", 1_027), ("v5e:2x4", 8, "lstm", 132_611)),
        ("v5e:16x16", 256, "lstm", 132_611),
    ],
}
# Losses and counts of a minibatch, which are summed with the gradient; and what devices tell each
# other before it: the sum of the priorities, and of advantages number, mean and deviation.
METRICS, BEFORE = 12, 4


def pytest_generate_tests(metafunc):
    cases = CASES[metafunc.config.getoption("platform")]
    every = metafunc.config.getoption("every")
    metafunc.parametrize("topology, count, net, numbers", cases if every else cases[:1])


def test_devices_exchange_one_gradient_a_minibatch(compiler, topology, count, net, numbers):
    precision, dtype = PRECISIONS["tf32"]
    devices = compiler.devices(topology)
    assert len(devices) == count
    with jax.default_matmul_precision(precision):
        built = whole_epoch(net, dtype=dtype, envs=1024, devices=devices)
        program = compiler(built.function, *built.arguments)
    found = [loop.collectives for loop in program.loops() if loop.collectives]
    print(f"{topology} {net}: a minibatch {found}, an epoch {program.entry.collectives}")
    # None in the rollout's loop, two in the minibatches'.
    ((before, after),) = found
    assert before[1] == 4 * BEFORE * count
    assert after == ("all-reduce", 4 * (numbers + METRICS))
    # What is logged of the rollout, and the explained variance.
    assert sum(size for _, size in program.entry.collectives) <= 20 * count + 16
