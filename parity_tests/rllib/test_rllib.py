"""Policies in RLlib: what the module computes, what is learned from, and the examples."""

import re
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ray
import torch
from flax import nnx
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from ray import cloudpickle
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

import puffer_jax
import puffer_jax.rllib
from puffer_jax.ppo.advantage import advantage_of
from puffer_jax.ppo.objective import loss
from puffer_jax.rllib.episodes import ends_of, experience_of
from puffer_jax.rllib.learner import ppo_config

# What RLlib warns about in its own code is not ours.
pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.filterwarnings("ignore")]

# The same program, compiled in another context: sums of 8 numbers in another order.
CLOSE = {"rtol": 0, "atol": 2e-6}

VECTOR = Box(-1, 1, (4,))
SMALL = Box(-2, 2, (2,))


@pytest.fixture(autouse=True)
def narrow():
    with jax.enable_x64(False):
        yield


def env(observation=VECTOR, action=None):
    action = Discrete(3) if action is None else action
    return SimpleNamespace(observation_space=observation, action_space=action)


def default(where, recurrent=False, hidden=8):
    policy = puffer_jax.Default(where, hidden, rngs=nnx.Rngs(0))
    if recurrent:
        policy = puffer_jax.LSTMWrapper(where, policy, hidden, hidden, rngs=nnx.Rngs(1))
    return policy


def module_of(policy, where, **options):
    spec = puffer_jax.rllib.spec(policy, **options)
    spec.observation_space, spec.action_space = where.observation_space, where.action_space
    return cloudpickle.loads(cloudpickle.dumps(spec)).build()  # as on its way to a worker


@pytest.mark.parametrize("action", [Discrete(3, start=2), MultiDiscrete([2, 3]), SMALL], ids=str)
def test_it_acts_as_the_policy_does(action):
    where = env(action=action)
    policy = default(where)
    module = module_of(policy, where, seed=5)
    observations = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    logits, values = policy.forward_eval(observations)
    _, key = jax.random.split(jax.random.key(5))
    start = getattr(action, "start", 0)
    tensors = torch.from_numpy(observations)  # as beside torch's modules
    for out, how in (
        (module.forward_exploration({"obs": observations}, t=0), {"key": key}),
        (module.forward_inference({"obs": tensors}), {"deterministic": True}),
    ):
        expected, logprobs, _ = puffer_jax.sample_logits(logits, **how)
        assert {type(x) for x in out.values()} == {np.ndarray}
        np.testing.assert_allclose(out["actions"], np.asarray(expected) + start, **CLOSE)
        np.testing.assert_allclose(out["action_logp"], logprobs, **CLOSE)
        np.testing.assert_allclose(out["vf_preds"], values[:, 0], **CLOSE)
        assert all(x in action for x in out["actions"]) or action is SMALL
    inputs = out["action_dist_inputs"]
    if action is SMALL:
        np.testing.assert_allclose(inputs[:, 2:], np.log(logits.scale), **CLOSE)
        inputs, logits = inputs[:, :2], logits.loc
    whole = jnp.concatenate(logits, 1) if isinstance(logits, tuple) else logits
    np.testing.assert_allclose(inputs, whole, **CLOSE)
    assert not module.is_stateful() and module.get_initial_state() == {}


@pytest.fixture(scope="module")
def config():
    where = gymnasium.make("CartPole-v1")
    config = PPOConfig().environment("CartPole-v1").debugging(seed=0)
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=2)
    config.training(lr=1e-3, grad_clip=0.5, minibatch_size=24, num_epochs=2)
    with jax.enable_x64(False):
        policy = default(where, recurrent=True)
        return puffer_jax.rllib.configure(config, policy).copy(), policy


@pytest.fixture(scope="module")
def played(config):
    """Two samples of an LSTM in CartPole: many episodes, some of them cut between the two."""
    with jax.enable_x64(False):
        runner = SingleAgentEnvRunner(config=config[0], worker_index=0)
        samples = [runner.sample(num_timesteps=40) for _ in range(2)]
        return samples, runner.sample(num_episodes=2, explore=False), runner


def test_an_episode_s_state_is_its_own(config, played):
    step = jax.jit(config[1].forward_eval)
    (first, second), likely, _ = played
    cut = {episode.id_ for episode in first if not episode.is_done}
    assert cut == {episode.id_ for episode in second if episode.t_started > 0} != set()
    assert sum(episode.is_done for episode in first + second) >= 2
    for samples in (first + second, likely):
        states = {}
        for episode in samples:
            state = states.get(episode.id_) or config[1].initial_state(1)
            for t, observation in enumerate(episode.get_observations()[:-1]):
                logits, value, state = step(observation[None], state)
                stored = episode.get_extra_model_outputs("action_dist_inputs", t)
                np.testing.assert_allclose(stored, logits[0], **CLOSE)
                logp = jax.nn.log_softmax(logits[0])[int(episode.get_actions(t))]
                # A logarithm more than CLOSE.
                stored = episode.get_extra_model_outputs("action_logp", t)
                np.testing.assert_allclose(stored, logp, rtol=0, atol=5e-6)
                assert samples is not likely or episode.get_actions(t) == logits[0].argmax()
                stored = episode.get_extra_model_outputs("vf_preds", t)
                np.testing.assert_allclose(stored, value[0, 0], **CLOSE)
            states[episode.id_] = state


def test_the_experience_is_what_was_played(config, played):
    _, policy = config
    (_, episodes), _, runner = played
    zeros = runner.module.get_initial_state()
    ends = ends_of(episodes, zeros)
    _, values, _ = policy.forward_eval(ends.observations, ends.state)
    finals = np.asarray(values)[:, 0]
    made = {"horizon": 6, "unit": 4, "start": np.asarray(0)}
    experience = experience_of(episodes, finals, **made, zeros=zeros)
    rows = len(experience.values)
    mask = experience.mask
    assert rows % 4 == 0 and mask.sum() == sum(map(len, episodes))
    assert set(zeros) == {"lstm_h", "lstm_c"} and any(e.t_started > 0 for e in episodes)
    # The policy that acted gives what it was stored with, from the rows' states and starts.
    hypers = ppo_config(config[0]).hypers() | {"gae_lambda": 0.0, "gamma": 0.9}
    learned = jax.tree.map(jnp.asarray, experience)
    none, ones = jnp.zeros((rows, 6)), jnp.ones((rows, 1))
    _, metrics = jax.jit(lambda x: loss(policy, x, none, ones, hypers))(learned)
    # A few sums of 8 numbers after one another, and an exponential.
    close = {"rtol": 0, "atol": 2e-5}
    np.testing.assert_allclose(metrics["ratio"][mask], 1, **close)
    np.testing.assert_allclose(metrics["values"][mask], experience.values[mask], **close)
    # Without a trace, the advantages are the errors of one step.
    found = np.asarray(advantage_of(learned, jnp.ones((rows, 6)), hypers))
    assert not found[~mask].any()
    errors = []
    for episode, final in zip(episodes, finals, strict=True):
        values = np.append(episode.get_extra_model_outputs("vf_preds"), final)
        after = values[1:].copy()
        after[-1] *= not episode.is_terminated
        errors.append(np.asarray(episode.get_rewards()) + 0.9 * after - values[:-1])
    np.testing.assert_allclose(found[mask], np.concatenate(errors), **CLOSE)


def test_experience_by_hand():
    """Dict observations, two environments' episodes, one terminated and one cut off."""
    episodes = []
    for length, terminated in ((3, True), (2, False)):
        episode = SingleAgentEpisode()
        episode.add_env_reset({"a": np.float32(10 * length)})
        for t in range(length):
            extra = {"action_logp": np.float32(-t), "vf_preds": np.float32(t)}
            episode.add_env_step(
                {"a": np.float32(10 * length + t + 1)},
                np.int32(4 + t),
                t + 0.5,
                terminated=terminated and t == length - 1,
                extra_model_outputs=extra,
            )
        episodes.append(episode.to_numpy())
    finals = np.array([7, 8], np.float32)
    made = {"horizon": 5, "unit": 1, "start": np.asarray(4), "zeros": {}}
    found = experience_of(episodes, finals, **made)
    assert found.observations["a"].tolist() == [[30, 31, 32, 33, 20], [21, 22, 22, 22, 22]]
    assert found.actions.tolist() == [[0, 1, 2, 2, 0], [1, 1, 1, 1, 1]]
    assert found.logprobs[found.mask].tolist() == [0, -1, -2, 0, -1]
    assert found.values.tolist() == [[0, 1, 2, 7, 0], [1, 8, 8, 8, 8]]
    assert found.mask.tolist() == [[True] * 3 + [False, True], [True] + [False] * 4]
    assert found.starts.tolist() == [[True, False, False, False, True], [False] * 5]
    # With the observation that came after them: 0.5 for the first action, and so on.
    assert found.rewards[0].tolist() == [0, 0.5, 1.5, 2.5, 0]
    assert found.rewards[1, :2].tolist() == [0.5, 1.5]
    assert found.terminals[0].tolist() == [0, 0, 0, 1, 0] and not found.terminals[1].any()
    assert [x[0] for x in found.last[:3]] == [0.5, 0, 1] and found.state is None
    assert ends_of(episodes, {}).observations["a"].tolist() == [33, 22]
    del episodes[0].extra_model_outputs["vf_preds"]
    with pytest.raises(ValueError, match="the episodes lack vf_preds: "):
        experience_of(episodes, finals, **made)


def test_it_learns(config, played):
    """The learner alone, without an algorithm or a cluster."""
    config, _ = config
    (first, second), _, runner = played
    spec = config.get_multi_rl_module_spec(spaces=runner.get_spaces())

    def learner():
        learner = puffer_jax.rllib.PPOLearner(config=config, module_spec=spec)
        learner.build()
        return learner

    sizes = {"num_epochs": 2, "minibatch_size": 24}
    one = learner()
    before = one.policy_module.get_state()
    metrics = one.update(episodes=first, **sizes)["default_policy"]
    assert metrics["num_module_steps_trained"].peek() == sum(map(len, first))
    assert np.isfinite(metrics["policy_loss"].peek()) and metrics["approx_kl"].peek() > 0
    after = one.policy_module.get_state()
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: (x != y).any(), before, after)))

    other = learner()
    other._updates = one._updates  # compiled once
    other.set_state(cloudpickle.loads(cloudpickle.dumps(one.get_state())))
    for each in (one, other):
        each.update(episodes=second, **sizes)
    again = [each.policy_module.get_state() for each in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *again)

    runner.module.set_state(after)
    jax.tree.map(np.testing.assert_array_equal, puffer_jax.split(runner.module.policy)[1], after)
    with pytest.raises(ValueError, match=r"the parameters do not fit the policy: .*encoder"):
        runner.module.set_state(after | {"policy": after["policy"] | {"encoder": {}}})
    with pytest.raises(ValueError, match="learns from the episodes of env runners, and got none"):
        one.update(episodes=[])
    broken = jax.tree.map(lambda x: x * np.nan, after)
    one.policy_module.set_state(broken)
    with pytest.raises(FloatingPointError, match="update 3: "):
        one.update(episodes=first, **sizes)


def test_what_cannot_be(config, monkeypatch):
    where = env()
    policy = default(where)
    for wrong, said in (
        (env(action=Discrete(4)), r"it acts in Discrete\(n=3\), not Discrete\(n=4\)"),
        (env(Box(-1, 1, (5,))), r"it observes \(4,\), not \(5,\)"),
        (env(Dict({"a": VECTOR})), r"it observes \(4,\), not \[\(4,\)\]"),
        (env(action=Dict({"a": SMALL})), "policies act in Discrete, MultiDiscrete and Box"),
    ):
        with pytest.raises(ValueError, match=said):
            module_of(policy, wrong)
    emulated = puffer_jax.emulation.GymnasiumPufferEnv(_Structured())
    with pytest.raises(ValueError, match="reads the rows of bytes of an emulated environment"):
        module_of(default(emulated), env(_Structured.observation_space))
    with pytest.raises(ValueError, match=r"use puffer_jax\.rllib\.spec"):
        puffer_jax.rllib.PolicyModule(observation_space=VECTOR, action_space=Discrete(3))
    module = module_of(default(where, recurrent=True), where)
    with pytest.raises(ValueError, match=r"shape \(6, 4\); .* \(batch, 1, \*obs\)"):
        module.forward_inference({"obs": np.zeros((6, 4), np.float32), "state_in": {}})
    with pytest.raises(NotImplementedError, match=r"puffer_jax\.rllib\.PPOLearner"):
        module.forward_train({})

    several = PPOConfig().multi_agent(policies={"a", "b"}, policy_mapping_fn=lambda *_: "a")
    with pytest.raises(ValueError, match="the config is of several agents"):
        puffer_jax.rllib.configure(several, policy)
    old = PPOConfig().api_stack(
        enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False
    )
    with pytest.raises(ValueError, match="old API stack"):
        puffer_jax.rllib.configure(old, policy)
    wrong = PPOConfig().training(
        lr=[[0, 1e-3], [10, 1e-4]], grad_clip=1.0, grad_clip_by="value", use_gae=False
    )
    with pytest.raises(ValueError, match=r"use_kl_loss=.*lr=\[.*grad_clip_by=.*use_gae=False"):
        ppo_config(wrong)
    two = config[0].copy(copy_frozen=False).learners(num_learners=2)
    with pytest.raises(ValueError, match="num_learners is 2; "):
        puffer_jax.rllib.PPOLearner(config=two).build()
    for name in [name for name in sys.modules if name.startswith("puffer_jax.rllib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'puffer_jax\[rllib\]'"):
        import_module("puffer_jax.rllib")


class _Structured(gymnasium.Env):
    observation_space = Dict({"a": VECTOR, "b": Discrete(3)})
    action_space = Discrete(3)


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        "local",  # no other cluster that runs on the machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=80 * 2**20,
    )
    yield
    ray.shutdown()


def test_the_page_s_snippet(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(puffer_jax.__file__).parent / "export" / "README.md").read_text()
    (snippet,) = re.findall(r"## RLlib\n.*?```py\n(.*?)```", page, re.DOTALL)
    exec(compile(snippet, "export/README.md", "exec"), {"__name__": "readme"})
    assert puffer_jax.policy_from_checkpoint("model.pt").hidden_size == 64


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "train_rllib.py --steps 128 --num-envs 2 --batch 128 --hidden-size 8 --episodes 2 "
            "--runners 1",
            "most likely actions, 2 episodes: return",
        ),
        ("tune_ray.py --trials 1 --steps 1024 --num-envs 8", "best of 1: return"),
    ],
    ids=["train_rllib", "tune_ray"],
)
def test_examples(cluster, command, said, tmp_path, monkeypatch, capsys):
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.chdir(tmp_path)
    script, *options = command.split()
    monkeypatch.setattr(sys, "argv", [script, *options])
    runpy.run_path(str(examples / script), run_name="__main__")
    assert said in capsys.readouterr().out
