"""The bench on tiny rows: what it compares, computes and writes. Nothing here asserts a time."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from puffer_jax.bench import command, jax_side, report, torch_side
from puffer_jax.bench.rows import Row, network_flops, observations, rows
from puffer_jax.bench.worker import Failed, Worker, difference
from puffer_jax.cli.command import main

BOTH = {"ours": {}, "torch": {}}
ADVANTAGE = Row("advantage", "a few", "advantage", BOTH, {"segments": 8, "horizon": 4}, flops=1e3)


@pytest.fixture
def tiny(monkeypatch):
    """Rows in the place of the real ones, and a product of matrices that takes no second."""
    monkeypatch.setattr(command, "_MATMUL", 256)

    def replace(*given):
        monkeypatch.setattr(command, "rows", lambda: iter(given))

    return replace


def bench(tmp_path, capsys, *more):
    """Exit code, what is printed, and the JSON."""
    path = tmp_path / "bench.json"
    code = main(["bench", "--seconds", "0.05", "--threads", "1", "--json", str(path), *more])
    return code, capsys.readouterr(), json.loads(path.read_text())


def test_a_run(tiny, tmp_path, capsys):
    sizes = {"net": "lstm", "lead": (4, 3), "shape": (5,), "hidden": 8, "backward": True}
    more = {"ours, done": {"done": True}, "nnx.RNN": {"plain": True}}
    tiny(
        ADVANTAGE,
        Row("eval", "one step", "evaluate", BOTH, {"net": "lstm", "batch": 2}),
        Row("train", "a gradient", "train", BOTH | more, sizes),
        Row("memory", "of it", "train", BOTH, sizes, unit="bytes"),
        Row(
            "steps",
            "cheap ones",
            "emulation",
            {"ours": {}, "pufferlib": {}},
            {"kind": "box"},
            unit="steps/s",
        ),
    )
    plot = tmp_path / "bench.png"
    code, printed, found = bench(tmp_path, capsys, "--plot", str(plot))
    assert code == 0, printed
    assert plot.read_bytes().startswith(b"\x89PNG")

    header = found["header"]
    assert header["threads"] == 1 and header["device"] == "cpu"
    assert header["jax"] == jax.__version__ and header["pufferlib-core"] == "3.0.23"
    assert all(rate > 1e8 for rate in header["matmul_flops"].values())
    assert list(found["rows"]) == ["advantage", "eval", "train", "memory", "steps"]
    for name, row in found["rows"].items():
        contestants = row["contestants"]
        ours, judge = contestants["ours"], contestants.get("torch") or contestants["pufferlib"]
        assert row["mismatch"] is None and not any(c["failed"] for c in contestants.values())
        rounds = len(ours["samples"])
        assert rounds == 1 if name == "memory" else rounds >= 3
        assert all(len(c["samples"]) == rounds for c in contestants.values())
        for c in contestants.values():
            assert min(c["samples"]) > 0 and c["first_call_s"] > 0
            assert c["median"] == np.median(c["samples"])
        ratio = row["ratios"]["torch" if "torch" in contestants else "pufferlib"]
        assert ratio["median"] == pytest.approx(judge["median"] / ours["median"])
        assert ratio["quartiles"] == sorted(ratio["quartiles"])
    assert set(found["rows"]["train"]["ratios"]) == {"torch", "ours, done", "nnx.RNN"}
    # A process with a framework in it is no smaller than this, nor larger.
    assert all(50e6 < c["median"] < 5e9 for c in found["rows"]["memory"]["contestants"].values())
    ours = found["rows"]["advantage"]["contestants"]["ours"]
    assert ours["flops_per_s"] == pytest.approx(1e3 / ours["median"])
    for word in ("threads: 1", "a gradient", "nnx.RNN", "K/s", "MiB"):
        assert word in printed.out


def test_what_differs_or_fails_is_named_and_the_rest_goes_on(tiny, tmp_path, capsys):
    sizes = {"net": "default", "lead": (2,), "shape": (3,), "backward": False}
    hidden = {"ours": {"hidden": 4}, "torch": {"hidden": 5}}
    failing = {"ours": {}, "torch": {"nonsense": 1}}
    tiny(
        Row("wrong", "two functions", "train", hidden, sizes),
        Row("broken", "no such argument", "advantage", failing, ADVANTAGE.sizes),
        ADVANTAGE,
    )
    code, printed, found = bench(tmp_path, capsys)
    assert code == 1
    wrong, broken, good = found["rows"].values()
    assert "ours and torch differ" in wrong["mismatch"]
    assert not any("samples" in c for c in wrong["contestants"].values())
    assert "nonsense" in broken["contestants"]["torch"]["failed"]
    assert broken["contestants"]["ours"]["samples"] and not broken["ratios"]
    assert good["ratios"]["torch"]["median"] > 0
    assert "wrong: not timed: ours and torch differ in" in printed.out
    assert "broken, torch: TypeError" in printed.out


def test_without_the_reference_ours_is_measured_alone(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "missing_reference", lambda: "torch")
    tiny(ADVANTAGE)
    code, printed, found = bench(tmp_path, capsys)
    assert code == 0
    row = found["rows"]["advantage"]
    assert list(row["contestants"]) == ["ours"] and row["ratios"] == {}
    assert row["contestants"]["ours"]["median"] > 0 and "torch" not in found["header"]
    assert "torch is not installed" in printed.out and "pufferlib-core==3.0.23" in printed.out


def test_what_is_missing_is_named(monkeypatch):
    find = command.importlib.util.find_spec
    assert command.missing_reference() is None
    monkeypatch.setattr(
        command.importlib.util,
        "find_spec",
        lambda name: None if name == "pufferlib" else find(name),
    )
    assert command.missing_reference() == "pufferlib"


def test_list_and_patterns(capsys):
    assert main(["bench", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [row.name for row in rows()] and len(set(names)) == len(names)
    assert main(["bench", "--list", "--rows", "eval-lstm-*", "advantage*"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [f"eval-lstm-{n}" for n in (1, 8, 64, 512, 4096)] + ["advantage-4096x64"]
    assert main(["bench", "--rows", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert main(["bench", "--seconds", "0"]) == 2
    assert "both must be positive" in capsys.readouterr().err


@pytest.mark.parametrize("cost, rounds", [(1 / 16, 17), (1 / 4, 9), (1, 6), (4, 3)])
def test_slow_rows_have_fewer_rounds_and_at_least_three(monkeypatch, cost, rounds):
    clock = [0.0]

    class Contestant(Worker):
        def __init__(self):
            pass

        def ask(self, method, *arguments):
            clock[0] += cost / 2
            return cost / 2

    monkeypatch.setattr(command, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    result = report.Result(ADVANTAGE, {name: report.Measured() for name in BOTH})
    arena = command.Arena(1, "cpu", "float32", reference=True)
    arena._rounds(result, dict.fromkeys(BOTH, Contestant()), seconds=1.0)
    assert [len(one.samples) for one in result.measured.values()] == [rounds, rounds]


def test_difference():
    here = {"a": np.array([1.0, 2.0]), "b": np.array([4.0])}
    assert difference(here, {"a": np.array([1.0, 2.5]), "c": here["b"]}) == (0.2, "a")
    assert difference(here, {"c": here["a"]})[0] == math.inf
    assert difference(here, {"b": np.array([math.nan])}) == (math.inf, "b")
    assert difference(here, {"b": np.array([4.0, 4.0])}) == (math.inf, "b")


def test_ratios():
    result = report.Result(ADVANTAGE)
    result.measured["ours"] = report.Measured([1.0, 2.0, 4.0, 2.0])
    result.measured["torch"] = report.Measured([2.0, 2.0, 16.0, 6.0])
    # Medians 2 and 4; side by side 2, 1, 4 and 3 times.
    assert result.ratio("torch") == (2.0, 1.75, 3.25)
    result.measured["torch.compile"] = report.Measured(failed="no compiler")
    assert result.ratio("torch.compile") is None
    assert report.problems([result]) == ["advantage, torch.compile: no compiler"]


@pytest.mark.parametrize(
    ("net", "shape", "hidden", "actions"),
    [
        ("default", (4,), 128, 2),
        ("lstm", (64,), 128, 2),
        ("mingru", (64,), 128, 2),
        ("naturecnn", (4, 84, 84), 0, 6),
        ("resnet", (64, 64, 3), 0, 6),
    ],
)
def test_operations_are_those_that_torch_counts(net, shape, hidden, actions):
    policy = torch_side._policy(net, shape, hidden, actions)
    obs = torch.from_numpy(observations((8, *shape)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if net == "lstm":
            policy.forward_eval(obs, {"lstm_h": torch.zeros(8, 128), "lstm_c": torch.zeros(8, 128)})
        elif net == "mingru":
            policy(obs[:, None])
        else:
            policy(obs)
    assert 8 * network_flops(net, shape[0], hidden, actions) == counter.get_total_flops()


def test_a_process_that_dies_is_an_error():
    worker = Worker("jax", 1, "cpu", "float32")
    with pytest.raises(Failed, match="AttributeError"):
        worker.ask("open", "x", "no_such_family", {})
    worker._process.kill()
    with pytest.raises(Failed, match="exit code -9"):
        worker.ask("sample", "x")
    assert not worker.alive
    worker.close()


def test_a_process_loads_no_framework_but_its_own():
    code = "import sys, puffer_jax.bench.worker; print({'jax', 'torch', 'tyro'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_the_mingru_rows_compare_one_function():
    """Ours and the original's log space, which a row would refuse to time if they differed."""
    sizes = {"net": "mingru", "lead": (2, 5), "shape": (3,), "hidden": 8, "backward": True}
    found, expected = (
        case.outputs(case.call())
        for case in (jax_side.train(**sizes), torch_side.train(**sizes))
        if case.outputs
    )
    assert set(found) == set(expected)
    worst, name = difference(found, expected)
    assert worst < 1e-5, name  # float32's rounding, a hundred times; log space has a few of them


def test_a_gpu_that_is_not_there_is_named():
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    with pytest.raises(Failed, match=r"JAX finds no gpu here.*cuda12"):
        Worker("jax", 1, "gpu", "float32")
