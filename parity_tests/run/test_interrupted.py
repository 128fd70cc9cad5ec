"""Whatever fails or interrupts a run, what its last finished update left is whole and goes on."""

import fcntl
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import puffer_jax
from puffer_jax import NoLogger, PuffeRLConfig
from puffer_jax.base.spaces import Box, Discrete
from puffer_jax.environments.jax_native import as_jax_env
from puffer_jax.nn.params import split
from puffer_jax.ppo.jax_rollout import JaxSource
from puffer_jax.run.trainer import NonFiniteError, PuffeRL

pytestmark = pytest.mark.usefixtures("quick")


@dataclass(frozen=True)
class Clock:
    """Counts steps and shows two numbers, the second always 0; episodes have `length` steps."""

    length: int = 1_000_000
    reward: object = field(default=lambda time: time.astype(jnp.float32) % 3)

    observation_space: ClassVar = Box(-np.inf, np.inf, (2,))
    action_space: ClassVar = Discrete(2)

    def reset(self, key):
        return jnp.zeros(2, jnp.float32), jnp.int32(0)

    def step(self, key, time, action):
        reward = self.reward(time)
        obs = jnp.stack([jnp.sin(time + 1.0), 0.0]).astype(jnp.float32)
        no = jnp.bool_(False)
        return obs, time + 1, reward, time + 1 == self.length, no, {}


SIZES = {"num_envs": 2, "bptt_horizon": 4, "total_timesteps": 80, "checkpoint_interval": 100}


def build(folder, env=None, logger=None, **changes):
    config = PuffeRLConfig.from_dict({**SIZES, "data_dir": folder, **changes})
    env = Clock() if env is None else env
    policy = puffer_jax.Default(env, hidden_size=4, rngs=nnx.Rngs(0))
    return PuffeRL(config, env, policy, logger)


def saved(trainer):
    data = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        trainer.loop.saved(),
    )
    return data, trainer.global_step


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, saved(a), saved(b))


def test_a_run_stopped_by_a_nan_goes_on(tmp_path):
    env = Clock(reward=lambda time: jnp.where(time == 9, jnp.nan, 1.0))
    trainer = build(tmp_path, env)
    with pytest.raises(NonFiniteError, match=r"epoch 3.*'rewards'"):
        trainer.run()
    again = build(tmp_path, env)
    again.restore(trainer.run_folder)
    for _ in range(2):
        again.run_epoch()
    assert again.epoch == 5 and int(again.state.nonfinite) == int(trainer.state.nonfinite) > 0


def test_parameters_that_are_not_finite_are_not_kept(tmp_path):
    # Nothing depends on the weights of what is always 0, so Adam moves them by 0 / (0 + 0).
    options = {"optimizer": "adam", "adam_eps": 0.0}
    trainer = build(tmp_path, **options)
    before = trainer.state
    with pytest.raises(NonFiniteError, match=r"epoch 1.*'new encoder\.0\.weight'"):
        trainer.run_epoch()
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, trainer.state.opt_state, before.opt_state)


@pytest.mark.filterwarnings("ignore:.*gradient steps planned")
def test_an_error_in_the_program_leaves_the_last_whole_state(tmp_path):
    def reward(time):
        def host(time):
            if np.any(time == 9):
                raise OSError("the simulator broke")
            return np.float32(time)

        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(host, shape, time, vmap_method="sequential")

    trainer, other = (build(tmp_path, Clock(reward=reward)) for _ in range(2))
    with pytest.raises(Exception, match="the simulator broke"):
        trainer.run()
    for _ in range(2):
        other.run_epoch()
    assert_equal(trainer, other)
    other.restore(trainer.run_folder)
    assert_equal(trainer, other)


def test_an_interrupted_epoch_is_played_again(tmp_path, monkeypatch):
    trainer = build(tmp_path)
    for _ in range(3):
        trainer.evaluate()
        trainer.train()
    cut = build(tmp_path)
    cut.evaluate()
    cut.train()
    cut.evaluate()
    assert cut.global_step == 16

    def interrupted(*args):
        update(*args)
        raise KeyboardInterrupt

    update = cut.loop.programs["update"]
    monkeypatch.setitem(cut.loop.programs, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut.close()
    again = build(tmp_path)
    again.restore(cut.run_folder)
    assert again.global_step == 8 and again.epoch == 1
    for _ in range(2):
        again.evaluate()
        again.train()
    assert_equal(again, trainer)


class Closing(NoLogger):
    """Counts how often it is closed, and with which model."""

    def __init__(self):
        super().__init__()
        self.closed = []

    def close(self, model_path):
        self.closed.append(model_path)


def test_close_closes_all_and_may_be_tried_again(tmp_path, monkeypatch):
    logger = Closing()
    trainer = build(tmp_path, logger=logger)
    ended = []
    monkeypatch.setattr(trainer.loop.source, "close", lambda: ended.append(True))

    def full(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("puffer_jax.run.run.write_atomically", full)
        with pytest.raises(OSError, match="no space left"):
            trainer.close()
    final = tmp_path / f"{logger.run_id}.pt"
    assert len(logger.closed) == len(ended) == 1 and not final.exists()
    assert trainer.close() == final == trainer.close() and final.exists()
    assert len(logger.closed) == len(ended) == 1


def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        build(tmp_path / "file" / "runs")


class Called(nnx.Module):
    """As little of a policy as there can be."""

    is_continuous = False

    def __init__(self, policy):
        self.inner = policy

    def __call__(self, observations, state=None):
        return self.inner(observations)


def test_another_writer_is_found_at_the_start(tmp_path):
    trainer = build(tmp_path, logger=NoLogger("run"))
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / ".writer", "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # conflicts with any other opening, as in a process
        with pytest.raises(RuntimeError, match=r"another process writes to .*run"):
            trainer.run()
    assert trainer.epoch == 0
    assert [path.name for path in folder.iterdir()] == [".writer"]


def test_a_policy_may_have_any_forward(tmp_path):
    trainers = []
    for wrap in (lambda policy: policy, Called):
        config = PuffeRLConfig.from_dict({**SIZES, "data_dir": tmp_path})
        policy = wrap(puffer_jax.Default(Clock(), hidden_size=4, rngs=nnx.Rngs(0)))
        trainers.append(PuffeRL(config, Clock(), policy))
        trainers[-1].run_epoch()
    states = [jax.tree.leaves(trainer.state.params) for trainer in trainers]
    jax.tree.map(np.testing.assert_array_equal, *states)
    with pytest.raises(TypeError, match="Module cannot be called: a policy has `forward_eval"):
        PuffeRL(config, Clock(), nnx.Module())


def test_statistics_of_long_episodes():
    env = as_jax_env(Clock(20, lambda time: jnp.where(time == 0, 1e8, 3.0)))
    policy = puffer_jax.Default(env, hidden_size=4, rngs=nnx.Rngs(0))
    config = PuffeRLConfig(num_envs=8, bptt_horizon=20, total_timesteps=160)
    source = JaxSource(config, env, policy)
    stream = source.init(jax.random.key(0))
    stream = stream._replace(lengths=jnp.full(8, 2**29 - 20, jnp.int32))
    _, _, outcome = source.collect(split(policy)[1], stream, jax.random.key(1))
    _, stats = source.summary(outcome)
    assert stats["episode_length"] == [2.0**29] * 8
    np.testing.assert_allclose(stats["episode_return"], [1e8 + 57] * 8, rtol=0, atol=16)
