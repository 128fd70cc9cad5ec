"""Action masks: the numbers, every form of observation, and no illegal action, anywhere."""

import re
from types import SimpleNamespace
from typing import ClassVar

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gymnasium import spaces as gym
from support import reference as ref

import puffer_jax
from puffer_jax import emulation, vector
from puffer_jax.environments import ActionMask
from puffer_jax.kernels import use
from puffer_jax.parity import compare
from puffer_jax.parity.reference import reference_policy
from puffer_jax.policies.masks import legal, mask_of
from puffer_jax.ppo import normalization
from puffer_jax.ppo.experience import Experience
from puffer_jax.ppo.moments import Moments, Normalization
from puffer_jax.spaces import Box, Dict, Discrete, MultiDiscrete, env_spec

pytestmark = [pytest.mark.needs_reference, pytest.mark.usefixtures("quick")]

# Sums of a few float64 numbers near 1, each rounded to 1.1e-16.
EXACT = 1e-14


def env_of(mask=None, observation=None, action=None):
    parts = {
        "action_mask": Box(0, 1, (5,), np.int8) if mask is None else mask,
        "observation": Box(-1, 1, (2, 3), np.float32) if observation is None else observation,
    }
    action = MultiDiscrete((2, 3)) if action is None else action
    return SimpleNamespace(observation_space=Dict(parts), action_space=action)


def drawn(count, seed=0, width=5):
    """Observations, in some of which a component has no legal action."""
    random = np.random.default_rng(seed)
    observation = random.standard_normal((count, 2, 3)).astype(np.float32)
    return {
        "observation": observation,
        "action_mask": (random.random((count, width)) < 0.5).astype(np.int8),
    }


def default(env=None, **options):
    options = {"action_mask": "action_mask"} | options
    return puffer_jax.Default(env or env_of(), 16, **options, rngs=nnx.Rngs(0))


def test_a_masked_softmax_by_hand():
    """Of the logits 1, 2, 3, 4 the first and the third are legal."""
    logits = jnp.array([[1.0, 2, 3, 4], [1, 2, 3, 4]])
    mask = jnp.array([[True, False, True, False], [False] * 4])

    def scored(logits):
        _, logprob, entropy = puffer_jax.sample_logits(legal(logits, mask), jnp.array([0, 3]))
        return logprob, entropy

    p = np.array([1, np.e**2]) / (1 + np.e**2)
    h = -(p * np.log(p)).sum()
    scores, slopes = jax.jit(lambda x: (scored(x), jax.jacobian(scored)(x)))(logits)
    (logprob, other), (entropy, wide) = scores
    np.testing.assert_allclose([logprob, entropy], [np.log(p[0]), h], rtol=EXACT)
    d_logprob, d_entropy = slopes
    assert (d_logprob[0, 0, jnp.array([1, 3])] == 0).all() and (d_logprob[0, 1] == 0).all()
    assert (d_entropy[0, 0, jnp.array([1, 3])] == 0).all()
    np.testing.assert_allclose(d_logprob[0, 0, ::2], [1 - p[0], -p[1]], rtol=EXACT)
    np.testing.assert_allclose(d_entropy[0, 0, ::2], -p * (np.log(p) + h), atol=EXACT)
    # With no legal action all are: the plain softmax.
    q = np.exp([1, 2, 3, 4]) / np.exp([1, 2, 3, 4]).sum()
    np.testing.assert_allclose([other, wide], [np.log(q[3]), -(q * np.log(q)).sum()], rtol=EXACT)


def test_components_have_their_own_masks():
    mask = jnp.array([[True, False, False, True, True], [True, True, False, False, False]])
    first, second = legal((jnp.zeros((2, 2)), jnp.zeros((2, 3))), mask)
    assert (jnp.isfinite(first) == jnp.array([[True, False], [True, True]])).all()
    assert (jnp.isfinite(second) == jnp.array([[False, True, True], [True] * 3])).all()


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_what_is_illegal_is_never_drawn(implementation, scale):
    """Not even where the illegal logits are the largest by far."""
    policy = default(env_of(Box(0, 1, (7,), np.int8), action=Discrete(7)))
    policy.decoder.kernel[...] = policy.decoder.kernel[...] * scale
    observations = drawn(20_000, width=7)
    mask = observations["action_mask"]
    mask[:, 3] = 1

    @jax.jit
    def act(observations, key):
        logits, _ = policy.forward_eval(observations)
        return logits, puffer_jax.sample_logits(logits, key=key)

    with use(implementation):
        key = jax.random.key(0, impl="threefry2x32")
        logits, (action, logprob, entropy) = act(observations, key)
    assert np.take_along_axis(mask, np.asarray(action)[:, None], 1).all()
    assert np.isfinite(logprob).all() and np.isfinite(entropy).all()
    best, *_ = puffer_jax.sample_logits(logits, deterministic=True)
    assert np.take_along_axis(mask, np.asarray(best)[:, None], 1).all()


POLICIES = {
    "default": default,
    "mlp": lambda env: puffer_jax.MLP(env, (8,), action_mask="action_mask", rngs=nnx.Rngs(0)),
    "lstm": lambda env: puffer_jax.LSTMWrapper(env, default(env), 16, 16, rngs=nnx.Rngs(1)),
    "gru": lambda env: puffer_jax.Recurrent(
        env, default(env), puffer_jax.GRU(16, 16, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(2)
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_mask_reaches_the_logits_and_no_layer(name):
    env = env_of()
    policy, observations = POLICIES[name](env), drawn(12)
    free = observations | {"action_mask": np.ones((12, 5), np.int8)}
    logits, values, *state = policy.forward_eval(observations)
    all_logits, all_values, *_ = policy.forward_eval(free)
    np.testing.assert_array_equal(values, all_values)
    given = legal(all_logits, observations["action_mask"] != 0)
    for masked, expected in zip(logits, given, strict=True):
        np.testing.assert_array_equal(masked, expected)
        assert np.isneginf(masked).any() and np.isfinite(masked).any(-1).all()
    if state:
        sequences = jax.tree.map(lambda x: x.reshape(4, 3, *x.shape[1:]), observations)
        logits, _, _ = policy.forward(sequences)
        for head, expected in zip(logits, given, strict=True):
            np.testing.assert_array_equal(np.isneginf(head), np.isneginf(expected))


@pytest.mark.parametrize("name, packed", [("default", False), ("lstm", True)])
def test_it_is_its_torch_twin(name, packed):
    env, observations = env_of(), drawn(12)
    if packed:
        parts = {"action_mask": gym.Box(0, 1, (5,), np.int8), "observation": gym.Box(-1, 1, (2, 3))}
        env = ref.emulated(gym.Dict(parts), gym.MultiDiscrete([2, 3]))
        rows = np.zeros(12, env.emulated["emulated_observation_dtype"])
        for part, values in observations.items():
            rows[part] = values
        rows = rows.view(np.uint8).reshape(12, -1)
    else:
        rows = np.concatenate([observations[k].reshape(12, -1) for k in sorted(observations)], 1)
    policy = POLICIES[name](env)
    twin = reference_policy(policy)
    puffer_jax.load_state_dict(policy, twin.state_dict())
    masked, *_ = policy.forward_eval(rows)
    for head, same in zip(masked, policy.forward_eval(observations)[0], strict=True):
        np.testing.assert_array_equal(head, same)
        assert np.isneginf(head).any()
    compare(twin, policy, rows.reshape(4, 3, -1) if name == "lstm" else rows).assert_close()


def test_convolutions_see_the_image_alone():
    image = Box(0, 255, (36, 36, 1), np.uint8)
    env = env_of(Box(0, 1, (3,), bool), image, Discrete(3))
    policy = puffer_jax.environments.Policy(
        env, action_mask="auto", hidden_size=8, rngs=nnx.Rngs(0)
    )
    assert isinstance(policy, puffer_jax.Convolutional) and policy.framestack == 1
    pixels = np.random.default_rng(0).integers(0, 256, (2, 36, 36, 1), np.uint8)
    mask = np.array([[True, False, True], [False] * 3])
    logits, values = policy({"observation": pixels, "action_mask": mask})
    plain = SimpleNamespace(observation_space=image, action_space=Discrete(3))
    bare = puffer_jax.Convolutional(plain, hidden_size=8, output_size=8, rngs=nnx.Rngs(0))
    free, same = bare(pixels)
    np.testing.assert_array_equal(values, same)
    np.testing.assert_array_equal(logits, jnp.where(mask | [[False], [True]], free, -jnp.inf))


def test_files_know_the_mask(tmp_path):
    policy, observations = POLICIES["lstm"](env_of()), drawn(6)
    path = tmp_path / "model.safetensors"
    puffer_jax.save_weights(policy, path)
    env = env_of()
    described = puffer_jax.policy_from_checkpoint(path)
    bare = puffer_jax.state_dict(policy)
    inferred = puffer_jax.policy_from_checkpoint(bare, env, nvec=(2, 3), action_mask="action_mask")
    for read in (described, inferred):
        assert read.policy.action_mask == "action_mask"
        for a, b in zip(
            jax.tree.leaves(read.forward_eval(observations)),
            jax.tree.leaves(policy.forward_eval(observations)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    assert puffer_jax.check_policy(described, env).ok


BOX = Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize(
    "env, key, message",
    [
        (
            env_of(Box(0, 1, (4,), np.int8)),
            "action_mask",
            "the mask 'action_mask' must be of bool or integers and of the shape (5,), for "
            "MultiDiscrete(nvec=(2, 3)); got int8 (4,)",
        ),
        (
            env_of(Box(0, 1, (2, 2), np.float32), action=MultiDiscrete((2, 2))),
            "action_mask",
            "of the shape (4,) or (2, 2), for MultiDiscrete(nvec=(2, 2)); got float32 (2, 2)",
        ),
        (env_of(), "action_masks", "got 'action_masks'; did you mean 'action_mask'?, and they are"),
        (
            SimpleNamespace(observation_space=BOX, action_space=Discrete(2)),
            "action_mask",
            "got 'action_mask', and they are no Dict; puffer_jax.environments.ActionMask puts",
        ),
        (env_of(action=BOX), "action_mask", "needs Discrete or MultiDiscrete actions; got Contin"),
    ],
)
def test_what_cannot_be_a_mask(env, key, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        default(env, action_mask=key)


def test_observations_that_lack_the_mask():
    policy, observations = default(), drawn(3)
    with pytest.raises(ValueError, match=r"must be \(batch, 5\) for .*; got \(3, 4\)"):
        policy(observations | {"action_mask": observations["action_mask"][:, :4]})
    with pytest.raises(TypeError, match=r"of bool or integers; got float32 \(3, 5\)"):
        policy(observations | {"action_mask": np.ones((3, 5), np.float32)})
    with pytest.raises(ValueError, match="without the mask 'action_mask'; got observation"):
        policy({"observation": observations["observation"]})


def test_auto_takes_what_fits():
    assert mask_of(env_of(), "auto") == "action_mask" and mask_of(env_of(), None) is None
    assert mask_of(env_of(action=BOX), "auto") is None
    with pytest.warns(UserWarning, match=r"not used as a mask, but observed: .* got float32"):
        assert mask_of(env_of(Box(0, 1, (5,), np.float32)), "auto") is None


class Minefield:
    """One of four actions is legal after another; an illegal one costs 1,000, a legal one pays 1.

    Episodes have four steps.
    """

    observation_space = Dict(
        {"action_mask": Box(0, 1, (4,), bool), "observation": Box(0, 9, (1,), np.float32)}
    )
    action_space = Discrete(4)

    def _observed(self, key, step):
        mask = jax.random.bernoulli(key, 0.4, (4,))
        return {"action_mask": mask.at[step % 4].set(True), "observation": step[None] * 1.0}

    def reset(self, key):
        obs = self._observed(key, jnp.int32(0))
        return obs, (obs["action_mask"], jnp.int32(0))

    def step(self, key, state, action):
        mask, step = state
        obs = self._observed(key, step + 1)
        reward = jnp.where(mask[action], 1.0, -1000.0)
        return obs, (obs["action_mask"], step + 1), reward, step == 3, jnp.array(False), {}


def minefield(folder):
    env = puffer_jax.as_jax_env(Minefield())
    config = puffer_jax.PuffeRLConfig.recommended(
        num_envs=8, bptt_horizon=16, total_timesteps=8 * 16 * 4, num_minibatches=2,
        normalize_observations=True, data_dir=str(folder),
    )  # fmt: skip
    policy = puffer_jax.LSTMWrapper(env, default(env), 16, 16, rngs=nnx.Rngs(1))
    return puffer_jax.PuffeRL(config, env, policy, puffer_jax.NoLogger("run"))


def epoch(trainer):
    returns = np.asarray(trainer.evaluate()["episode_return"])
    trainer.train()
    assert len(returns) and (returns == 4).all()


def test_training_plays_no_illegal_action_and_resumes(tmp_path):
    trainer = minefield(tmp_path)
    epoch(trainer)
    epoch(trainer)
    trainer.save_checkpoint()
    epoch(trainer)
    resumed = minefield(tmp_path)
    resumed.restore()
    epoch(resumed)
    saved = [puffer_jax.state_dict(each.policy) for each in (trainer, resumed)]
    for name, tensor in saved[0].items():
        np.testing.assert_array_equal(tensor, saved[1][name])
        assert np.isfinite(tensor).all()
    observations = jax.tree.map(lambda x: x[None], Minefield().reset(jax.random.key(0))[0])
    logits, *_ = resumed.policy.forward_eval(observations, resumed.policy.initial_state(1))
    np.testing.assert_array_equal(np.isfinite(logits), observations["action_mask"])


@pytest.mark.parametrize("packed", [True, False])
def test_normalisation_counts_what_the_layers_read(packed):
    """It flattened the whole tree, or its bytes."""
    env, observations = env_of(), drawn(12)
    if packed:
        parts = {"action_mask": gym.Box(0, 1, (5,), np.int8), "observation": gym.Box(-1, 1, (2, 3))}
        env = ref.emulated(gym.Dict(parts), gym.MultiDiscrete([2, 3]))
        rows = np.zeros(12, env.emulated["emulated_observation_dtype"])
        for part, values in observations.items():
            rows[part] = values
        stored = rows.view(np.uint8).reshape(4, 3, -1)
    else:
        stored = jax.tree.map(lambda x: x.reshape(4, 3, *x.shape[1:]), observations)
    zeros = jnp.zeros((4, 3))
    experience = Experience(stored, zeros, zeros, zeros, zeros, zeros)
    known = Normalization(Moments.none((6,), jnp.dtype("float64")), None, None)
    moments = normalization.observed(default(env), experience, known).observations
    read = observations["observation"].reshape(12, 6).astype(np.float64)
    # Twelve float64 numbers summed in another order: 12 * 2e-16, and ten times that for cancelling.
    np.testing.assert_allclose(moments.mean, read.mean(0), rtol=1e-13)


class Informed(gymnasium.Env):
    """Two components; only the info says what is legal, and an illegal action is an error."""

    observation_space = gym.Discrete(10)
    action_space = gym.MultiDiscrete([2, 3])

    def _info(self):
        self.masks = tuple((self.np_random.random(n) < 0.5).astype(np.int8) for n in (2, 3))
        for mask in self.masks:
            mask[self.steps % len(mask)] = 1
        return {"action_mask": self.masks}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return 0, self._info()

    def step(self, action):
        assert all(mask[i] for mask, i in zip(self.masks, action, strict=True)), "illegal"
        self.steps += 1
        over = self.steps == 5
        return self.steps, 1.0, over, False, {} if over else self._info()


def test_an_infos_mask_is_observed(tmp_path):
    env = ActionMask(Informed())
    observation, _ = env.reset(seed=0)
    expected = np.concatenate(env.unwrapped.masks)
    np.testing.assert_array_equal(observation["action_mask"], expected)
    assert env.observation_space.contains(observation | {"observation": np.int64(0)})
    config = puffer_jax.PuffeRLConfig.recommended(
        bptt_horizon=8, total_timesteps=8 * 16, num_minibatches=1, data_dir=str(tmp_path)
    )
    with vector.make(lambda: ActionMask(Informed()), num_envs=2) as vecenv:
        policy = puffer_jax.environments.Policy(
            vecenv.driver_env, action_mask="auto", hidden_size=8, rngs=nnx.Rngs(0)
        )
        assert policy.encoder.layers[0].kernel.shape == (1, 8)
        trainer = puffer_jax.PuffeRL(config, vecenv, policy)
        for _ in range(2):
            trainer.evaluate()
            trainer.train()


def test_by_name_the_mask_comes_from_wherever_it_is():
    name = next(name for name in ("Taxi-v4", "Taxi-v3") if name in gymnasium.registry)
    env = puffer_jax.environments.make(name, action_mask="action_mask")
    row, info = env.reset(seed=0)
    fields = row.view(env.emulated["emulated_observation_dtype"])
    np.testing.assert_array_equal(fields["action_mask"][0, 0], info["action_mask"])
    *_, info = env.step(int(np.flatnonzero(info["action_mask"])[0]))
    np.testing.assert_array_equal(fields["action_mask"][0, 0], info["action_mask"])


@pytest.mark.parametrize(
    "info, message",
    [
        ({"mask": 1}, r"no mask 'action_mask' in the info, which has: mask"),
        ({"action_mask": np.ones(4, np.int8)}, r"5 of them, for MultiDiscrete.*; got int8 \(4,\)"),
        ({"action_mask": np.ones(5)}, r"of bool or integers .*; got float64 \(5,\)"),
    ],
)
def test_infos_without_a_mask(info, message):
    class Other(Informed):
        def _info(self):
            return info

    with pytest.raises(ValueError, match=message):
        ActionMask(Other()).reset(seed=0)
    with pytest.raises(ValueError, match="have the key 'action_mask' already"):
        ActionMask(ActionMask(Informed()))


class Turns:
    """PettingZoo's protocol: two agents by turns; who waits has no legal action."""

    possible_agents = ("a", "b")
    metadata: ClassVar = {}
    render_mode = None

    def __init__(self):
        self.agents = []

    def observation_space(self, agent):
        return gym.Dict(
            {"observation": gym.Box(0, 9, (2,)), "action_mask": gym.Box(0, 1, (3,), np.int8)}
        )

    def action_space(self, agent):
        return gym.Discrete(3)

    def _observed(self):
        self.masks = {a: np.zeros(3, np.int8) for a in self.possible_agents}
        self.masks["ab"[self.steps % 2]][self.steps % 3] = 1
        return {
            a: {"observation": np.full(2, self.steps, np.float32), "action_mask": mask}
            for a, mask in self.masks.items()
        }

    def reset(self, seed=None, options=None):
        self.agents, self.steps = list(self.possible_agents), 0
        return self._observed(), {}

    def step(self, actions):
        turn = "ab"[self.steps % 2]
        assert self.masks[turn][actions[turn]], "illegal"
        self.steps += 1
        over = self.steps == 6
        obs = self._observed()
        if over:
            self.agents = []
        each = lambda value: dict.fromkeys(self.possible_agents, value)  # noqa: E731
        return obs, each(1.0), each(over), each(False), each({})

    def close(self):
        pass


def test_agents_by_turns(tmp_path):
    with vector.make(
        lambda buf=None, seed=0: emulation.PettingZooPufferEnv(env=Turns(), buf=buf, seed=seed),
        num_envs=2,
    ) as vecenv:
        policy = default(vecenv.driver_env)
        config = puffer_jax.PuffeRLConfig.recommended(
            bptt_horizon=8, total_timesteps=4 * 16, num_minibatches=1, data_dir=str(tmp_path)
        )
        trainer = puffer_jax.PuffeRL(config, vecenv, policy)
        for _ in range(2):
            trainer.evaluate()
            trainer.train()
    assert all(np.isfinite(x).all() for x in puffer_jax.state_dict(trainer.policy).values())


def test_a_custom_policy_masks_inside_a_core():
    class Custom(nnx.Module):
        hidden_size, is_continuous = 4, False

        def __init__(self, rngs):
            self.body = nnx.Linear(6, 4, rngs=rngs)
            self.actor, self.critic = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

        def encode_observations(self, observations, state=None):
            return self.body(observations["observation"].reshape(-1, 6))

        def decode_actions(self, hidden):
            return self.actor(hidden), self.critic(hidden)

        def masked(self, logits, observations):
            return puffer_jax.mask_logits(logits, observations["action_mask"])

    env = env_of(action=Discrete(5))
    core = puffer_jax.GRU(4, 4, rngs=nnx.Rngs(1))
    policy = puffer_jax.Recurrent(env, Custom(nnx.Rngs(0)), core, rngs=None)
    observations = drawn(4) | {"action_mask": np.array([[1, 0, 1, 0, 1]] * 4, np.int8)}
    assert env_spec(env).single_action_space.n == 5
    logits, *_ = policy.forward_eval(observations)
    np.testing.assert_array_equal(np.isneginf(logits), observations["action_mask"] == 0)
