"""Environments by name: every family, its default policy, the commands, and the Atari example."""

import pickle
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from flax import nnx
from gymnasium.spaces import Box, Discrete
from support.bars import stub_env

import puffer_jax
from puffer_jax import environments, vector
from puffer_jax.cli import envs as cli_envs
from puffer_jax.cli import eval
from puffer_jax.cli import options as cli_options
from puffer_jax.cli.command import main
from puffer_jax.environments import emulation

FAMILIES = {
    "cartpole": ("native", "cartpole"),
    "gymnax:Breakout-MinAtar": ("gymnax", "Breakout-MinAtar"),
    "ALE/Breakout-v5": ("atari", "ALE/Breakout-v5"),
    "MiniGrid-Empty-5x5-v0": ("minigrid", "MiniGrid-Empty-5x5-v0"),
    "BabyAI-GoToRedBall-v0": ("minigrid", "BabyAI-GoToRedBall-v0"),
    "pettingzoo:classic/rps_v2": ("pettingzoo", "classic/rps_v2"),
    "CartPole-v1": ("gymnasium", "CartPole-v1"),
    "gymnasium:CartPole-v1": ("gymnasium", "CartPole-v1"),
    "gymnasium.envs:CartPole-v1": ("gymnasium", "gymnasium.envs:CartPole-v1"),
}
ROWS = {  # agents, rows, and n of the actions
    "ALE/Breakout-v5": (1, (4, 84, 84), np.uint8, 4),
    "MiniGrid-Empty-5x5-v0": (1, (7, 7, 3), np.uint8, 7),
    "pettingzoo:classic/rps_v2": (2, (1,), np.int32, 3),
    "pettingzoo:classic/connect_four_v3": (2, (91,), np.int8, 7),
    "gymnasium:CartPole-v1": (1, (4,), np.float32, 2),
    "gymnasium.envs:CartPole-v1": (1, (4,), np.float32, 2),
}


def test_families():
    assert {name: environments.family(name) for name in FAMILIES} == FAMILIES


def trajectory(env, steps, seed):
    """What an emulated environment shows for random actions."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(steps):
        if i == 0 or env.done:
            env.reset()
        else:
            env.step(rng.integers(env.single_action_space.n, size=env.num_agents).astype("i4"))
        rows.append((env.observations.copy(), env.rewards.copy(), env.terminals.copy()))
    return [np.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", ROWS)
def test_on_the_host(name):
    agents, shape, dtype, actions = ROWS[name]
    create = pickle.loads(pickle.dumps(environments.env_creator(name)))
    buf = {
        "observations": np.zeros((agents, *shape), dtype),
        "rewards": np.zeros(agents, np.float32),
        "actions": np.zeros(agents, np.int32),
    } | {field: np.zeros(agents, bool) for field in ("terminals", "truncations", "masks")}
    env = create(buf=buf, seed=3)
    several = name.startswith("pettingzoo")
    kind = emulation.PettingZooPufferEnv if several else emulation.GymnasiumPufferEnv
    assert type(env) is kind and env.observations is buf["observations"]
    assert (env.num_agents, env.single_observation_space.shape) == (agents, shape)
    assert env.single_observation_space.dtype == dtype
    assert env.single_action_space == Discrete(actions)
    first = trajectory(env, 30, 0)
    assert first[0].any() and buf["masks"].all()
    for one, other in zip(first, trajectory(create(seed=3), 30, 0), strict=True):
        np.testing.assert_array_equal(one, other)
    env.close()


@pytest.mark.needs_gymnax
def test_gymnaxs():
    env = environments.env_creator("gymnax:Breakout-MinAtar")()
    assert env.observation_space.shape == (10, 10, 4)
    with pytest.raises(ValueError, match="did you mean 'gymnax:Breakout-MinAtar'"):
        environments.make("gymnax:Breakot-MinAtar")
    with pytest.raises(TypeError, match="gymnax:CartPole-v1: no such argument: size"):
        environments.make("gymnax:CartPole-v1", size=3)


def test_jax_native_ones():
    assert environments.env_creator("squared")(distance=2) == environments.make(
        "squared", distance=2
    )


def test_atari_is_gymnasiums_preprocessing():
    import ale_py
    from gymnasium.wrappers import AtariPreprocessing

    gymnasium.register_envs(ale_py)
    name, sticky = "ALE/Breakout-v5", {"repeat_action_probability": 0.0}
    plain = AtariPreprocessing(gymnasium.make(name, frameskip=1, **sticky))
    env = environments.make(name, framestack=2, clip_rewards=True, **sticky)
    frame, _ = plain.reset(seed=5)
    obs, info = env.reset(seed=5)
    assert info == {}
    np.testing.assert_array_equal(obs, [[frame, frame]])
    rng, total, steps, info = np.random.default_rng(0), 0.0, 0, {}
    while not env.done:
        action, last = int(rng.integers(4)), frame
        frame, reward, terminated, truncated, _ = plain.step(action)
        obs, sign, *ends, info = env.step(action)
        np.testing.assert_array_equal(obs, [[last, frame]])
        assert (sign, *ends) == (np.sign(reward), terminated, truncated)
        total, steps = total + float(reward), steps + 1
        assert (info == {}) == (not env.done)
    assert info == {"episode_return": total, "episode_length": steps} and steps > 50
    one = environments.make(name, framestack=1, terminal_on_life_loss=True, **sticky)
    assert one.reset(seed=5)[0].shape == (1, 1, 84, 84)
    lengths = 1
    while not one.done:
        one.step(int(rng.integers(4)))
        lengths += 1
    assert lengths < steps and one.env.unwrapped.ale.lives() == 4


def test_minigrid_shows_the_image():
    env = environments.make("MiniGrid-Empty-5x5-v0", size=6, seed=2)
    image = gymnasium.make("MiniGrid-Empty-5x5-v0", size=6).reset(seed=2)[0]["image"]
    np.testing.assert_array_equal(env.reset()[0], [image])
    assert env.env.unwrapped.grid.width == 6


# --- errors ----------------------------------------------------------------------------------

UNKNOWN = {
    "CartPol": "no environment 'CartPol'; did you mean 'cartpole'",
    "CartPole-v7": "did you mean 'CartPole-v1'.*version `v7`",
    "gymnasium:cartpole": "no environment 'gymnasium:cartpole'.*Did you mean: `CartPole`",
    "ALE/Breakut-v5": "did you mean 'ALE/Breakout-v5'",
    "MiniGrid-Empty-5x7-v0": "did you mean 'MiniGrid-Empty-5x5-v0'",
    "pettingzoo:butterfly/cooperative_pong_v1": "did you mean '.*cooperative_pong_v[56]'",
    "pettingzoo:rps_v2": "did you mean 'pettingzoo:classic/rps_v2'",
    "nowhere:Env-v0": "No module named 'nowhere'",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names(name):
    with pytest.raises(ValueError, match=UNKNOWN[name]):
        environments.make(name)


@pytest.mark.parametrize(
    ("name", "argument", "match"),
    [
        ("squared", "distanc", "squared: no such argument: distanc .did you mean distance"),
        ("CartPole-v1", "sutton", "CartPole-v1: no such argument: sutton"),
        ("ALE/Pong-v5", "framestak", "ALE/Pong-v5: no such argument: framestak .did you mean fra"),
        ("pettingzoo:classic/rps_v2", "cycles", "pettingzoo:classic/rps_v2: .*'cycles'"),
        ("MiniGrid-Empty-5x5-v0", "siz", "'siz' was raised .* MiniGrid-Empty-5x5-v0"),
    ],
)
def test_unknown_arguments(name, argument, match):
    with pytest.raises(TypeError, match=match):
        environments.make(name, **{argument: 3})


@pytest.mark.parametrize(
    ("module", "name", "line"),
    [
        ("gymnasium", "CartPole-v1", "CartPole-v1 needs gymnasium: pip install gymnasium"),
        ("gymnax", "gymnax:CartPole-v1", "needs gymnax: pip install gymnax six"),
        ("ale_py", "ALE/Pong-v5", "ALE/Pong-v5 needs ale_py: pip install 'puffer_jax[atari]'"),
        ("cv2", "ALE/Pong-v5", "ALE/Pong-v5: opencv-python"),
        ("minigrid", "MiniGrid-Empty-5x5-v0", "minigrid: pip install 'puffer_jax[minigrid]'"),
        ("pettingzoo", "pettingzoo:classic/rps_v2", "install 'puffer_jax[pettingzoo]'"),
        (
            "pettingzoo.classic.rps_v2",
            "pettingzoo:classic/rps_v2",
            "import of pettingzoo.classic.rps_v2 .*: pip install 'pettingzoo\\[classic\\]'",
        ),
    ],
)
def test_what_is_not_installed(module, name, line, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    line = line if "\\" in line else line.replace("[", "\\[").replace("]", "\\]")
    with pytest.raises(ImportError, match=line):
        environments.make(name)


def test_workers_stay_light():
    code = (
        "import sys; from puffer_jax import environments as e\n"
        "for name in ('CartPole-v1', 'pettingzoo:classic/rps_v2'): e.make(name).reset()\n"
        "print({'jax', 'flax', 'torch', 'gymnax', 'ale_py', 'minigrid'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "set()"


# --- policies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("ALE/Pong-v5", {}, puffer_jax.Convolutional),
        ("ALE/Pong-v5", {"framestack": 1}, puffer_jax.Convolutional),
        ("MiniGrid-Empty-5x5-v0", {}, puffer_jax.Default),
        ("pettingzoo:classic/connect_four_v3", {}, puffer_jax.Default),
        ("memory", {}, puffer_jax.Default),
        (None, {"observation_space": Box(0, 255, (64, 64, 3), np.uint8)}, puffer_jax.ProcgenResnet),
    ],
)
def test_the_policy_of_each_family(name, arguments, expected):
    if name is None:
        env = stub_env(arguments["observation_space"], Discrete(3))
    else:
        env = environments.make(name, **arguments)
    make = lambda: environments.Policy(env, hidden_size=8, rngs=nnx.Rngs(0))  # noqa: E731
    policy = nnx.eval_shape(make)
    assert type(policy) is expected and policy.hidden_size == 8
    if expected is puffer_jax.Convolutional:
        assert policy.framestack == arguments.get("framestack", 4) and not policy.channels_last
    with pytest.raises(ValueError, match=f"option of {expected.__name__}: size"):
        environments.Policy(env, rngs=nnx.Rngs(0), size=3)


# --- commands and the example ----------------------------------------------------------------


def test_commands_vectorise_them():
    def make(name, arguments=(), **options):
        vec = cli_options.VecOptions(num_envs=2, **options)
        envs, single, count = cli_envs.make_envs(name, vec, dict(arguments))
        assert count is None and single is envs.driver_env
        envs.close()
        return envs

    envs = make("ALE/Pong-v5", {"framestack": 1})
    assert type(envs) is vector.Serial
    assert envs.single_observation_space.shape == (1, 84, 84)
    assert make("pettingzoo:classic/rps_v2").num_agents == 4
    assert make("MiniGrid-Empty-5x5-v0").num_agents == 2
    envs = make("gymnasium:CartPole-v1", {"max_episode_steps": 9}, mode="puffer_jax")
    assert type(envs) is vector.Serial
    assert envs.driver_env.env.spec.max_episode_steps == 9
    options = {"backend": "Multiprocessing", "num_workers": 2, "batch_size": "auto"}
    envs = make("CartPole-v1", mode="puffer_jax", **options)
    assert type(envs) is vector.Multiprocessing and envs.agents_per_batch == 1
    for mode in ("sync", "async", "vector", "puffer"):
        with pytest.raises(ValueError, match=f"--vec.mode {mode} is for gymnasium's, not for"):
            make("ALE/Pong-v5", mode=mode)
    with pytest.raises(ValueError, match=r"^no environment 'ALE/Pon-v5'; did you mean 'ALE/"):
        make("ALE/Pon-v5")
    with pytest.raises(TypeError, match=r"^ALE/Pong-v5: no such argument: fram"):
        make("ALE/Pong-v5", {"fram": 1})
    game = eval.make_game("ALE/Pong-v5", {"framestack": 1}, "gif", 0)
    assert game.reset().shape == (1, 84, 84) and game.render().shape == (210, 160, 3)
    assert game.step(np.array(0))[1:] == (0.0, False)
    game.close()
    with pytest.raises(ValueError, match="rps_v2 has several agents"):
        eval.make_game("pettingzoo:classic/rps_v2", {}, None, 0)


@pytest.mark.needs_reference  # of torch: it reads and writes .pt files
@pytest.mark.usefixtures("quick")
def test_train_and_play_from_the_command_line(tmp_path, capsys):
    small = "--no-recommended --vec.num-envs 2 --train.bptt-horizon 8 --name a".split()
    small += ["--policy.hidden-size", "8"]
    for name, steps in (("pettingzoo:classic/rps_v2", 64), ("MiniGrid-Empty-5x5-v0", 32)):
        folder = tmp_path / str(steps)
        flags = ["--train.data-dir", str(folder), "--train.total-timesteps", str(steps)]
        assert main(["train", "--env", name, *small, *flags]) == 0
        assert f"{steps} of {steps} steps, 2 epochs" in capsys.readouterr().out
        policy = puffer_jax.policy_from_checkpoint(folder / "a_seed42.pt", environments.make(name))
        assert isinstance(policy, puffer_jax.Default)
    assert main(["eval", str(folder / "a_seed42"), "--episodes", "1"]) == 0
    assert "MiniGrid-Empty-5x5-v0" in capsys.readouterr().out


def test_what_moved_to_another_package_is_pointed_to(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpe2", None)
    with pytest.raises(ImportError, match=r"simple_spread_v3: .*: pip install mpe2$"):
        environments.make("pettingzoo:mpe/simple_spread_v3")


def test_ids_that_a_module_registers(tmp_path, monkeypatch):
    (tmp_path / "plugin_of_mine.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Mine-v3', 'gymnasium.envs.classic_control:CartPoleEnv', "
        "max_episode_steps=7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    env = environments.make("plugin_of_mine:Mine-v3")
    assert env.env.spec.max_episode_steps == 7
