"""`MLP`: the same function as its torch twin, its names, sizes, errors."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import reference as ref

import puffer_jax
from puffer_jax.parity import compare
from puffer_jax.parity.reference import reference_policy
from puffer_jax.spaces import Box, Discrete, MultiDiscrete

ACTIONS = {
    "discrete": Discrete(3),
    "multidiscrete": MultiDiscrete((2, 3)),
    "box": Box(-1, 1, (2,), np.float32),
}
KEYS = {
    True: ["actor.0", "actor.2", "critic.0", "critic.2", "decoder", "value"],
    False: ["encoder.0", "encoder.2", "decoder", "value"],
}

pytestmark = [pytest.mark.needs_reference, pytest.mark.usefixtures("quick")]


def env_of(action="discrete"):
    observation = Box(-1, 1, (5,), np.float32)
    return SimpleNamespace(observation_space=observation, action_space=ACTIONS[action])


def mlp(action="discrete", **options):
    return puffer_jax.MLP(env_of(action), (16, 8), **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "action, activation, separate, recurrent",
    [
        ("discrete", "tanh", True, False),
        ("multidiscrete", "relu", False, False),
        ("box", "gelu", True, True),
        ("box", "silu", False, False),
        ("discrete", "elu", False, True),
    ],
)
def test_it_is_its_torch_twin(action, activation, separate, recurrent):
    policy = mlp(action, activation=activation, separate=separate)
    shape = (64, 5)
    if recurrent:
        size = policy.hidden_size
        policy = puffer_jax.LSTMWrapper(env_of(action), policy, size, size, rngs=nnx.Rngs(1))
        shape = (16, 4, 5)
    ref.torch.manual_seed(0)
    twin = reference_policy(policy)
    puffer_jax.load_state_dict(policy, twin.state_dict())
    compare(twin, policy, np.random.default_rng(0).standard_normal(shape)).assert_close()


@pytest.mark.parametrize("separate", [True, False])
def test_names_and_sizes(separate, tmp_path):
    policy = mlp(separate=separate)
    names = {key.rpartition(".")[0]: None for key in puffer_jax.state_dict(policy)}
    assert list(names) == KEYS[separate]
    assert policy.hidden_size == policy.encode_observations(jnp.ones((2, 5))).shape[1]
    read = puffer_jax.policy_from_checkpoint(
        puffer_jax.state_dict(policy), env_of(), activation="tanh"
    )
    assert (read.hidden_sizes, read.separate) == ((16, 8), separate)
    puffer_jax.save_weights(policy, tmp_path / "m.safetensors")
    read = puffer_jax.policy_from_checkpoint(tmp_path / "m.safetensors")
    x = np.ones((2, 5), np.float32)
    assert all(np.array_equal(a, b) for a, b in zip(read(x), policy(x), strict=True))


def test_trunks_share_nothing():
    graphdef, params = puffer_jax.split(mlp())
    gradient = jax.grad(lambda p: puffer_jax.merge(graphdef, p)(jnp.ones((2, 5)))[1].sum())(params)
    assert all((g == 0).all() for g in jax.tree.leaves(gradient["actor"]))
    assert any((g != 0).any() for g in jax.tree.leaves(gradient["critic"]))


def test_initial_weights_are_orthogonal():
    policy = puffer_jax.MLP(env_of(), (64, 64), rngs=nnx.Rngs(0))
    kernel = policy.actor.layers[2].kernel[...]
    np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(64), atol=1e-5)
    head = policy.decoder.kernel[...]
    np.testing.assert_allclose(head.T @ head, 1e-4 * np.eye(3), atol=1e-9)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"one or more widths; got \(\)"):
        puffer_jax.MLP(env_of(), (), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"one or more widths; got \(8, 0\)"):
        puffer_jax.MLP(env_of(), (8, 0), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"no such activation: tahn \(did you mean tanh\?\)"):
        puffer_jax.MLP(env_of(), activation="tahn", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="do not tell the activation; pass activation='tanh' or"):
        puffer_jax.policy_from_checkpoint(puffer_jax.state_dict(mlp()), env_of())


def test_what_auto_chooses():
    def chosen(observation, action):
        env = SimpleNamespace(observation_space=observation, action_space=action)
        policy = nnx.eval_shape(lambda: puffer_jax.environments.Policy(env, rngs=nnx.Rngs(0)))
        return type(policy).__name__, getattr(policy, "downsample", None)

    def image(*shape):
        return Box(0, 255, shape, np.uint8)

    flat, two, box = Box(-1, 1, (5,), np.float32), Discrete(2), ACTIONS["box"]
    assert chosen(flat, two) == ("Default", None)
    assert chosen(flat, box) == ("MLP", None)
    assert chosen(image(64, 64, 3), two) == ("ProcgenResnet", None)
    assert chosen(image(4, 84, 84), two) == ("Convolutional", 1)
    assert chosen(image(210, 160, 3), two) == ("Convolutional", 1)
    assert chosen(image(480, 640, 3), two) == ("Convolutional", 5)
    assert chosen(image(7, 7, 3), two) == ("Default", None)
    assert chosen(image(96, 96, 3), box) == ("Default", None)


@pytest.mark.parametrize("shape, last", [((3, 96, 80), False), ((96, 80, 3), True)])
def test_convolutional_works_out_its_sizes(shape, last):
    env = SimpleNamespace(observation_space=Box(0, 255, shape, np.uint8), action_space=Discrete(2))
    policy = puffer_jax.Convolutional(env, rngs=nnx.Rngs(0))
    assert (policy.framestack, policy.channels_last) == (3, last)
    assert policy(np.zeros((2, *shape), np.uint8))[0].shape == (2, 2)
    assert policy.flat_size == 64 * 8 * 6
