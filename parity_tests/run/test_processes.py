"""Several processes of one training: they agree or say why not, and end together.

Run as a script, this is one of the processes.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import puffer_jax
from puffer_jax.run import checkpoint, processes

PROCESSES = 2


def start(scenario, *arguments):
    """The processes of a scenario, all on this machine; what each returned, and said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "4"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, scenario, address, str(i), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


# --- what the processes do ----------------------------------------------------------------------


def sum_over_all():
    return multihost_utils.process_allgather(np.float32(processes.index()))


def state():
    """What a checkpoint holds: whole, by agent, and keys of both kinds."""
    return {
        "params": {"w": jnp.arange(12.0, dtype=jnp.float32).reshape(3, 4) / 7},
        "epoch": jnp.int32(3),
        "key": jax.random.key(1),
        "stream": {
            "x": jnp.arange(32, dtype=jnp.int32).reshape(16, 2),
            "keys": jax.random.split(jax.random.key(2), 16),
        },
    }


def policy():
    return puffer_jax.Default(puffer_jax.environments.make("cartpole"), 4, rngs=nnx.Rngs(0))


def same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        for shard in a.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(b)[shard.index])


def restore_and_save(folder):
    """From one device to eight in two processes, and back to the disk."""
    mesh = jax.make_mesh((8,), ("devices",))

    def spread(path, x):
        spec = PartitionSpec("devices") if "stream" in str(path) else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    like = jax.tree.map_with_path(spread, state())
    restored, metadata = checkpoint.restore(folder, like)
    assert metadata == {"by": 1}
    assert len(restored["stream"]["x"].addressable_shards) == 4
    same(restored, state())
    model = checkpoint.save(folder, 4, policy(), restored, {"by": PROCESSES}, keep=1)
    assert model == Path(folder) / "model_000004.pt"


def agree_and_fail(address, i, folder):

    processes.initialize(address, PROCESSES, i)
    processes.initialize(address, PROCESSES, i)  # as often as one likes
    processes.initialize()
    with pytest.raises(RuntimeError, match=f"is process {i} of 2 already"):
        processes.initialize(address, PROCESSES, 1 - i)
    assert (processes.index(), processes.count()) == (i, PROCESSES)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    for n in range(3):
        assert processes.exchange([n, i]) == [[n, 0], [n, 1]]
    assert sum_over_all().tolist() == [0, 1]

    config = {"gamma": 0.99, "learning_rate": 1e-3}
    processes.check_same({"config": config, "code": {"jax": jax.__version__}})
    expected = r"process 1 of 2 \(.+, process id \d+\) is not the same as process 0 in "
    expected += r"code: jax \('0.0', not '.+'\); config: learning_rate \(0.01, not 0.001\)$"
    with pytest.raises(ValueError, match=expected):
        other = {"learning_rate": 1e-3 if i == 0 else 1e-2}
        code = {"jax": "0.0" if i else jax.__version__}
        processes.check_same({"config": config | other, "code": code})

    restore_and_save(folder)

    # One fails; the other waits for it, in a collective.
    with processes.together():
        if i == 1:
            raise ValueError("the disk is full")
        sum_over_all()


def killed(address, i):
    processes.initialize(address, PROCESSES, i)
    sum_over_all()
    if i == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with processes.together():
        sum_over_all()


# --- what is seen of them -----------------------------------------------------------------------


def test_processes_agree_and_hear_of_the_one_that_fails(tmp_path):
    checkpoint.save(tmp_path, 3, policy(), state(), {"by": 1})
    (code, _, waiting), (failed, _, reason) = start("agree_and_fail", tmp_path)
    assert (code, failed) == (1, 1), (waiting, reason)
    assert "ValueError: the disk is full" in reason.splitlines()[-1]
    last = waiting.splitlines()[-1]
    assert "ProcessLostError: process 1 of 2 (" in last
    assert "failed with ValueError: the disk is full. Start all processes again" in last

    # What both wrote together, read by one.
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model_000004.pt", "state_000004"}
    restored, metadata = checkpoint.restore(tmp_path, state())
    assert metadata == {"by": PROCESSES}
    same(restored, state())


def test_a_killed_process_is_named():
    (code, _, waiting), (failed, *_) = start("killed")
    assert (code, failed) == (1, -signal.SIGKILL), waiting
    last = waiting.splitlines()[-1]
    assert "ProcessLostError: process 1 of 2 (" in last
    assert "is gone: no sign of life" in last


def test_alone_there_is_nobody_to_wait_for():
    assert (processes.index(), processes.count()) == (0, 1)
    assert processes.exchange({"a": 1}) == [{"a": 1}]
    processes.check_same({"config": {"gamma": 1.0}})
    with pytest.raises(KeyError), processes.together():
        raise KeyError
    assert not processes.has_ended()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("somewhere",), "coordinator_address must be HOST:PORT; got 'somewhere'"),
        (("host:1", 0), "num_processes must be at least 1; got 0"),
        (("host:1", 2, 2), "process_id must be at least 0 and below num_processes, 2; got 2"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.initialize(*arguments)


if __name__ == "__main__":
    scenario, address, index, *rest = sys.argv[1:]
    globals()[scenario](address, int(index), *rest)
