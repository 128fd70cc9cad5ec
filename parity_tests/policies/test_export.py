"""Policies leave JAX through `jax.export`: strings for keys, XLA's operations, any tracers."""

from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import puffer_jax

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def policy():
    space = SimpleNamespace(shape=(4,), low=0, high=1, dtype=np.float32)
    env = SimpleNamespace(observation_space=space, action_space=SimpleNamespace(n=3))
    inner = puffer_jax.Default(env, 8, rngs=nnx.Rngs(0))
    return puffer_jax.LSTMWrapper(env, inner, 8, 8, rngs=nnx.Rngs(1))


def test_a_policy_is_exported_with_its_parameters_as_an_argument(policy):
    graphdef, params = puffer_jax.split(policy)
    arguments = params, jnp.ones((2, 4), jnp.float32), policy.initial_state(2)

    def act(params, observations, state):
        return puffer_jax.merge(graphdef, params).forward_eval(observations, state)

    with puffer_jax.kernels.use("xla"):
        exported = jax.export.export(jax.jit(act))(*arguments)
        expected = act(*arguments)
    assert "custom_call" not in exported.mlir_module()
    for ours, theirs in zip(
        jax.tree.leaves(expected), jax.tree.leaves(exported.call(*arguments)), strict=True
    ):
        np.testing.assert_allclose(theirs, ours, atol=2e-6)
    # What serialisation cannot write down: any other keys.
    paths = jax.tree_util.tree_leaves_with_path(params)
    keys = [key.key for path, _ in paths for key in path]
    assert all(type(key) is str for key in keys) and "0" in keys


def test_keys_of_lists_may_be_numbers(policy):
    """As version 0.1 gave them, say in a pickle of somebody's."""
    graphdef, params = puffer_jax.split(policy)
    encoder = params["policy"]["encoder"]["layers"]
    inner = params["policy"] | {"encoder": {"layers": {0: encoder["0"]}}}
    old = puffer_jax.merge(graphdef, params | {"policy": inner})
    for name, array in puffer_jax.state_dict(policy).items():
        np.testing.assert_array_equal(puffer_jax.state_dict(old)[name], array)
    with pytest.raises(ValueError, match=r"missing: policy\.encoder\.layers\.0\.bias"):
        puffer_jax.merge(graphdef, params | {"policy": inner | {"encoder": {}}})


def test_more_than_ten_layers_keep_their_places():
    """As strings, "10" comes before "2"."""
    layers = nnx.Sequential(*(nnx.Linear(1, 1, rngs=nnx.Rngs(i)) for i in range(12)))
    for i, layer in enumerate(layers.layers):
        layer.bias[...] = jnp.full(1, i, jnp.float32)
    merged = puffer_jax.merge(*puffer_jax.split(layers))
    assert [float(layer.bias[0]) for layer in merged.layers] == list(range(12))


def test_a_carry_needs_nothing_but_a_shape(policy):
    carry = {name: SimpleNamespace(shape=(2, 8)) for name in ("lstm_h", "lstm_c")}
    assert policy._carried(carry, 2) == carry
    with pytest.raises(
        ValueError, match=r"state\['lstm_.'\] has shape \(2, 8\); expected .*\(3, 8\)"
    ):
        policy._carried(carry, 3)
