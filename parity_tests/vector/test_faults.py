"""What becomes of a vecenv whose environments, workers or parent fail: nothing is left behind."""

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.vector_envs import Native, Tick

from puffer_jax import vector
from puffer_jax.vector import multiprocessing, pool
from puffer_jax.vector.multiprocessing import Multiprocessing
from puffer_jax.vector.protocol import WorkerError
from puffer_jax.vector.worker import Process

POOL = {"backend": Multiprocessing, "num_workers": 2, "overwork": True, "num_envs": 4}
LOCAL = POOL | {"local_worker": True}  # environments 0 and 1 elsewhere, 2 and 3 here


def wait_until(true, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid):
    """Whether there is such a process, and it has not ended unnoticed."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    return False


def children(pid=None):
    """Those of a process, by default of this one."""
    pid = pid or os.getpid()
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def traces():
    """What a process may leave: files of shared memory, children, open files."""
    gc.collect()
    memory = os.scandir("/dev/shm") if os.path.exists("/dev/shm") else ()
    # A folder is that of another process's test, which runs beside these.
    shared = {entry.name for entry in memory if not entry.is_dir()}
    return shared, children(), len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What earlier tests left need not be looked through for every trace."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left():
    before = traces()
    yield
    assert traces() == before


@contextlib.contextmanager
def within(seconds):
    """Fail rather than wait for ever."""

    def fail(*_):
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def third(fault, **kwargs):
    """Arguments of `make` for four environments, of which the third misbehaves."""
    return {
        "env_creator_or_creators": [Tick] * 4,
        "env_kwargs": [{}, {}, {"fault": fault, **kwargs}, {}],
    }


def run(vecenv, steps=4):
    vecenv.reset(0)
    for _ in range(steps):
        vecenv.step(np.zeros(4, int))


TOLD = (
    r"worker 1 \(environments 2 to 3\) failed {} environment 2: ValueError: boom at {}"
    r"(?s:.*)Traceback(?s:.*)in misbehave"
)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("raise", 2), TOLD.format("stepping", 2)),
        (("raise", "reset"), TOLD.format("resetting", "reset")),
        (("input", 2), r"failed stepping environment 2: EOFError"),
        (("exit", 2), r"worker 1 \(environments 2 to 3\) exited with status 3"),
        (("kill", 2), r"worker 1 \(environments 2 to 3\) was killed by signal 9 \(Killed\)"),
        (("fork-kill", 2), r"was killed by signal 9 \(Killed\)"),
        (("segfault", "reset"), r"was killed by signal 11 \(Segmentation fault\)"),
        (("hang", 2), r"worker 1 .* did not step within timeout=0.5 s and was killed"),
        (("hang", "reset"), r"worker 1 .* did not reset within timeout=0.5 s and was killed"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_failing_worker_is_an_error(fault, message):
    vecenv = vector.make(
        **third(fault), **POOL, timeout={"hang": 0.5, "fork-kill": 5.0, "input": 5.0}.get(fault[0])
    )
    pids = vecenv.pids
    with pytest.raises(WorkerError, match=message) as caught:
        run(vecenv)
    assert not any(map(alive, pids))
    for call in (vecenv.recv, vecenv.reset):
        with pytest.raises(RuntimeError, match="this Multiprocessing is closed"):
            call()
    vecenv.close()
    del caught


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_an_environment_that_cannot_be_made(how):
    only_in_worker = partial(Tick, fault=(how, "make"))
    message = TOLD.format("making", "make") if how == "raise" else "was killed by signal 9"
    creators = [Tick, Tick, only_in_worker, Tick]
    with pytest.raises(WorkerError, match=message):
        vector.make(creators, **POOL, restart_failed=True)


@pytest.mark.parametrize("options", [{"num_envs": 4}, LOCAL], ids=["serial", "local"])
def test_what_environments_of_this_process_raise(options):
    for when, what in ((2, "stepping"), ("reset", "resetting")):
        vecenv = vector.make(**third(("raise", when)), **options)
        with pytest.raises(ValueError, match=f"boom at {when}") as caught:
            run(vecenv)
        assert caught.value.__notes__ == [f"({what} environment 2)"]
        with pytest.raises(RuntimeError, match=f"this {type(vecenv).__name__} is closed"):
            vecenv.recv()
    with pytest.raises(ValueError, match="boom at make") as caught:
        vector.make([Tick, Tick, partial(Tick, fault=("raise", "make")), Tick], **options)
    assert caught.value.__notes__ == ["(making environment 2)"]


def test_a_failure_elsewhere_is_seen_while_one_is_awaited():
    """Whoever dies, at once: nobody waits for the slow one, or for ever."""
    env_kwargs = [{"pause": 1.0}, {}, {"fault": ("kill", 1)}, {}]
    vecenv = vector.make([Tick] * 4, env_kwargs=env_kwargs, **POOL)
    vecenv.reset(0)
    vecenv.send(np.zeros(4, int))
    with pytest.raises(WorkerError, match="worker 1"):
        vecenv.recv()
    idle = vector.make(Tick, **POOL)
    idle.reset(0)
    os.kill(idle.pids[0], signal.SIGTERM)
    with pytest.raises(WorkerError, match=r"worker 0 .* was killed by signal 15"):
        run(idle)


def test_a_stopped_worker_is_given_orders_only_until_the_timeout():
    vecenv = vector.make(Tick, **POOL, timeout=0.5)
    vecenv.reset(0)
    os.kill(vecenv.pids[1], signal.SIGSTOP)
    with within(10), pytest.raises(WorkerError, match=r"worker 1 .* did not step within"):
        for _ in range(2000):  # more than a socket takes
            vecenv.notify()
        vecenv.step(np.zeros(4, int))


def test_half_an_answer_is_awaited_only_until_the_timeout():
    large = partial(dict, large=bytes(1 << 22))
    vecenv = vector.make(Tick, env_kwargs={"info": large}, **POOL, timeout=1.0)
    vecenv.reset(0)
    vecenv.send(np.zeros(4, int))
    (channel, *_), _ = (process.fds() for process in vecenv._processes.values())
    assert select.select([channel], [], [], 10)[0]  # it has begun, and nobody reads
    os.kill(vecenv.pids[0], signal.SIGSTOP)
    with within(10), pytest.raises(WorkerError, match=r"worker 0 .* did not step within"):
        vecenv.recv()
    with vector.make(Tick, env_kwargs={"info": large}, **POOL, timeout=10.0) as vecenv:
        vecenv.reset(0)
        infos = vecenv.step(np.zeros(4, int))[4]
        assert [len(info["large"]) for info in infos] == [1 << 22] * 4


@pytest.mark.parametrize(
    ("said", "where"),
    [
        (lambda: {"fine": 1, "odd": (i for i in ())}, r"info\['odd'\]"),
        (lambda: {"agent": {"fine": 1, "odd": (i for i in ())}}, r"info\['agent'\]\['odd'\]"),
    ],
    ids=["key", "agent"],
)
def test_an_info_that_cannot_be_sent_is_named(said, where):
    env_kwargs = [{}, {}, {"info": partial(dict, fine=1)}, {"info": said}]
    vecenv = vector.make([Tick] * 4, env_kwargs=env_kwargs, **POOL)
    told = rf"worker 1 .* failed sending {where} of environment 3, which cannot be pickled: Type"
    with pytest.raises(WorkerError, match=told):
        run(vecenv)


def test_infos_that_are_sent_but_cannot_be_read():
    class Unreadable:
        def __reduce__(self):
            return int, ("no number",)

    with vector.make(Tick, env_kwargs={"info": lambda: {"f": lambda: 3}}, **POOL) as vecenv:
        vecenv.reset(0)
        infos = vecenv.step(np.zeros(4, int))[4]
        assert [info["f"]() for info in infos] == [3] * 4
    vecenv = vector.make(Tick, env_kwargs={"info": lambda: {"x": Unreadable()}}, **POOL)
    with pytest.raises(WorkerError, match="could not unpickle: ValueError"):
        run(vecenv)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_large_creator(stopped, monkeypatch):
    """Larger than a socket takes; a worker that is stopped ends the attempt."""

    class Stopped(Process):
        def __init__(self, *args):
            super().__init__(*args)
            os.kill(self.pid, signal.SIGSTOP)

    ballast = bytes(1 << 22)
    if stopped:
        monkeypatch.setattr(multiprocessing, "Process", Stopped)
        monkeypatch.setattr(pool, "STARTING", 0.5)
        with within(10), pytest.raises(WorkerError, match="did not start within 1 s"):
            vector.make(lambda: ballast and Tick(), **POOL, timeout=0.5)
    else:
        with vector.make(lambda: ballast and Tick(), **POOL) as vecenv:
            assert vecenv.reset(0)[0].shape == (4, 2)


@pytest.mark.parametrize(
    ("how", "options", "lost"),
    [
        ("raise", {"num_envs": 4}, [2]),
        ("raise", POOL, [2]),
        ("raise", LOCAL, [2]),
        ("kill", POOL, [2, 3]),
        ("hang", POOL | {"timeout": 0.5}, [2, 3]),
    ],
    ids=["serial-raise", "raise", "local-raise", "kill", "hang"],
)
def test_restart_failed(how, options, lost, tmp_path):
    once = str(tmp_path / "fault")
    with vector.make(
        **third((how, 2), once=once, length=9), **options, restart_failed=True, seed=4
    ) as vecenv:
        first = vecenv.reset()[0].copy()
        got = [[a.copy() for a in vecenv.step(np.zeros(4, int))[:4]] for _ in range(1)]
        obs, rewards, terminals, truncations, infos = vecenv.step(np.zeros(4, int))
        assert sum(info["restarts"] for info in infos) == len(lost)
        cut = np.isin(np.arange(4), lost)
        assert truncations.tolist() == cut.tolist() and not terminals.any()
        assert rewards.tolist() == (~cut).astype(float).tolist()
        np.testing.assert_array_equal(obs[cut], got[0][0][cut])  # the last that was seen
        # The step after starts anew, with another seed, and then all goes on.
        obs, _, _, truncations, infos = vecenv.step(np.zeros(4, int))
        assert infos == [] and not truncations.any()
        assert obs[:, 1].tolist() == [0 if c else 3 for c in cut]
        assert (obs[cut, 0] != first[cut, 0]).all()
        assert vecenv.step(np.zeros(4, int))[0][:, 1].tolist() == [1 if c else 4 for c in cut]


@pytest.mark.parametrize(("how", "timeout"), [("kill", None), ("hang", 1.0)])
def test_a_worker_is_lost_with_its_shares_of_all_batches(how, timeout, tmp_path):
    """Batches by turns: environments 0 and 3 are one worker's, 1 and 4 another's, the rest here.

    In the second step of the second batch environment 3 fails, while environment 0 is done with
    its step of the first, and environment 1 is not.
    """
    env_kwargs = [{} for _ in range(6)]
    env_kwargs[1]["pause"] = 0.2
    env_kwargs[3] |= {"fault": (how, 2), "once": str(tmp_path / "fault")}
    told = []
    with vector.make(
        [Tick] * 6,
        env_kwargs=env_kwargs,
        **POOL | {"num_envs": 6, "num_workers": 3, "batch_size": 3, "local_worker": True},
        timeout=timeout,
        restart_failed=True,
    ) as vecenv:
        vecenv.async_reset(0)
        steps, rewards, truncations, firsts = (np.zeros((2, 6, 3)) for _ in range(4))
        for turn in range(12):
            obs, rewarded, _, truncated, infos, ids, _ = vecenv.recv()
            assert ids.tolist() == [[0, 1, 2], [3, 4, 5]][turn % 2]
            at = turn % 2, turn // 2
            firsts[at], steps[at] = obs.T
            rewards[at], truncations[at] = rewarded, truncated
            told += infos
            vecenv.send(np.zeros(3, int))
    assert told == [{"restarts": 1}] * 2
    assert steps[0].T.tolist() == [[0, 1, 2, 2, 0, 1], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert steps[1].T.tolist() == [[0, 1, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert [np.argwhere(x).tolist() for x in truncations] == [[[3, 0]], [[2, 0]]]
    # No reward for a step that nobody made, nor for a reset.
    assert [np.argwhere(x[1:, 0] == 0).ravel().tolist() for x in rewards] == [[2, 3], [1, 2]]
    assert all(len(set(firsts[batch, :, 0])) == 2 for batch in range(2))
    assert all(len(set(firsts[batch, :, i])) == 1 for batch in range(2) for i in (1, 2))


def test_restart_of_native_environments_and_in_reset(tmp_path):
    for fault, options in ((("raise", 2), {"num_envs": 2}), (("kill", 2), POOL | {"num_envs": 2})):
        with vector.make(
            [Native, Native], env_kwargs=[{}, {"fault": fault}], **options, restart_failed=True
        ) as vecenv:
            vecenv.reset(0)
            before = vecenv.step(np.zeros((4, 2), np.float32))[0].copy()
            obs, rewards, _, truncations, infos = vecenv.step(np.zeros((4, 2), np.float32))
            assert truncations.tolist() == [False, False, True, True] and not rewards[2:].any()
            assert (obs[2:] != before[2:]).all()  # of the new episode
            assert {"restarts": 1} in infos
            vecenv.step(np.zeros((4, 2), np.float32))
    for how, options in (("raise", {"num_envs": 4}), ("kill", POOL)):
        fault = third((how, "reset"), once=str(tmp_path / how))
        with vector.make(**fault, **options, restart_failed=True) as vecenv:
            obs, infos = vecenv.reset(3)
            assert len(set(obs[:, 0])) == 4 and not obs[:, 1].any()
            assert infos == [{"restarts": 1 if how == "raise" else 2}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 4}, "boom at 1"),
        (POOL, TOLD.format("stepping", 1)),
        (POOL | {"timeout": 0.3}, "after a restart, did not step within timeout=0.3 s"),
    ],
    ids=["serial", "raise", "hang"],
)
def test_what_fails_again_at_once_is_an_error(options, message):
    fault = third(("hang" if "timeout" in options else "raise", 1))
    vecenv = vector.make(**fault, **options, restart_failed=True)
    vecenv.reset(0)
    assert {"restarts": 2 if "timeout" in options else 1} in vecenv.step(np.zeros(4, int))[4]
    vecenv.step(np.zeros(4, int))  # the reset
    with pytest.raises((WorkerError, ValueError), match=message):
        vecenv.step(np.zeros(4, int))


class Again(Tick):
    """Fails in its second reset, at the end of an episode of two steps."""

    def __init__(self, **options):
        self.resets = 0
        super().__init__(length=2, **options)

    def _misbehave(self, when):
        self.resets += when == "reset"
        super()._misbehave("again" if when == "reset" and self.resets == 2 else when)


@pytest.mark.parametrize(
    ("how", "options", "lost"),
    [("raise", {"num_envs": 4}, [2]), ("raise", POOL, [2]), ("kill", POOL, [2, 3])],
    ids=["serial", "raise", "kill"],
)
def test_what_fails_while_it_is_renewed_is_restarted(how, options, lost, tmp_path):
    """Environment 3 takes three steps: in the first renewal its episode is not over."""
    kwargs = [{}, {}, {"fault": (how, "again"), "once": str(tmp_path / "once")}, {}]
    creators = [Again, Again, Again, partial(Tick, length=3)]
    with vector.make(creators, [()] * 4, kwargs, **options, restart_failed=True) as vecenv:
        before = vecenv.reset(0)[0].copy()
        vecenv.step(np.zeros(4, int))
        assert vecenv.renew()[4] == []
        last, _, terminals, *_ = vecenv.step(np.zeros(4, int))
        assert terminals.tolist() == [True, True, True, False] and last[3, 1] == 2
        obs, rewards, *flags, infos, _, _ = vecenv.renew()
        assert {"restarts": len(lost)} in infos and vecenv.info_sources[-1] == 2
        if how == "kill":  # the whole worker: the episode of its other environment is cut off
            assert flags[1].tolist() == [False, False, True, True] and not rewards[2:].any()
            np.testing.assert_array_equal(obs[3], [before[3, 0], 2])
            obs, rewards, *flags, infos, _, _ = vecenv.renew()
        assert not np.any(flags) and obs[lost, 1].tolist() == [0] * len(lost)
        assert (obs[lost, 0] != before[lost, 0]).all()  # with another seed
        assert vecenv.step(np.zeros(4, int))[0][:3, 1].tolist() == [1, 1, 1]
    kwargs[2] = {"fault": (how, "again")}
    vecenv = vector.make(creators, [()] * 4, kwargs, **options)
    vecenv.reset(0)
    vecenv.step(np.zeros(4, int))
    vecenv.step(np.zeros(4, int))
    with pytest.raises((WorkerError, ValueError), match=r"killed by signal 9|boom at again"):
        vecenv.renew()
    with pytest.raises(RuntimeError, match="closed"):
        vecenv.renew()


def test_a_worker_lost_while_a_function_is_called_is_an_error():
    vecenv = vector.make(Tick, **POOL, restart_failed=True)
    vecenv.reset(0)
    with pytest.raises(WorkerError, match=r"worker 1 .* was killed by signal 9"):
        vecenv.apply(lambda env: os.kill(os.getpid(), signal.SIGKILL), [2])
    with pytest.raises(RuntimeError, match="closed"):
        vecenv.apply(repr)


PARENT = """
import signal
import sys
import numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
sys.path.insert(0, {here!r})
from support.vector_envs import Tick
from puffer_jax import vector

kwargs = [{{}}, {{"fault": ({hang!r}, 2)}} if {hang!r} else {{}}]
vecenv = vector.make([Tick] * 2, env_kwargs=kwargs, num_envs=2, num_workers=2, overwork=True,
                     backend=vector.Multiprocessing)
vecenv.reset(0)
vecenv.step(np.zeros(2, int))
print(*vecenv.pids, flush=True)
{then}
"""
HERE = str(Path(__file__).parents[1])


@pytest.mark.parametrize("sign", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_with_the_parent_everything_ends(sign):
    """One worker sleeps, the other is in an endless loop; Ctrl-C goes to the whole group."""
    script = PARENT.format(here=HERE, hang="hang", then="vecenv.step(np.zeros(2, int))")
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    with parent, contextlib.ExitStack() as stack:
        stack.callback(parent.kill)
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        time.sleep(0.1)  # into the step
        os.killpg(parent.pid, getattr(signal, sign))
        _, errors = parent.communicate(timeout=30)
    assert parent.returncode == -getattr(signal, sign)
    assert errors.count("Traceback") == (sign == "SIGINT") and "Error" not in errors
    wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize(
    ("hang", "told"), [("fork-hang", True), (None, False)], ids=["hanging", "idle"]
)
def test_a_fork_of_the_parent_keeps_no_worker(hang, told):
    """Nor what the worker's environments have forked, if they did."""
    then = f"""
import time
from support.vector_envs import fork
fork(lambda: time.sleep(60), told={told})
print("forked", flush=True)
vecenv.step(np.zeros(2, int)) if {hang!r} else time.sleep(60)
"""
    script = PARENT.format(here=HERE, hang=hang, then=then)
    command = [sys.executable, "-c", script]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as parent,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(os.killpg, parent.pid, signal.SIGKILL)
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and parent.stdout.readline() == "forked\n"
        if hang:
            wait_until(lambda: children(pids[1]))
            pids += map(int, children(pids[1]))
        assert all(map(alive, pids))
        parent.kill()
        wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize(
    "then", ["", "raise SystemExit('left')", "import os; os._exit(0)", "del vecenv; print('gone')"]
)
def test_a_script_that_does_not_close(then):
    script = PARENT.format(here=HERE, hang=None, then=then)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    pids = [int(word) for word in result.stdout.splitlines()[0].split()]
    assert result.stderr.split() == (["left"] if "left" in then else [])
    wait_until(lambda: not any(map(alive, pids)))
