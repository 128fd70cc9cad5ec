"""Several processes of one training: they agree or say why not, and end together.

Run as a script, this is one of the processes.
"""

import json
import os
import re
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
from puffer_jax import cli
from puffer_jax.base import checksums
from puffer_jax.run import checkpoint, processes
from puffer_jax.run.fingerprint import fingerprint

PROCESSES = 2


def start(scenario, *arguments):
    """The processes of a scenario, all on this machine; what each returned, and said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "4"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
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

    env = puffer_jax.environments.make("cartpole")
    mesh = puffer_jax.mesh()
    processes.check_same(fingerprint(puffer_jax.PuffeRLConfig(), env, policy(), mesh))
    config = puffer_jax.PuffeRLConfig(gamma=(0.9, 0.8)[i])
    wider = puffer_jax.Default(env, 4 + i, rngs=nnx.Rngs(0))
    expected = r"process 1 of 2 \(.+, process id \d+\) is not the same as process 0 in "
    expected += r"config: gamma \(0.8, not 0.9\); policy: \['decoder'\].+\[5\].+ and \d more"
    with pytest.raises(ValueError, match=expected):
        processes.check_same(fingerprint(config, env, wider, mesh))
    with pytest.raises(ValueError, match="each must be given mesh="):
        puffer_jax.PuffeRL(config, env, wider)

    restore_and_save(folder)

    # One fails; the other waits for it, in a collective.
    with processes.together():
        if i == 1:
            raise ValueError("the disk is full")
        sum_over_all()


def trainer(folder, mesh=None):
    """An LSTM in CartPole: 16 agents, 5 epochs, a checkpoint every other epoch."""
    env = puffer_jax.environments.make("cartpole")
    config = puffer_jax.PuffeRLConfig.recommended(
        num_envs=16,
        bptt_horizon=8,
        total_timesteps=5 * 128,
        num_minibatches=1,
        update_epochs=1,
        checkpoint_interval=2,
        data_dir=folder,
    )
    core = puffer_jax.LSTMWrapper(env, policy(), 4, 4, rngs=nnx.Rngs(0))
    logger = puffer_jax.JSONLLogger(Path(folder) / "run" / f"log{processes.index()}.jsonl", "run")
    return puffer_jax.PuffeRL(config, env, core, logger, mesh=mesh)


def digests(trainer):
    """Of the parameters and of the optimizer's state."""
    state = trainer.state
    return [
        checksums.of_array(np.asarray(x)) for x in jax.tree.leaves((state.params, state.opt_state))
    ]


def train(address, i, folder, killed):
    """Go on from the last checkpoint; process 1 ends in epoch `killed`, or the run with epoch 5."""
    processes.initialize(address, PROCESSES, i)
    run = trainer(folder, puffer_jax.mesh())
    run.log_seconds = 0
    run.restore()
    print(run.epoch, *digests(run), flush=True)

    def after_epoch(run):
        if i == 1 and run.epoch == int(killed):
            os.kill(os.getpid(), signal.SIGKILL)

    run.run(after_epoch)
    print(run.epoch, *digests(run), flush=True)


def command(folder, environments, *more):
    """An LSTM in gymnasium's CartPole, cut after 20 steps: two epochs by the command line."""
    line = f"train --env CartPole-v1 --vec.mode sync --vec.num-envs {environments} --rnn --name run"
    line += f" --env-arg max_episode_steps=20 --train.data-dir {folder} --train.seed 3"
    line += " --train.bptt-horizon 16 --train.total-timesteps 512 --train.update-epochs 1"
    line += " --train.num-minibatches 1 --policy.hidden-size 4"
    assert cli.main([*line.split(), *map(str, more)]) == 0


def from_a_shell(address, i, folder):
    command(folder, 8, *("--coordinator-address", address), "--num-processes", 2, "--process-id", i)


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


def told(out):
    """The epochs and digests that a process printed."""
    return [line.split() for line in out.splitlines() if re.match(r"\d+ [0-9a-f]{32}", line)]


@pytest.fixture
def as_users_do():
    """What the processes compute with."""
    with jax.enable_x64(False), jax.default_matmul_precision(None):
        yield


@pytest.mark.usefixtures("as_users_do")
def test_a_killed_process_is_named_and_the_run_goes_on(tmp_path):
    """From 1 device to 2 processes of 4, one of which dies; on 2 of 4 again, and back to 1."""
    alone = trainer(tmp_path)
    alone.save_checkpoint()
    alone.close()
    files = {"log0.jsonl", "log1.jsonl"}

    (code, out, waiting), (killed, *_) = start("train", tmp_path, 3)
    assert (code, killed) == (1, -signal.SIGKILL), waiting
    last = waiting.splitlines()[-1]
    assert "ProcessLostError: process 1 of 2 (" in last
    assert "is gone: no sign of life" in last
    assert told(out) == [["0", *digests(alone)]]
    assert {path.name for path in (tmp_path / "run").iterdir()} == files | {
        *("model_000000.pt", "state_000000", "model_000002.pt", "state_000002")
    }

    (code, out, said), (other, _, others) = start("train", tmp_path, 0)
    assert (code, other) == (0, 0), (said, others)
    lines = told(out)
    assert [line[0] for line in lines] == ["2", "5"]
    again = trainer(tmp_path)
    again.restore()
    assert again.epoch == 5 and digests(again) == lines[-1][1:]
    assert again.global_step == 640
    again.close()
    assert (tmp_path / "run.pt").exists()
    # The first epochs are logged twice: a run goes on from its checkpoint.
    logged = [json.loads(line) for line in open(tmp_path / "run" / "log0.jsonl")]
    assert [entry["epoch"] for entry in logged if "epoch" in entry] == [1, 2, 3, 3, 4, 5]
    assert all(np.isfinite(entry["losses/policy_loss"]) for entry in logged)
    assert not (tmp_path / "run" / "log1.jsonl").read_text()


@pytest.mark.usefixtures("as_users_do")
def test_each_process_steps_environments_of_its_own(tmp_path):
    """Eight in each of two processes are the sixteen of one: same seeds, actions, statistics."""
    command(tmp_path / "alone", 16, "--devices", "all")
    (code, _, said), (other, quiet, others) = start("from_a_shell", tmp_path / "two")
    assert (code, other) == (0, 0), (said, others)
    assert "gradient steps planned" not in quiet  # the first process alone prints
    logs = [tmp_path / name / "run_seed3" / "log.jsonl" for name in ("alone", "two")]
    pairs = zip(*(map(json.loads, open(log)) for log in logs), strict=True)
    told = ("agent_steps", "environment/episode_return", "losses/value_loss", "losses/entropy")
    count = 0
    for one, two in pairs:
        # The order in which float32's gradients are summed over devices is the library's.
        expected, found = ([log[name] for name in told] for log in (one, two))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        count += 1
    assert count >= 2
    assert (tmp_path / "two" / "run_seed3.pt").exists()


def test_alone_there_is_nobody_to_wait_for():
    assert (processes.index(), processes.count()) == (0, 1)
    assert processes.exchange({"a": 1}) == [{"a": 1}]
    processes.check_same({"config": {"gamma": 1.0}})
    with pytest.raises(KeyError), processes.together():
        raise KeyError


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
