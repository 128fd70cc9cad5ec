"""`puffer-jax train`, `eval` and `plot`: what they write, print and return."""

import dataclasses
import importlib
import json
import signal
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pufferlib.models as reference
import pufferlib.vector
import pytest
import torch
from flax import nnx
from gymnasium.spaces import Box, Dict, Discrete
from PIL import Image
from support.bars import stub_env

import puffer_jax
from puffer_jax import environments, v4
from puffer_jax.cli import envs as cli_envs
from puffer_jax.cli import games, train
from puffer_jax.cli import options as cli_options
from puffer_jax.cli.command import main
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.presets import presets
from puffer_jax.run import loggers, trainer
from puffer_jax.weights.description import describe

SMALL = ["--train.bptt-horizon", "8", "--policy.hidden-size", "8", "--train.no-anneal-lr"]
INI = """
[base]
package = ocean
env_name = {env}
policy_name = Policy
rnn_name = Recurrent
[vec]
num_envs = 4
seed = 42
[env]
{argument}
[policy]
hidden_size = 8
[rnn]
input_size = 8
hidden_size = 8
[train]
device = cpu
compile = False
bptt_horizon = 8
anneal_lr = False
total_timesteps = {steps}
[sweep]
metric = score
[sweep.train.gamma]
min = 0.9
"""
TITLE = "mean std min max"


def write_ini(folder, env="cartpole", argument="max_steps = 20", steps="64", more=""):
    path = folder / "run.ini"
    path.write_text(INI.format(env=env, argument=argument, steps=steps) + more)
    return str(path)


def lines_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def settings_of(run):
    return json.loads((run / "config.json").read_text())


def table(printed):
    """The numbers `eval` printed: name -> [mean, std, min, max]."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == TITLE.split())
    return {n: [float(x) for x in row] for n, *row in map(str.split, lines[start + 1 : start + 3])}


@pytest.fixture(scope="module")
def native_run(tmp_path_factory):
    """From a file, with an LSTM: two epochs of 32 steps."""
    folder = tmp_path_factory.mktemp("native")
    data = ["--train.data-dir", str(folder / "runs")]
    assert main(["train", "--config", write_ini(folder), "--name", "a", *data]) == 0
    return folder / "runs" / "a_seed42"


@pytest.fixture(scope="module")
def host_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    flags = ["--name", "b", "--train.data-dir", str(folder), "--train.seed", "3", *SMALL]
    vec = ["--vec.num-envs", "4", "--vec.mode", "sync", "--train.total-timesteps", "1e2"]
    assert main(["train", "--env", "CartPole-v1", *flags, *vec]) == 0
    return folder / "b_seed3"


@pytest.fixture
def options(monkeypatch):
    """What the command line comes to, without training."""
    seen = []
    monkeypatch.setattr(train.Train, "run", lambda self: seen.append(self) or 0)

    def options(*argv):
        assert main(["train", *argv]) == 0
        return seen[-1]

    return options


# --- train -----------------------------------------------------------------------------------


def test_train_writes_a_run(host_run, capsys):
    names = {path.name for path in host_run.iterdir()}
    epoch = max(int(name[6:12]) for name in names if name.startswith("model_"))
    assert {"config.json", "log.jsonl", f"model_{epoch:06d}.pt", f"state_{epoch:06d}"} == names
    last = lines_of(host_run)[-1]
    assert last["epoch"] == epoch
    assert 100 <= last["agent_steps"] < 100 + 32
    settings = settings_of(host_run)
    assert settings["env"] == "CartPole-v1"
    assert settings["train"]["total_timesteps"] == 100
    assert settings["train"]["seed"] == 3
    assert settings["policy"]["name"] == "Default"  # what "auto" chose
    # PufferLib's policy takes the model.
    policy = reference.Default(stub_env(Box(-1, 1, (4,)), Discrete(2)), 8)
    final = host_run.with_name("b_seed3.pt")
    policy.load_state_dict(torch.load(final, weights_only=True), strict=True)
    assert final.read_bytes() == (host_run / f"model_{epoch:06d}.pt").read_bytes()


def test_a_stopped_run_goes_on_as_if_never_stopped(native_run, tmp_path, monkeypatch, capsys):
    log = loggers.JSONLLogger.log

    def log_and_stop(self, logs, step):
        log(self, logs, step)
        signal.raise_signal(signal.SIGTERM)

    run = tmp_path / "a_seed42"
    with monkeypatch.context() as patch:
        patch.setattr(loggers.JSONLLogger, "log", log_and_stop)
        flags = ["--train.data-dir", str(tmp_path), "--name", "a"]
        assert main(["train", "--config", write_ini(tmp_path), *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"run {run}\noptions of {tmp_path / 'run.ini'}\n2 gradient steps")
    assert "\n32 of 64 steps, 1 epochs: " in printed
    assert printed.endswith(f"go on with: puffer-jax train --resume {run}\n")
    before = lines_of(run)
    assert [line["epoch"] for line in before] == [1]

    monkeypatch.chdir(run)
    assert main(["train", "--resume", "."]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"resumed from {run} at epoch 1\nrun {run}\noptions of .\n")
    assert "\n64 of 64 steps, 2 epochs: " in printed
    lines = lines_of(run)
    assert lines[:1] == before
    assert [(line["epoch"], line["agent_steps"]) for line in lines[1:]] == [(2, 64)]
    weights = [torch.load(f"{r}.pt", weights_only=True).values() for r in (run, native_run)]
    assert len(weights[0]) > 5
    assert all(torch.equal(ours, whole) for ours, whole in zip(*weights, strict=True))
    assert settings_of(run)["train"]["total_timesteps"] == 64

    assert main(["train", "--resume", str(run), "--train.total-timesteps", "50"]) == 0
    assert capsys.readouterr().out == f"{run}: 64 of 50 steps are done already\n"
    assert lines_of(run) == lines


def test_flags_win_over_the_file_and_the_file_over_recommended(tmp_path, options):
    path = write_ini(tmp_path, more="")
    file = options("--config", path)
    assert (file.env, file.env_arg, file.rnn) == ("cartpole", ("max_steps=20",), True)
    assert (file.vec.num_envs, file.vec.mode, file.policy.hidden_size) == (4, "auto", 8)
    assert (file.train.total_timesteps, file.train.anneal_lr) == (64, False)
    assert (file.train.reward_clip, file.train.reset_on_done) == (1.0, False)

    flags = ["--env", "squared", "--env-arg", "distance=2", "--no-rnn", "--vec.num-envs", "9"]
    flags += ["--train.anneal-lr", "--train.total-timesteps", "2e6"]
    both = options("--config", path, *flags)
    assert (both.env, both.rnn, both.vec.num_envs) == ("squared", False, 9)
    assert both.env_arg == ("max_steps=20", "distance=2")
    assert (both.train.total_timesteps, both.train.anneal_lr) == (2_000_000, True)
    assert (both.train.bptt_horizon, both.policy.hidden_size) == (8, 8)

    more = "reward_clip = 5\nrecompute_advantage = False\n"
    path = write_ini(tmp_path, steps="1e4\n" + more)
    best = options("--recommended", "--config", path, "--train.recompute-advantage")
    assert (best.train.reward_clip, best.train.reset_on_done) == (5.0, True)
    assert (best.train.recompute_advantage, best.train.total_timesteps) == (True, 10_000)
    assert options("--env", "x").train.reset_on_done is True
    assert options("--env", "x", "--no-recommended").train.reset_on_done is False


def test_a_preset_is_used_unless_it_is_refused(options):
    preset = PuffeRLConfig.preset("CartPole-v1")
    for name in ("CartPole-v1", "gymnax:CartPole-v1", "cartpole"):
        assert options("--env", name).env == name
        assert options("--env", name).train.total_timesteps == preset.total_timesteps == 100_000
    assert options("--env", "flappy_bird_gymnasium:FlappyBird-v0").env_arg == ("use_lidar=False",)
    assert options("--env", "CartPole-v1", "--no-preset").train.total_timesteps == 10_000_000
    assert options("--env", "CartPole-v1", "--train.seed", "3").train.seed == 3
    plain = options("--env", "CartPole-v1", "--no-recommended").train
    assert dataclasses.asdict(plain) == dataclasses.asdict(PuffeRLConfig())
    with pytest.raises(ValueError, match="no preset for 'CartPol-v1'; did you mean 'CartPole-v1'"):
        PuffeRLConfig.preset("CartPol-v1")


def test_each_preset_is_a_plan_for_all_that_it_names(options):
    named = [name for names in presets().values() for name in names]
    assert len(set(named)) == len(named)  # of two files, only the first would be read
    for path, names in presets().items():
        for name in names:
            read = options("--env", name)
            assert read.env == name
            assert read._start() == f"preset {path.name}"
            plan = PuffeRLConfig.from_dict(dataclasses.asdict(read.train))
            assert plan.sizes(read.vec.num_envs or 64).hopeless is None, name
    ant = options("--env", "brax:ant", "--env-arg", "backend=mjx").env_arg
    assert train.parse_arguments(ant) == {"backend": "mjx"}  # flags override a preset's
    craftax = options("--env", "craftax:Craftax-Classic-Symbolic-v1")
    assert (craftax.train.reset_ratio, craftax.policy.separate) == (16, False)


def test_devices(options):
    assert options("--env", "cartpole")._mesh() is None
    assert options("--env", "cartpole", "--devices", "all")._mesh().size == 8
    assert options("--env", "cartpole", "--devices", "2")._mesh().size == 2


def test_names_of_other_libraries_are_known(capsys):
    assert main(["train", "--env", "cartpole", "--train.lr", "0.1"]) == 2
    expected = "puffer-jax: no such --train option: lr (did you mean learning_rate?)\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(ValueError, match=r"no such training option: n_epochs \(.* update_epochs"):
        PuffeRLConfig.from_dict({"n_epochs": 3})


def test_what_else_a_pufferlib_file_says(tmp_path, options):
    path = tmp_path / "x.ini"
    path.write_text(
        "[base]\npackage = gymnax\nenv_name = CartPole-v1\npolicy_name = ProcgenResnet\n"
        "[vec]\nbackend = Multiprocessing\nnum_workers = auto\nbatch_size = auto\n"
        "[policy]\ncnn_width = 4\nmlp_width = 32\n[train]\nuse_rnn = True\nnum_envs = 6\n"
    )
    read = options("--config", str(path))
    assert (read.env, read.rnn) == ("gymnax:CartPole-v1", True)
    expected = cli_options.VecOptions(
        num_envs=6, mode="puffer", backend="Multiprocessing", num_workers="auto", batch_size="auto"
    )
    assert read.vec == expected
    expected = {"name": "ProcgenResnet", "hidden_size": 32, "cnn_width": 4, "action_mask": None}
    assert read.policy == cli_options.PolicyOptions(**expected)
    path.write_text("[base]\nenv_name = one two\n")
    assert options("--config", str(path)).env is None


FRAMES = Box(0, 255, (4, 84, 84), np.uint8)
POLICIES = [
    (Box(-1, 1, (4,)), {}, ("Default", 128)),
    (Dict({"a": Box(-1, 1, (2,)), "b": Discrete(3)}), {}, ("Default", 128)),
    (FRAMES, {}, ("Convolutional", 512, 4, False)),
    (Box(0, 255, (84, 84, 1), np.uint8), {}, ("Convolutional", 512, 1, True)),
    (FRAMES, {"hidden_size": 8, "downsample": 2}, ("Convolutional", 8, 4, False)),
    (FRAMES, {"name": "Default"}, ("Default", 128)),
    (Box(0, 255, (64, 64, 3), np.uint8), {"hidden_size": 8}, ("ProcgenResnet", 8)),
    (Box(0, 1, (4, 84, 84)), {}, ("Default", 128)),
    (Box(0, 255, (9, 9, 3), np.uint8), {}, ("Default", 128)),
    (Box(0, 255, (60, 48, 3), np.uint8), {"name": "Convolutional"}, ("Convolutional", 512, 3)),
    (Box(0, 255, (200, 180, 3), np.uint8), {}, ("Convolutional", 512, 3)),
    (Box(-1, 1, (4,)), {"name": "MLP", "hidden_size": 8}, ("MLP", 16)),
    (Box(-1, 1, (4,)), {"name": "auto 0.1"}, ("Default", 128)),
]


@pytest.mark.parametrize("number", range(len(POLICIES)))
def test_the_policy_fits_the_observations(number):
    space, given, expected = POLICIES[number]
    rnn = number % 2 == 0
    channels_last = {"channels_last": True} if space.shape == (60, 48, 3) else {}
    options = cli_options.PolicyOptions(**given, **channels_last)
    env = stub_env(space, Discrete(3))
    policy = nnx.eval_shape(lambda: cli_envs.make_policy(env, options, rnn))
    # What a run's config.json has makes the same policy, whatever "auto" chooses by then.
    made = cli_envs.settled(options, policy)
    assert made.name == expected[0]
    again = nnx.eval_shape(lambda: cli_envs.make_policy(env, made, rnn))
    assert describe(again) == describe(policy)
    if rnn:
        assert (policy.input_size, policy.hidden_size) == (expected[1], expected[1])
        policy = policy.policy
    found = type(policy).__name__, policy.hidden_size
    if expected[0] == "Convolutional":
        found += policy.framestack, policy.channels_last
        expected = (*expected, True)[:4]
    assert found == expected


def test_who_masks_actions(tmp_path, options):
    """Runs begun before there were masks go on without; PufferLib's options observe them."""
    assert options("--env", "cartpole").policy.action_mask == "auto"
    assert options("--env", "cartpole", "--no-recommended").policy.action_mask is None
    given = options("--no-recommended", "--policy.action-mask", "legal")
    assert given.policy.action_mask == "legal"
    train.write_settings(given, tmp_path)
    assert train.read_settings(tmp_path).policy == given.policy
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["policy"]["action_mask"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert train.read_settings(tmp_path).policy.action_mask is None

    mask = {"action_mask": Box(0, 1, (3,), np.int8)}
    env = stub_env(Dict({"a": Box(-1, 1, (2,)), **mask}), Discrete(3))
    for option, widths in (("auto", 2), (None, 5)):
        given = cli_options.PolicyOptions(action_mask=option)
        policy = nnx.eval_shape(lambda given=given: cli_envs.make_policy(env, given, False))
        assert policy.encoder.layers[0].kernel.shape[0] == widths


def test_an_infos_mask_by_name():
    taxi = next(name for name in ("Taxi-v4", "Taxi-v3") if name in gymnasium.registry)
    options = cli_options.PolicyOptions(action_mask="action_mask", hidden_size=8)
    envs, single, _ = cli_envs.make_envs(
        taxi, cli_options.VecOptions(num_envs=2), {}, options.action_mask
    )
    with envs:
        policy = cli_envs.make_policy(single, options, False)
        assert policy.encoder.layers[0].kernel.shape == (1, 8)
        rows, infos = envs.reset(seed=0)
        legal = np.isfinite(policy.forward_eval(rows)[0])
        np.testing.assert_array_equal(legal, [info["action_mask"] != 0 for info in infos])
    game = games.make_game(taxi, {}, None, 0, options.action_mask)
    observation = game.reset()
    logits, _ = policy.forward_eval({k: np.asarray(v)[None] for k, v in observation.items()})
    np.testing.assert_array_equal(np.isfinite(logits[0]), observation["action_mask"] != 0)
    game.close()


def test_images_with_other_actions_get_a_default_policy_and_bfloat16_its_dtype():
    env = stub_env(FRAMES, Box(-1, 1, (2,)))
    options = cli_options.PolicyOptions(hidden_size=8)
    make = lambda: cli_envs.make_policy(env, options, True, "bfloat16")  # noqa: E731
    policy = nnx.eval_shape(make)
    assert type(policy.policy) is puffer_jax.Default
    assert np.dtype(policy.policy.dtype) == np.dtype(policy.lstm.dtype) == "bfloat16"


def test_ways_to_vectorise(monkeypatch):
    def make(mode, **options):
        vec = cli_options.VecOptions(num_envs=3, mode=mode, **options)
        envs, single, count = cli_envs.make_envs("CartPole-v1", vec, {"max_episode_steps": 9})
        assert count is None
        envs.close()
        return envs, single

    vector = gymnasium.vector
    assert type(make("sync")[0]) is vector.SyncVectorEnv
    assert type(make("auto")[0]).__name__ == type(make("vector")[0]).__name__ == "CartPoleVectorEnv"
    puffer, driver = make("puffer")
    assert type(puffer) is pufferlib.vector.Serial
    assert (puffer.num_agents, driver.emulated is not None) == (3, True)
    assert driver.env.spec.max_episode_steps == 9

    assert make("puffer_jax", num_buffers=3)[0].num_buffers == 3
    for mode, backend in (("auto", "Serial"), ("puffer_jax", "Multiprocessing")):
        with pytest.raises(ValueError, match=f"num-buffers 3 is for .* got {mode} with {backend}"):
            make(mode, backend=backend, num_buffers=3)

    shared = make("puffer_jax", backend="Multiprocessing", num_workers=1, local_worker=True)[0]
    assert type(shared) is puffer_jax.vector.Multiprocessing and shared.pids == []
    with pytest.raises(ValueError, match=r"local-worker is for .* got puffer_jax with Serial"):
        make("puffer_jax", local_worker=True)

    # A process that has used JAX should not be forked.
    calls = []
    other = lambda *args, **options: calls.append(options) or puffer  # noqa: E731
    monkeypatch.setattr(gymnasium, "make_vec", other)
    monkeypatch.setattr(pufferlib.vector, "make", other)
    make("async")
    make("puffer", backend="Multiprocessing", num_workers=3, batch_size="auto")
    assert calls[0] == {"num_envs": 3, "vectorization_mode": "async", "max_episode_steps": 9}
    expected = {"backend": "Multiprocessing", "num_envs": 3, "num_workers": 3}
    assert calls[1] == expected | {"batch_size": "auto", "zero_copy": True}


def test_native_environments_by_name():
    vec = cli_options.VecOptions(num_envs=5)
    env, single, count = cli_envs.make_envs("squared", vec, {"distance": 2})
    assert env is single and count == 5
    assert env.unwrapped == environments.make("squared", distance=2)


@pytest.mark.needs_gymnax
def test_gymnaxs_environments_by_name():
    env, _, count = cli_envs.make_envs("gymnax:CartPole-v1", cli_options.VecOptions(), {})
    assert (env.observation_space.shape, count) == ((4,), None)


# --- eval ------------------------------------------------------------------------------------


def torch_game(policy, episodes, seed):
    """Returns of the most likely actions, played by torch."""
    env, returns = gymnasium.make("CartPole-v1"), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        done, total = False, 0.0
        while not done:
            with torch.no_grad():
                logits, _ = policy.forward_eval(torch.as_tensor(obs)[None])
            obs, reward, terminated, truncated, _ = env.step(int(logits.argmax()))
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def test_eval_plays_as_torch_does(tmp_path, capsys):
    torch.manual_seed(1)
    policy = reference.Default(stub_env(Box(-1, 1, (4,)), Discrete(2)), 8)
    path = str(tmp_path / "model.pt")
    torch.save(policy.state_dict(), path)
    flags = ["--env", "CartPole-v1", "--episodes", "6", "--seed", "5"]
    assert main(["eval", path, *flags, "--deterministic"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"CartPole-v1, {path}, episodes: 6\n")
    returns = np.array(torch_game(policy, 6, 5))
    assert returns.std() > 0
    expected = [returns.mean(), returns.std(), returns.min(), returns.max()]
    np.testing.assert_allclose(table(printed)["return"], expected, atol=0.006)
    assert table(printed)["length"] == table(printed)["return"]

    # Sampled: by the seed, and not the same as the most likely ones.
    tables = []
    for seed in ("5", "5", "6"):
        assert main(["eval", path, *flags[:-1], seed]) == 0
        tables.append(table(capsys.readouterr().out))
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]
    assert tables[0]["return"] != table(printed)["return"]


def test_eval_a_run_and_its_model_alone(native_run, capsys):
    assert main(["eval", str(native_run), "--episodes", "3", "--seed", "1"]) == 0
    run = capsys.readouterr().out
    assert run.startswith(f"cartpole, {native_run / 'model_000002.pt'}, episodes: 3\n")
    assert table(run)["length"][3] <= 20  # the run's max_steps
    flags = ["--env", "cartpole", "--env-arg", "max_steps=20"]
    model = f"{native_run}.pt"
    assert main(["eval", model, *flags, "--episodes", "3", "--seed", "1"]) == 0
    assert table(capsys.readouterr().out) == table(run)


class Countdown(gymnasium.Env):
    """Episodes of 3, 1, 3, 1 ... steps; pictures that tell the time; a Box of actions."""

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 10}  # noqa: RUF012
    observation_space = Dict({"left": Box(0, 9, (1,)), "kind": Discrete(2)})
    action_space = Box(-0.25, 0.25, (2,))

    def __init__(self, render_mode=None, scale=1.0):
        self.render_mode, self.scale = render_mode, scale
        self.episodes, self.left = 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = (3, 1)[self.episodes % 2]
        self.episodes += 1
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.left -= 1
        return self._obs(), self.scale, False, self.left == 0, {}

    def _obs(self):
        return {"left": np.array([self.left], np.float32), "kind": self.left % 2}

    def render(self):
        if self.render_mode == "ansi":
            return f"left {self.left}"
        return np.full((6, 8, 3), 60 * self.left, np.uint8)


gymnasium.register("PuffCountdown-v0", Countdown)


@pytest.fixture
def countdown(tmp_path):
    policy = puffer_jax.Default(gymnasium.make("PuffCountdown-v0"), 8, rngs=nnx.Rngs(0))
    puffer_jax.save_weights(policy, tmp_path / "model.safetensors")
    return [str(tmp_path / "model.safetensors"), "--env", "PuffCountdown-v0"]


def test_eval_counts_whole_episodes_and_draws_the_first(countdown, tmp_path, capsys):
    gif = tmp_path / "new" / "a.gif"
    flags = ["--env-arg", "scale=0.5", "--render", "gif", "--out", str(gif)]
    assert main(["eval", *countdown, "--episodes", "4", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"the first episode: {gif}\n")
    assert table(printed) == {"return": [1.0, 0.5, 0.5, 1.5], "length": [2.0, 1.0, 1.0, 3.0]}
    with Image.open(gif) as image:
        assert (image.format, image.n_frames, image.size) == ("GIF", 4, (8, 6))
        shades = []
        for frame in range(4):
            image.seek(frame)
            assert image.info["duration"] == 100
            shades.append(np.asarray(image.convert("RGB"))[0, 0, 0])
    assert shades == [180, 120, 60, 0]


def test_eval_as_text(countdown, tmp_path, capsys):
    assert main(["eval", *countdown, "--episodes", "2", "--render", "ansi"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("left 3\n\nleft 2\n\nleft 1\n\nleft 0\n\nleft 1\n\nleft 0\n\n")
    policy = puffer_jax.Default(environments.make("memory"), 8, rngs=nnx.Rngs(0))
    puffer_jax.save_weights(policy, tmp_path / "memory.safetensors")
    play = ["eval", str(tmp_path / "memory.safetensors"), "--env", "memory", "--episodes", "2"]
    assert main([*play, "--render", "ansi"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("right: 0 of 3") >= 2 * 6  # no answers before the sixth step
    assert printed.count("^") == 2 * 9
    assert table(printed)["length"] == [8.0, 0.0, 8.0, 8.0]


# --- plot ------------------------------------------------------------------------------------


def test_plot(host_run, native_run, tmp_path, capsys):
    out = tmp_path / "curves.png"
    metric = ["--metric", "losses/entropy"]
    assert main(["plot", str(host_run), str(native_run), "--out", str(out), *metric]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


# --- bad input -------------------------------------------------------------------------------

TINY = ["--train.data-dir", "{folder}/new", "--vec.num-envs", "4", *SMALL]
MISTAKES = {
    "no environment": (["train"], "give --env, --config FILE or --resume RUN"),
    "environment": (["train", "--env", "cartpol", *TINY], "Did you mean: `CartPole`?"),
    "module": (["train", "--env", "nowhere:Env-v0", *TINY], "No module named 'nowhere'"),
    "argument": (
        ["train", "--env", "cartpole", "--env-arg", "max_step=9", *TINY],
        "--env cartpole: no such argument: max_step (did you mean max_steps?)",
    ),
    "gymnasium's argument": (
        ["train", "--env", "CartPole-v1", "--env-arg", "sutton_reward=9", *TINY],
        "--env CartPole-v1: no such argument: sutton_reward (did you mean sutton_barto_reward?)",
    ),
    "no argument": (["train", "--env", "cartpole", "--env-arg", "9"], "expected NAME=VALUE"),
    "value": (
        ["train", "--env", "cartpole", *TINY, "--train.gamma", "2"],
        "gamma must be between 0 and 1; got 2.0",
    ),
    "sizes": (
        ["train", "--env", "CartPole-v1", *TINY, "--train.batch-size", "36"],
        "nearest: 32 or 40",
    ),
    "devices": (
        ["train", "--env", "cartpole", *TINY, "--devices", "9"],
        "devices is 9; there are 1 to 8 to choose from",
    ),
    "count": (
        ["train", "--env", "CartPole-v1", *TINY, "--vec.num-envs", "0"],
        "--vec.num-envs is 0; must be positive",
    ),
    "policy option": (
        ["train", "--env", "cartpole", *TINY, "--policy.cnn-width", "9"],
        "no such option of Default: cnn_width",
    ),
    "policy": (
        ["train", "--env", "cartpole", *TINY, "--policy.name", "ProcgenResnet"],
        "ProcgenResnet takes images",
    ),
    "name": (["train", "--env", "cartpole", *TINY, "--name", "a/b"], "cannot name a folder"),
    "same name": (
        ["train", "--env", "cartpole", "--train.data-dir", "{runs}", "--name", "a"],
        "--resume it or give another --name",
    ),
    "no run": (["train", "--resume", "{folder}/nowhere"], "nowhere/config.json"),
    "resume and config": (
        ["train", "--resume", "{run}", "--config", "x.ini"],
        "they do not go with --resume",
    ),
    "another environment": (
        ["train", "--resume", "{run}", "--env", "squared", "--env-arg", "distance=2"],
        "squared: no such argument: max_steps",
    ),
    "another policy": (["train", "--resume", "{run}", "--no-rnn"], "does not fit"),
    "no file": (["train", "--config", "{folder}/x.ini"], "No such file or directory"),
    "no model": (["eval", "{folder}/x.pt", "--env", "cartpole"], "No such file or directory"),
    "no checkpoint": (["eval", "{folder}", "--env", "cartpole"], "no complete checkpoint"),
    "eval what": (["eval", "{folder}/model.pt"], "give --env"),
    "episodes": (["eval", "{run}", "--episodes", "0"], "episodes is 0"),
    "does not fit": (["eval", "{run}.pt", "--env", "Acrobot-v1"], "encoder.0.weight"),
    "no text": (["eval", "{run}", "--render", "ansi"], "cartpole cannot be drawn as ansi"),
    "no picture": (
        ["eval", "{run}", "--env", "memory", "--render", "gif"],
        "memory cannot be drawn as gif; --render ansi",
    ),
    "mode": (
        ["eval", "{run}.pt", "--env", "CartPole-v1", "--render", "ansi"],
        "cannot be drawn as ansi; it has: human, rgb_array",
    ),
    "no runs": (["plot", "--out", "{folder}/x.png"], "no runs to plot"),
    "no metric": (["plot", "{run}", "--out", "{folder}/x.png", "--metric", "gold"], "'gold'"),
}


def check_mistake(arguments, message, folder, capsys):
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("puffer-jax: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.needs_gymnax
def test_a_mistake_in_gymnaxs_name(tmp_path, capsys):
    arguments = [a.format(folder=tmp_path) for a in TINY]
    message = "did you mean 'gymnax:CartPole-v1'?"
    check_mistake(["train", "--env", "gymnax:CartPol", *arguments], message, tmp_path, capsys)


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input_is_one_line_and_2_and_leaves_nothing(name, native_run, tmp_path, capsys):
    arguments, message = MISTAKES[name]
    places = {"folder": tmp_path, "run": native_run, "runs": native_run.parent}
    check_mistake([a.format(**places) for a in arguments], message, tmp_path, capsys)


BAD_FILES = {
    "[bas]\n": "no such section: bas (did you mean base?)",
    "[base]\nenvname = x\n": "no such key in [base]: envname (did you mean env_name?)",
    "[base]\npolicy_name = Defalt\n": "no such policy_name: Defalt (did you mean Default?)",
    "[base]\nrnn_name = Recurent\n": "no such rnn_name: Recurent (did you mean Recurrent?)",
    "[base]\nenv_name = cartpole\n[env]\nmax_step = 9\n": "max_step (did you mean max_steps?)",
    "[vec]\nnum_env = 4\n": "no such key in [vec]: num_env (did you mean num_envs?)",
    "[vec]\nnum_envs = few\n": "[vec] num_envs cannot be 'few'",
    "[vec]\nbackend = Serials\n": "[vec] backend cannot be 'Serials'",
    "[policy]\nhidden = 4\n": "no such key in [policy]: hidden (did you mean hidden_size?)",
    "[rnn]\nsize = 4\n": "no such key in [rnn]: size",
    "[policy]\nhidden_size = 4\n[rnn]\nhidden_size = 8\n": "are [4, 8]; they must be the same",
    "[train]\nlearning_rat = 1\n": "learning_rat (did you mean learning_rate?)",
    "[train]\nlearning_rate = -1\n": "learning_rate must be a positive number; got -1",
    "[vec]\nzero_copy = maybe\n": "[vec] zero_copy cannot be 'maybe'",
    "no file of this kind\n": "no section headers",
    "[train]\nlearning_rate = 50%\n": "bad.ini: [train] learning_rate = 50%: %(NAME)s is the value",
    "[train]\ngamma = %(x)s\n": "bad.ini: [train] gamma = %(x)s: %(NAME)s is the value",
    "[train]\ngamma = {[]}\n": "gamma must be between 0 and 1; got '{[]}'",
    "[policy]\nhidden_size = [1]\n[rnn]\nhidden_size = 1\n": "are [[1], 1]; they must be the same",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_one_line_and_2(text, tmp_path, capsys):
    path = tmp_path / "bad.ini"
    path.write_text(text)
    check_mistake(["train", "--config", str(path)], BAD_FILES[text], tmp_path, capsys)


BAD_SETTINGS = [
    "{",
    "[" * 50_000,
    "[]",
    "null",
    '{"gold": 1}',
    '{"vec": {"gold": 1}}',
    '{"vec": 3}',
    '{"env": 3}',
    '{"rnn": "no"}',
    '{"log": ["paper"]}',
    '{"train": {"learning_rate": -1.0}}',
]


@pytest.mark.parametrize("text", BAD_SETTINGS)
def test_a_damaged_run_is_one_line_and_2(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    message = str(tmp_path / "config.json")
    check_mistake(["train", "--resume", str(tmp_path)], message, tmp_path, capsys)


@pytest.mark.parametrize("steps", ["1.5", "many"])
def test_bad_numbers_are_bad_usage(steps, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--env", "cartpole", "--train.total-timesteps", steps])
    assert caught.value.code == 2
    assert "--train.total-timesteps" in capsys.readouterr().err


def test_what_is_missing_comes_with_the_line_that_installs_it(
    native_run, countdown, monkeypatch, capsys
):
    play = ["eval", f"{native_run}.pt", "--env", "CartPole-v1"]
    missing = {
        "pygame": ([*play, "--render", "gif"], 'pip install "gymnasium[classic-control]"'),
        "PIL": (["eval", *countdown, "--render", "gif"], "pip install pillow"),
        "gymnasium": (play, "pip install gymnasium"),
        "gymnax": (["train", "--env", "gymnax:CartPole-v1"], "pip install gymnax six"),
        "pufferlib.vector": (
            ["train", "--env", "CartPole-v1", "--vec.mode", "puffer"],
            "pip install --no-deps pufferlib-core",
        ),
    }
    for module, (arguments, line) in missing.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert main(arguments) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1


def test_a_diverged_run_is_one_line_and_2(tmp_path, monkeypatch, capsys):
    def run(self, after_epoch, apart):
        raise puffer_jax.NonFiniteError("epoch 1: the first array is 'value.bias'")

    monkeypatch.setattr(trainer.PuffeRL, "run", run)
    flags = ["--train.data-dir", str(tmp_path), "--name", "f"]
    assert main(["train", "--config", write_ini(tmp_path), *flags]) == 2
    *_, sweep, error = capsys.readouterr().err.splitlines()
    assert sweep.endswith("[sweep] is for puffer-jax sweep")
    assert error == "puffer-jax: epoch 1: the first array is 'value.bias'"


def test_every_logger_is_made(tmp_path, options):
    settings = options("--env", "x", "--log", "tensorboard", "jsonl")
    logger = train.make_logger(settings, tmp_path / "r")
    assert [type(part) for part in logger.loggers] == [
        loggers.TensorBoardLogger,
        loggers.JSONLLogger,
    ]
    assert logger.run_id == "r"
    logger.close(None)


V4_INI = """
[base]
env_name = cartpole
rank = 0
cudagraphs = 10
checkpoint_dir = checkpoints
checkpoint_interval = 50
reset_state = True
[vec]
total_agents = 32
num_buffers = 2
[env]
max_steps = 20
[policy]
hidden_size = 8
num_layers = 3
expansion_factor = 1
[torch]
network = GRU
encoder = DefaultEncoder
[train]
gpus = 1
seed = 7
horizon = 16
replay_ratio = 2.0
minibatch_size = 128.0
beta1 = 0.9
eps = 1e-9
anneal_lr = 0
min_lr_ratio = 0.5
[sweep]
method = Protein
[sweep.train.gamma]
min = 0.8
"""


def test_a_file_of_pufferlib_4(tmp_path, options, capsys):
    path = tmp_path / "x.ini"
    path.write_text(V4_INI)
    read = options("--config", str(path))
    assert capsys.readouterr().err == (
        f"{path}: PufferLib 4's, with no meaning here: [base] rank, cudagraphs; [vec] num_buffers; "
        "[policy] expansion_factor; [train] gpus; [sweep]\n"
    )
    assert (read.env, read.env_arg, read.vec.num_envs) == ("cartpole", ("max_steps=20",), 32)
    sizes = {"hidden_size": 8, "num_layers": 3, "action_mask": None}
    parts = {"name": "v4", "network": "GRU", "encoder": "DefaultEncoder"}
    assert read.policy == cli_options.PolicyOptions(**sizes, **parts)
    named = {"bptt_horizon": 16, "update_epochs": 2.0, "minibatch_size": 128, "adam_beta1": 0.9}
    named |= {"adam_eps": 1e-9, "anneal_lr": False, "min_lr_ratio": 0.5, "seed": 7}
    named |= {"data_dir": "checkpoints", "checkpoint_interval": 50, "num_envs": 32}
    config = PuffeRLConfig.v4(**named)
    assert dataclasses.asdict(read.train) == dataclasses.asdict(config)
    assert (config.optimizer, config.sampling) == ("muon_v4", "replacement")
    assert PuffeRLConfig.from_ini(path) == config
    flags = "--train.bptt-horizon", "8", "--policy.network", "MinGRU", "--vec.num-envs", "4"
    both = options("--config", str(path), *flags)
    assert (both.train.bptt_horizon, both.policy.network, both.vec.num_envs) == (8, "MinGRU", 4)
    best = options("--recommended", "--config", str(path)).train
    assert (best.optimizer, best.adam_beta1, best.reward_clip) == ("adam", 0.9, None)

    env = puffer_jax.environments.make("cartpole")
    policy = nnx.eval_shape(lambda: cli_envs.make_policy(env, both.policy, both.rnn))
    assert type(policy.network) is v4.MinGRU and policy.network.num_layers == 3
    again = cli_envs.settled(cli_options.PolicyOptions(), policy)
    assert again == dataclasses.replace(both.policy, action_mask="auto", decoder="DefaultDecoder")
    with pytest.raises(ValueError, match=r"hidden_size, num_layers, .*; got cnn_width, core"):
        cli_envs.make_policy(env, dataclasses.replace(both.policy, cnn_width=4), rnn=True)
    core = cli_options.PolicyOptions(core="mingru", num_layers=2)
    deep = nnx.eval_shape(lambda: cli_envs.make_policy(env, core, False))
    assert deep.core.num_layers == 2
    assert cli_envs.settled(cli_options.PolicyOptions(core="mingru"), deep).num_layers == 2
    with pytest.raises(ValueError, match="the core lstm has no num_layers"):
        cli_envs.make_policy(env, cli_options.PolicyOptions(num_layers=2), rnn=True)

    for old, new, message in (
        ("horizon = 16", "horizn = 16", r"x\.ini: \[train\] no such training option: horizn"),
        ("rank = 0", "rnak = 0", r"no such key in \[base\]: rnak \(did you mean rank\?\)"),
        ("[torch]", "[troch]", r"no such section: troch \(did you mean torch\?\)"),
    ):
        path.write_text(V4_INI.replace(old, new))
        with pytest.raises(ValueError, match=message):
            train.train_defaults(["--config", str(path)])


def test_tasks_of_the_learning_table_are_command_lines(options, monkeypatch):
    monkeypatch.syspath_prepend(Path(puffer_jax.__file__).parent.parent / "examples")
    learning = importlib.import_module("learning")
    cores = {}
    for task in learning.TASKS:
        read = options("--env", *task.split())
        cores.setdefault(read.env, []).append(read.policy.core or ("lstm" if read.rnn else None))
    # Where a recurrent core is tried, MinGRU stands beside the LSTM.
    assert cores["memory"] == ["lstm", "mingru"]
    assert cores["CartPole-v1"] == [None, "lstm", "mingru"]
    assert cores["gymnax:Breakout-MinAtar"] == [None, "lstm", "mingru"]
