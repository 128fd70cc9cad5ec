"""`Ray` on a cluster of two nodes on this machine: the same trajectories, and what is lost."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from support.vector_envs import Pair, Tick, Walk
from test_vector import play, play_renewed, same, same_rows

from puffer_jax import vector
from puffer_jax.vector import pool
from puffer_jax.vector.protocol import WorkerError

POOL = {"backend": "Ray", "num_envs": 4, "num_workers": 2}


@pytest.fixture(scope="module")
def cluster():
    """Two raylets of one core each, so that two workers are on both."""
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    second = cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()


def test_ray_plays_the_same_thousand_steps(cluster):
    with vector.make(Pair, num_envs=4) as vecenv:
        expected = play(vecenv, 1000)
    with vector.make(Pair, **POOL) as vecenv:
        same(play(vecenv, 1000), expected)
    with vector.make(Pair, **POOL, batch_size=2, sync_traj=False) as vecenv:
        same(play(vecenv, 50), [[field[:50] for field in expected[0]], None], infos=False)
    assert ray.is_initialized()  # it was before


def test_ray_renews_and_calls_functions(cluster):
    with vector.make(Walk, num_envs=4) as vecenv:
        expected, infos = play_renewed(vecenv, 50)
    with vector.make(Walk, **POOL) as vecenv:
        rows, told = play_renewed(vecenv, 50)
        same_rows(rows, expected)
        assert told == infos and infos
        places = vecenv.apply(lambda env: env.env.place, [3, 1])
        np.testing.assert_array_equal(places[0], vecenv.apply(lambda env: env.env.place)[3])


def test_failures(cluster, tmp_path):
    def fails(how, **options):
        kwargs = [{}, {}, {"fault": (how, 2), **options.pop("env", {})}, {}]
        return vector.make([Tick] * 4, env_kwargs=kwargs, **POOL, **options)

    def run(vecenv):
        vecenv.reset(0)
        return [[np.array(a) for a in vecenv.step(np.zeros(4, int))] for _ in range(3)]

    for how, options, message in (
        ("raise", {}, r"worker 1 .* failed stepping environment 2: ValueError: boom at 2"),
        ("kill", {}, r"worker 1 \(environments 2 to 3\) was lost: The actor died"),
        ("hang", {"timeout": 1.0}, r"worker 1 .* did not step within timeout=1.0 s"),
    ):
        vecenv = fails(how, **options)
        with pytest.raises(WorkerError, match=message):
            run(vecenv)
        with pytest.raises(RuntimeError, match="this Ray is closed"):
            vecenv.reset()
    once = {"once": str(tmp_path / "fault")}
    with fails("kill", env=once, restart_failed=True) as vecenv:
        _, (*_, truncations, infos), (obs, *_) = run(vecenv)
        assert truncations.tolist() == [False, False, True, True]
        assert infos.tolist() == [{"restarts": 2}]
        assert obs[:, 1].tolist() == [3, 3, 0, 0]
    with pytest.raises(ValueError, match="num_workers is 4, but there are 2 cores"):
        vector.make(Tick, **POOL | {"num_workers": 4})
    with pytest.raises(WorkerError, match="failed making environment 3: ValueError: boom at make"):
        made = [{}, {}, {}, {"fault": ("raise", "make")}]
        vector.make([Tick] * 4, env_kwargs=made, **POOL)


def test_a_full_cluster(cluster, monkeypatch):
    with vector.make(Tick, **POOL):
        monkeypatch.setattr(pool, "PATIENCE", 2.0)
        with pytest.raises(WorkerError, match=r"worker \d .* did not start within 2 s"):
            vector.make(Tick, **POOL)


def test_a_training_on_workers_of_the_cluster(cluster, tmp_path, monkeypatch, capsys):
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(examples)
    small = {"steps": 512, "num-envs": 4, "horizon": 16, "data-dir": tmp_path}
    options = [word for name, x in small.items() for word in (f"--train.{name}", str(x))]
    monkeypatch.setattr(sys, "argv", ["train_ray.py", "--workers", "2", *options])
    runpy.run_path(str(examples / "train_ray.py"), run_name="__main__")
    assert "2 workers: return" in capsys.readouterr().out
    assert (tmp_path / "multihost_seed0.pt").exists()
    monkeypatch.setattr(sys, "argv", ["train_ray.py", "--workers", "3", *options])
    with pytest.raises(SystemExit, match="3 workers need a core each; the cluster has 2"):
        runpy.run_path(str(examples / "train_ray.py"), run_name="__main__")


def test_a_lost_node(cluster):
    """The last test: it takes a node away."""
    cluster, second = cluster
    with vector.make(Tick, **POOL) as vecenv:
        vecenv.reset(0)
        vecenv.step(np.zeros(4, int))
        cluster.remove_node(second, allow_graceful=False)
        with pytest.raises(WorkerError, match=r"worker \d \(environments . to .\) was lost"):
            for _ in range(1000):
                vecenv.step(np.zeros(4, int))
