"""What stands around the trainer: loggers, dashboard, checkpoints, learning curves."""

import io
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from rich.console import Console

from puffer_jax.base.profile import Profile
from puffer_jax.run import checkpoint, dashboard, plot
from puffer_jax.run.dashboard import Dashboard, Snapshot, render
from puffer_jax.run.loggers import (
    JSONLLogger,
    Logger,
    MultiLogger,
    NoLogger,
    TensorBoardLogger,
    WandbLogger,
    new_run_id,
)

# --- loggers -------------------------------------------------------------------------------------


def test_run_ids_are_sortable_unique_and_safe_as_folder_names(monkeypatch):
    ids = [new_run_id() for _ in range(200)]
    assert len(set(ids)) == 200
    assert [i[:19] for i in ids] == sorted(i[:19] for i in ids)
    assert all(set(i) <= set("0123456789abcdef-") and len(i) == 26 for i in ids)
    assert NoLogger().run_id != NoLogger().run_id
    assert NoLogger("mine").run_id == "mine"
    for logger in (NoLogger(), MultiLogger([NoLogger()])):
        assert isinstance(logger, Logger)


def test_jsonl_is_strict_json_and_on_disk_at_once(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    logger = JSONLLogger(tmp_path / "runs" / "cartpole_seed3" / "log.jsonl")
    assert logger.run_id == "cartpole_seed3"
    assert JSONLLogger(tmp_path / "x.jsonl", run_id="other").run_id == "other"
    logs = {
        "a": np.float32(0.1),
        "nan": float("nan"),
        "inf": np.float64("-inf"),
        "n": np.int64(7),
        "j": jnp.float32(0.5),
        "flag": np.bool_(True),
        "none": None,
    }
    logger.log(logs, 64)
    logger.log({"a": 1e300}, 128)
    first, second = [
        json.loads(line, parse_constant=refuse) for line in logger.path.read_text().splitlines()
    ]
    assert first == {
        "step": 64,
        "a": float(np.float32(0.1)),
        "nan": None,
        "inf": None,
        "n": 7,
        "j": 0.5,
        "flag": True,
        "none": None,
    }
    assert second == {"step": 128, "a": 1e300}
    with pytest.raises(TypeError):
        logger.log({"a": object()}, 192)
    assert len(logger.path.read_text().splitlines()) == 2
    logger.close(None)
    with pytest.raises(ValueError, match="closed"):
        logger.log({"a": 1}, 256)


def test_jsonl_goes_on_after_a_killed_writer(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a": 0.')
    logger = JSONLLogger(path)
    logger.log({"a": 3.0}, 2)
    logger.close(None)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "a": 3.0}\n'


def test_jsonl_loses_nothing_when_killed(tmp_path):
    script = """
        import os, signal, sys
        from puffer_jax.loggers import JSONLLogger
        logger = JSONLLogger(sys.argv[1])
        for step in range(50):
            logger.log({"a": step / 3}, step)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "log.jsonl"
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], timeout=60)
    assert result.returncode == -9
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": step, "a": step / 3} for step in range(50)]


def test_tensorboard(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    logger = TensorBoardLogger(tmp_path / "run_a")
    assert logger.run_id == "run_a"
    logger.log({"environment/score": 1.5, "losses/entropy": np.float32(0.25)}, 64)
    logger.log({"environment/score": float("nan")}, 128)
    logger.close(tmp_path / "model.pt")
    data = next((tmp_path / "run_a").glob("events*")).read_bytes()
    found = []
    while data:  # length (8), its CRC (4), event, its CRC (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(v.tag, v.simple_value, event.step) for v in event.summary.value]
        data = data[16 + length :]
    assert found[:2] == [("environment/score", 1.5, 64), ("losses/entropy", 0.25, 64)]
    assert found[2][0] == "environment/score" and np.isnan(found[2][1]) and found[2][2] == 128


def test_wandb_offline(tmp_path):
    # A process of its own: wandb starts a server and handlers that outlive the run.
    script = """
        import sys
        from pathlib import Path
        from puffer_jax.loggers import WandbLogger
        folder = Path(sys.argv[1])
        (folder / "model.pt").write_bytes(b"weights")
        logger = WandbLogger("puffer", dir=sys.argv[1], config={"gamma": 0.5}, id="run-7")
        assert logger.run_id == "run-7", logger.run_id
        logger.log({"environment/score": 12.5}, 64)
        logger.log({"environment/score": 13.5}, 32)  # resumed from an earlier checkpoint
        logger.close(folder / "model.pt")
    """
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "HOME": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (record,) = tmp_path.glob("wandb/offline-run-*/run-run-7.wandb")
    data = record.read_bytes()
    assert b"environment/score" in data and b"12.5" in data and b"13.5" in data


def test_wandb_without_a_login(monkeypatch):
    wandb = SimpleNamespace(
        errors=SimpleNamespace(Error=LookupError),
        init=lambda **_: (_ for _ in ()).throw(LookupError("No API key configured.")),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(RuntimeError, match=r"^Weights & Biases: No API key.*WANDB_MODE=offline"):
        WandbLogger("puffer")


@pytest.mark.parametrize(
    "module, build",
    [("tensorboardX", TensorBoardLogger), ("wandb", WandbLogger)],
)
def test_missing_packages_say_how_to_get_them(monkeypatch, tmp_path, module, build):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {module}"):
        build(str(tmp_path))


class Recorder(NoLogger):
    def __init__(self, error=None):
        super().__init__()
        self.error, self.logged, self.closed = error, [], None

    def log(self, logs, step):
        if self.error:
            raise self.error
        self.logged.append((logs, step))

    def close(self, model_path):
        self.closed = model_path
        if self.error:
            raise self.error


def test_several_loggers():
    first, second = Recorder(), Recorder()
    logger = MultiLogger([first, second])
    assert logger.run_id == first.run_id
    logger.log({"a": 1.0}, 5)
    logger.close("m.pt")
    assert first.logged == second.logged == [({"a": 1.0}, 5)]
    assert first.closed == second.closed == "m.pt"
    with pytest.raises(ValueError, match="at least one"):
        MultiLogger([])


def test_a_failing_logger_is_heard_and_the_others_are_closed():
    full = OSError("no space left")
    good = Recorder()
    logger = MultiLogger([Recorder(full), good])
    with pytest.raises(OSError, match="no space left"):
        logger.log({"a": 1.0}, 5)
    with pytest.raises(OSError, match="no space left"):
        logger.close("m.pt")
    assert good.closed == "m.pt"
    with pytest.raises(ExceptionGroup) as caught:
        MultiLogger([Recorder(full), Recorder(ValueError("x")), good]).close("n.pt")
    assert [type(e) for e in caught.value.exceptions] == [OSError, ValueError]
    assert good.closed == "n.pt"


# --- profile and dashboard -----------------------------------------------------------------------


def test_profile(monkeypatch):
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr("puffer_jax.base.profile.perf_counter", lambda: now.time)
    profile = Profile()
    assert profile.seconds() == {}
    for _ in range(3):
        with profile("evaluate"):
            with profile("env"):
                now.time += 2
            now.time += 1
        with profile("train"):
            now.time += 4
            with profile("env"):
                now.time += 8
    with pytest.raises(KeyError), profile("train"):  # an error closes its phases
        now.time += 0.5
        with profile("env"):
            raise KeyError
    with profile("late"):
        now.time += 1
        assert profile.seconds()["late"] == 0  # only finished passes
    assert list(profile.seconds().items()) == [
        ("evaluate", 9.0),
        ("evaluate/env", 6.0),
        ("train", 36.5),
        ("train/env", 24.0),
        ("late", 1.0),
    ]


SNAPSHOT = Snapshot(
    env="CartPole-v1",
    params=17_411,
    steps=1_234_567,
    total_steps=10_000_000,
    sps=45_600.4,
    epoch=1207,
    uptime=3723.9,
    phases={"evaluate": 30.0, "evaluate/env": 20.0, "evaluate/forward": 9.9, "train": 90.0},
    losses={"policy_loss": -0.01234, "old_approx_kl": -1.5e-5, "explained_variance": np.nan},
    stats={
        "episode_return": np.float32(487.25),
        "episode_length": 12345,
        "name": "not a number",
        "episodes": [1, 2],
    },
    message="saved runs/x/model_001207.pt",
)


def drawn(snapshot, width=80):
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(render(snapshot))
    return console.export_text()


def test_the_dashboard_shows_the_numbers_in_80_columns():
    text = drawn(SNAPSHOT)
    assert max(map(len, text.splitlines())) <= 80
    rows = [" ".join(line.strip("│ ").split()) for line in text.splitlines()]
    expected = {
        "╭─ puffer_jax CartPole-v1 ─────────────────────────────────────────────────────╮",
        "params 17.4K evaluate 30s 25% policy_loss -0.012",
        "steps 1.2M / 10.0M env 20s 17% old_approx_kl -1.5e-05",
        "steps/s 45.6K forward 9s 8% explained_variance nan",
        "epoch 1,207 train 1m 30s 75%",
        "uptime 1h 02m",
        "remaining 3m 12s",
        "episode_return 487.250 episode_length 12,345",
        "saved runs/x/model_001207.pt",
    }
    assert expected <= set(rows)
    assert "not a number" not in text and "episodes " not in text


def test_the_dashboard_survives_what_it_is_given():
    wild = Snapshot(
        env="a[bold]very[/]-long-environment-name-v12",
        params=0,
        steps=0,
        total_steps=0,
        sps=0.0,
        epoch=0,
        uptime=0.0,
        phases={"evaluate": 0.0},
        losses={"a_loss_with_quite_a_long_name_indeed": 1e300},
        stats={f"agent/[red]statistic_number_{i}_of_many": -1e9 * i for i in range(45)},
        message="[/nothing] " + "x" * 200,
        utilization={"CPU": 99.6, "RAM": 3.0},
    )
    for width in (200, 60, 20, 3, 80):
        text = drawn(wild, width)
        assert max(map(len, text.splitlines())) <= width
    assert "a[bold]very[/]" in text and "[/nothing]" in text  # not taken for markup
    assert "CPU 100%  RAM 3%" in text
    assert "remaining" in text and "?" in text and "1.0e+300" in text
    # Names are whole, in two columns where there is room.
    assert "a_loss_with_quite_a_long_name_indeed" in text and "…" not in text
    assert "and 30 more" in text and "[red]statistic_number_14_of_many" in text
    assert "statistic_number_15" not in text
    assert len(text.splitlines()) < 40
    wide = drawn(wild, 120)
    assert "and 15 more" in wide and "[red]statistic_number_29_of_many" in wide
    assert "a_loss_with_quite_a_long_name_indeed" in wide
    narrow = "".join(line.strip("│ ") for line in drawn(wild, 30).splitlines())
    assert "agent/[red]statistic_number_0_of_many" in narrow


def test_a_terminal_of_another_size_is_cleared(monkeypatch):
    """One that has broken the old picture's lines shows more of them than are drawn over."""
    monkeypatch.setitem(sys.modules, "psutil", None)
    file = io.StringIO()
    console = Console(file=file, width=80, height=30, force_terminal=True)
    cleared = "\x1b[2J\x1b[H"

    def written():
        text = file.getvalue()
        file.seek(0)
        file.truncate()
        return text

    with Dashboard(console, force=True) as board:
        for width, height, again in ((80, 30, False), (60, 30, True), (60, 30, False)):
            console.size = (width, height)
            board.update(SNAPSHOT)
            assert (cleared in written()) == again
        console.size = (60, 20)
        board.update(SNAPSHOT)
        assert written().startswith(cleared)
        console.size = (90, 20)
    last = written()
    assert last.startswith(cleared) and "1,207" in last


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (0.4, "0"),
        (999, "999"),
        (1000, "1.0K"),
        (999_949, "999.9K"),
        (999_950, "1.0M"),
        (2e9, "2.0B"),
        (3e16, "30000.0T"),
    ],
)
def test_counts(number, text):
    assert dashboard._count(number) == text


def test_the_dashboard_draws_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Dashboard() as quiet:
        quiet.update(SNAPSHOT)
    assert capsys.readouterr().out == ""

    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True)
    with Dashboard(console, force=True) as board:
        board.update(SNAPSHOT)
        assert "CartPole-v1" in file.getvalue() and "\x1b[?25l" in file.getvalue()
        board.update(SNAPSHOT)
        assert "\x1b[?25h" not in file.getvalue()
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1
    assert "CPU" in file.getvalue()  # psutil is there

    monkeypatch.setitem(sys.modules, "psutil", None)
    file.truncate(0)
    with Dashboard(console, force=True) as board:
        board.update(SNAPSHOT)
    assert "CartPole-v1" in file.getvalue() and "CPU" not in file.getvalue()


# --- checkpoints ---------------------------------------------------------------------------------


class Policy(nnx.Module):
    def __init__(self, value=0.0):
        self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.ones)
        self.layer.bias[...] = jnp.full(2, value, jnp.float32)


@pytest.fixture(scope="module")
def policy():
    return Policy(0.5)


class Moments(NamedTuple):
    mu: dict
    count: object


def full_state():
    rng = np.random.default_rng(0)
    special = np.array([np.nan, -0.0, np.inf, np.finfo(np.float64).tiny / 2, 1 / 3])
    return {
        "float64": jnp.asarray(special),
        "float32": jnp.asarray(special, jnp.float32),
        "bfloat16": jnp.asarray(special, jnp.bfloat16),
        "optimizer": (Moments({"w": jnp.asarray(rng.normal(size=(3, 4)))}, jnp.int32(7)), ()),
        "int64": jnp.asarray([2**62, -1]),
        "uint8": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "bool": jnp.asarray([[True], [False]]),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="unsafe_rbg"), 3),
        "no keys": jax.random.split(jax.random.key(4), 3)[:0],
        "empty": jnp.zeros((0, 5), jnp.float32),
        "numpy": np.float32(0.1),
        "python": [3, -(2**63), 0.1, float("nan"), True, None],
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def files(run):
    return sorted(path.name for path in run.iterdir())


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, policy, capfd, caplog):
    run = tmp_path / "runs" / "a"
    assert checkpoint.latest(run) is None
    state, metadata = full_state(), {"config": {"gamma": 0.1, "env": "x"}, "global_step": 2**60}
    path = checkpoint.save(run, 12, policy, state, metadata)
    assert path == run / "model_000012.pt"
    assert files(run) == ["model_000012.pt", "state_000012"]
    assert checkpoint.latest(run) == 12

    restored, found = checkpoint.restore(run, state)
    assert_same(restored, state)
    assert found == metadata

    # PufferLib's own way of reading it.
    weights = torch.load(path, weights_only=True)
    assert list(weights) == ["layer.weight", "layer.bias"]
    assert weights["layer.bias"].tolist() == [0.5, 0.5]
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_shapes_and_dtypes_are_enough_to_restore(tmp_path, policy):
    state = {"key": jax.random.key(1, impl="rbg"), "w": jnp.ones(3), "none": jnp.zeros((0, 2))}
    checkpoint.save(tmp_path, 0, policy, state, {})
    restored, _ = checkpoint.restore(tmp_path, jax.eval_shape(lambda: state))
    assert_same(restored, state)
    # What comes back is JAX's own memory, to be donated, on the devices asked for.
    assert not restored["w"].committed
    committed = state | {"w": jax.device_put(state["w"], jax.devices()[0])}
    assert checkpoint.restore(tmp_path, committed)[0]["w"].committed


def test_misfits_are_all_named(tmp_path, policy):
    state = {"a": jnp.ones((2, 3)), "b": [jnp.ones(2), 1], "c": jnp.ones(1), "k": jax.random.key(0)}
    checkpoint.save(tmp_path, 3, policy, state, {})
    like = {
        "a": jnp.ones((3, 2)),
        "b": [jnp.ones(2, jnp.float32), 1.0],
        "d": jnp.ones(4, jnp.int8),
        "k": jax.random.key(0, impl="rbg"),
    }
    with pytest.raises(ValueError) as caught:
        checkpoint.restore(tmp_path, like)
    assert str(caught.value) == (
        f"{tmp_path / 'state_000003'} does not fit: missing in the checkpoint: ['d'] int8(4,); "
        "only in the checkpoint: ['c'] float64(1,); different: "
        "['a'] is float64(2, 3) in the checkpoint, not float64(3, 2), "
        "['b'][0] is float64(2,) in the checkpoint, not float32(2,), "
        "['b'][1] is Python int in the checkpoint, not Python float, "
        "['k'] is key<fry>() in the checkpoint, not key<rbg>()"
    )


def test_what_is_not_there_is_said(tmp_path, policy):
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint state_\* in .*none"):
        checkpoint.restore(tmp_path / "none", {})
    checkpoint.save(tmp_path, 3, policy, {"a": 1}, {})
    with pytest.raises(FileNotFoundError, match=r"state_000004 in .*epochs: \[3\]"):
        checkpoint.restore(tmp_path, {"a": 0}, epoch=4)
    assert checkpoint.restore(tmp_path, {"a": 0}, epoch=3) == ({"a": 1}, {})


def test_bad_states_are_refused_before_anything_is_written(tmp_path, policy):
    run = tmp_path / "run"
    for state, message in [
        ({"a": "text"}, r"\['a'\] is str"),
        ({"a": np.array(["x"])}, r"\['a'\] is an array of <U1"),
        ({"a": np.array([object()])}, r"\['a'\] is an array of object"),
        ({"a": 2**63}, r"\['a'\]: 9223372036854775808 does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            checkpoint.save(run, 1, policy, state, {})
    with pytest.raises(TypeError, match="JSON"):
        checkpoint.save(run, 1, policy, {}, {"a": object()})
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.save(run, 1, policy, {}, {}, keep=0)
    with pytest.raises(ValueError, match="epoch is -1"):
        checkpoint.save(run, -1, policy, {}, {})
    assert not run.exists()


def test_the_last_ones_are_kept(tmp_path, policy):
    (tmp_path / "model_best.pt").write_bytes(b"mine")
    (tmp_path / "state_notes").mkdir()
    for epoch in (1, 2, 999_999, 1_000_000):
        checkpoint.save(tmp_path, epoch, policy, {"a": epoch}, {}, keep=2)
    kept = ["model_1000000.pt", "model_999999.pt", "state_1000000", "state_999999"]
    assert files(tmp_path) == sorted([*kept, "model_best.pt", "state_notes"])
    assert checkpoint.latest(tmp_path) == 1_000_000

    # From an older checkpoint on: the new one is kept, and later ones are not ours to delete.
    checkpoint.save(tmp_path, 5, policy, {"a": 5}, {}, keep=1)
    assert checkpoint.latest(tmp_path) == 1_000_000
    assert checkpoint.restore(tmp_path, {"a": 0}, epoch=5)[0] == {"a": 5}


def test_an_epoch_saved_again_is_replaced(tmp_path, policy):
    checkpoint.save(tmp_path, 4, policy, {"a": 1}, {"try": 1})
    checkpoint.save(tmp_path, 4, Policy(2.0), {"a": 2, "b": 3.0}, {"try": 2})
    assert checkpoint.restore(tmp_path, {"a": 0, "b": 0.0}) == ({"a": 2, "b": 3.0}, {"try": 2})
    assert torch.load(tmp_path / "model_000004.pt")["layer.bias"].tolist() == [2.0, 2.0]
    assert files(tmp_path) == ["model_000004.pt", "state_000004"]


def test_without_torch_and_without_orbax(tmp_path, policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert checkpoint.save(tmp_path, 1, policy, {}, {}).name == "model_000001.safetensors"
    checkpoint.save(tmp_path, 2, policy, {"a": 1}, {}, keep=1)
    assert files(tmp_path) == ["model_000002.safetensors", "state_000002"]
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="pip install orbax-checkpoint"):
        checkpoint.save(tmp_path, 3, policy, {}, {})
    assert files(tmp_path) == ["model_000002.safetensors", "state_000002"]


def test_another_format_is_refused(tmp_path, policy, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FORMAT", 99)
    checkpoint.save(tmp_path, 1, policy, {"a": 1}, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 99; this version reads 1"):
        checkpoint.restore(tmp_path, {"a": 1})


def test_litter_is_invisible_and_swept(tmp_path, policy):
    litter = [
        ".state_000009.orbax-checkpoint-tmp",
        ".state_000009",
        ".state_000001.old",
        "state_000009.txt",
        ".state_mine",
    ]
    for name in litter:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"x")
    (tmp_path / ".model_000009.pt.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / "state_000010").write_bytes(b"a file")
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 2, policy, {"a": 1}, {})
    assert checkpoint.latest(tmp_path) == 2
    left = [".state_mine", "state_000009.txt", "state_000010"]
    assert files(tmp_path) == sorted([*left, "model_000002.pt", "state_000002"])


# Forks before JAX has threads; each child goes on saving until it is killed.
KILLS = """
    import os, random, shutil, signal, sys, time
    from pathlib import Path
    import numpy as np, orbax.checkpoint, torch
    from puffer_jax.run import checkpoint

    def save_for_ever(run, ready):
        # The model's weights are not what is tested; building a policy would take most of the time.
        checkpoint.save_weights = lambda policy, path: path.write_bytes(b"weights")
        epoch = (checkpoint.latest(run) or 0) + 1
        while True:
            state = {str(i): np.full((40, 50), epoch + i / 10) for i in range(10)}
            checkpoint.save(run, epoch, None, state, {"epoch": epoch}, keep=2)
            os.write(ready, b".")
            epoch += 1

    folder, moments = Path(sys.argv[1]), random.Random(0)
    for kill in range(10):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(folder / "run", write)
        os.close(write)
        assert os.read(read, 1) == b"."
        time.sleep(moments.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        os.close(read)
        shutil.copytree(folder / "run", folder / f"killed{kill}")
"""


def test_killed_at_any_moment_the_last_checkpoint_is_whole(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLS), tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    like = {str(i): np.zeros((40, 50)) for i in range(10)}
    last, unfinished = 0, 0
    for kill in range(10):
        run = tmp_path / f"killed{kill}"
        found = sorted(checkpoint._epochs(run))
        assert 1 <= len(found) <= 3 and found[-1] > last  # three: killed while deleting
        last = found[-1]
        for epoch in found:
            state, metadata = checkpoint.restore(run, like, epoch)
            assert metadata == {"epoch": epoch}
            assert all((state[str(i)] == epoch + i / 10).all() for i in range(10))
        assert (run / f"model_{last:06d}.pt").read_bytes() == b"weights"
        unfinished += any(name.startswith(".") for name in files(run))
    assert unfinished > 0


# --- learning curves -----------------------------------------------------------------------------


def write_run(folder, rows, tail=""):
    folder.mkdir(parents=True)
    lines = [
        {"agent_steps": step, "uptime": seconds, "environment/episode_return": score, "SPS": 1.0}
        for step, seconds, score in rows
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + tail)
    return folder


def test_curves(tmp_path, monkeypatch):
    first = write_run(tmp_path / "lstm_seed1", [(0, 0.5, 1.0), (100, 1.5, 3.0)], '{"agent_st')
    second = write_run(
        tmp_path / "lstm_seed2", [(0, 1, 3.0), (50, 2, None), (100, 3, 7.0), (200, 5, 9.0)]
    )
    alone = write_run(tmp_path / "mlp-s1", [(0, 0.0, 0.0), (300, 6.0, 8.0)])
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    out = tmp_path / "plots" / "curves.png"
    assert plot.plot_runs([first, second, alone], out) == out
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    by_steps, by_time = drawn[0].axes
    assert (by_steps.get_xlabel(), by_time.get_xlabel()) == ("agent steps", "wall time (s)")
    assert by_steps.get_ylabel() == "episode return"
    lstm, mlp = by_steps.get_lines()
    assert lstm.get_label() == "lstm (mean and range of 2 runs)" and mlp.get_label() == "mlp"
    np.testing.assert_array_equal(lstm.get_xydata(), [(0, 2), (100, 5), (200, 9)])
    np.testing.assert_array_equal(mlp.get_xydata(), [(0, 0), (300, 8)])
    (band,) = by_steps.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert {(0, 1), (0, 3), (100, 3), (100, 7), (200, 9)} == corners
    assert [t.get_text() for t in by_steps.get_legend().get_texts()] == [
        "lstm (mean and range of 2 runs)",
        "mlp",
    ]
    np.testing.assert_array_equal(
        by_time.get_lines()[0].get_xydata(), [(0.5, 1), (1, 2.5), (1.5, 3.5), (3, 7), (5, 9)]
    )


def test_a_resumed_run_is_one_curve(tmp_path):
    run = write_run(
        tmp_path / "a", [(10, 4, 1.0), (20, 5, 2.0), (30, 6, 3.0), (20, 1, 2.0), (30, 2, 4.0)]
    )
    found = plot.curve(run, "environment/episode_return")
    assert found["agent_steps"].tolist() == [10, 20, 20, 30]
    assert found["uptime"].tolist() == [4, 5, 6, 7]
    assert found["environment/episode_return"].tolist() == [1, 2, 2, 4]


def test_what_cannot_be_drawn_is_said(tmp_path):
    out = tmp_path / "x.png"
    run = write_run(tmp_path / "a", [(1, 1, None), (2, 2, None)])
    with pytest.raises(ValueError, match="no metric 'environment/episode_return'; there are: SPS,"):
        plot.plot_runs([run], out)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot.plot_runs([tmp_path / "nowhere"], out)
    with pytest.raises(ValueError, match="no runs"):
        plot.plot_runs([], out)
    broken = write_run(tmp_path / "b", [(1, 1, 1.0)], '{"agent\n{"agent_steps": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        plot.plot_runs([broken], out)
    other = write_run(tmp_path / "c", [], '{"a": 1}\n')
    with pytest.raises(ValueError, match="no agent_steps or no uptime"):
        plot.plot_runs([other], out)
    good = write_run(tmp_path / "d", [(1, 1, 1.0)])
    with pytest.raises(ValueError, match="not supported"):
        plot.plot_runs([good], tmp_path / "x.nonsense")
    assert not out.exists() and not list(tmp_path.glob("*.nonsense"))


def test_log_and_plot_fit_together(tmp_path):
    logger = JSONLLogger(tmp_path / "run" / "log.jsonl")
    for step in (64, 128):
        logs = {"agent_steps": step, "uptime": step / 64, "environment/score": np.float32(step)}
        logger.log(logs | {"losses/x": float("nan")}, step)
    found = plot.curve(tmp_path / "run", "environment/score")
    assert {k: v.tolist() for k, v in found.items()} == {
        "agent_steps": [64, 128],
        "uptime": [1, 2],
        "environment/score": [64, 128],
    }


# --- imports -------------------------------------------------------------------------------------


def test_heavy_things_come_when_needed():
    script = """
        import sys
        import puffer_jax.run.loggers, puffer_jax.run.dashboard
        assert not {"jax", "torch", "wandb", "tensorboardX", "psutil"} & set(sys.modules)
        import puffer_jax.checkpoint, puffer_jax.plot
        assert not {"torch", "orbax.checkpoint", "matplotlib", "psutil"} & set(sys.modules)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
