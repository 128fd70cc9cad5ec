"""A policy's step as StableHLO: what it computes, with jax alone, and what it refuses."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import puffer_jax
from puffer_jax.export import export_step, load_step, onnx
from puffer_jax.export.step import _state_like, most_likely, plain, step_of
from puffer_jax.kernels.pooling import _max_pool_xla
from puffer_jax.spaces import Box, Dict, Discrete, MultiDiscrete

pytestmark = pytest.mark.usefixtures("quick")

# The same program, compiled in another context: sums of 8 numbers in another order.
CLOSE = {"rtol": 0, "atol": 2e-6}

BOX, MASKED = Box(-1, 1, (4,)), Box(0, 1, (3,), np.int8)


def env(observation, action):
    return SimpleNamespace(observation_space=observation, action_space=action)


@pytest.fixture(autouse=True)
def narrow():
    with jax.enable_x64(False):
        yield


def default(observation, action, **options):
    return puffer_jax.Default(env(observation, action), 8, rngs=nnx.Rngs(0), **options)


def assert_close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, expected)


@pytest.mark.parametrize(
    ("observation", "action", "options"),
    [
        (BOX, MultiDiscrete((2, 3)), {}),
        (BOX, Box(-1, 1, (2,)), {}),
        # The mask's rows were counted with len(), which knows no symbolic size.
        (Dict({"seen": BOX, "mask": MASKED}), Discrete(3), {"action_mask": "mask"}),
    ],
    ids=["components", "continuous", "a tree and its mask"],
)
def test_any_batch_of_a_policy_without_memory(tmp_path, observation, action, options):
    policy = default(observation, action, **options)
    export_step(policy, tmp_path / "step")
    step = load_step(tmp_path / "step")
    assert (step.batch, step.state, step.initial_state(2)) == (None, None, None)
    assert step.platforms == ("cpu", "cuda", "tpu")
    x = {"seen": np.ones((3, 4), np.float32), "mask": np.eye(3, dtype=np.int8)}
    x = x if options else x["seen"]
    with puffer_jax.kernels.use("xla"):
        logits, values = policy(x)
    assert_close(step(x), (plain(logits), values, None))
    assert step(jax.tree.map(lambda leaf: leaf[:2], x))[1].shape == (2, 1)


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("puffer_jax", "flax", "torch"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import jax, numpy as np
step = jax.export.deserialize(bytearray(open("step", "rb").read()))
state = {"lstm_h": np.ones((2, 8), np.float32), "lstm_c": np.zeros((2, 8), np.float32)}
action, values, state = step.call(np.ones((2, 4), np.float32), state)
np.savez("results.npz", action=action, values=values, **state)
assert not {"puffer_jax", "flax"} & set(sys.modules)
"""


def test_a_recurrent_policy_runs_with_jax_alone(tmp_path):
    spaces = env(BOX, Discrete(3))
    policy = puffer_jax.LSTMWrapper(spaces, default(BOX, Discrete(3)), 8, 8, rngs=nnx.Rngs(1))
    export_step(policy, tmp_path / "step", batch=2, output="action", platforms=("cpu",))
    code = BLOCKED.replace("import jax,", "import jax, jax.export,")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    results = dict(np.load(tmp_path / "results.npz"))
    state = {"lstm_h": jnp.ones((2, 8)), "lstm_c": jnp.zeros((2, 8))}
    with puffer_jax.kernels.use("xla"):
        logits, values, state = policy.forward_eval(jnp.ones((2, 4)), state)
    action = results.pop("action")
    assert action.dtype == np.int32 and action.tolist() == logits.argmax(-1).tolist()
    del state["hidden"]  # nobody reads it
    assert_close(results, {"values": values, **state})

    step = load_step(tmp_path / "step")
    assert step.batch == 2 and {*step.initial_state(2)} == {"lstm_h", "lstm_c"}
    with pytest.raises(ValueError, match=r"observations has shape \(3, 4\); expected \(2, 4\)"):
        step(np.ones((3, 4), np.float32))
    with pytest.raises(TypeError, match=r"observations is of uint8; expected float32"):
        step(np.ones((2, 4), np.uint8))
    with pytest.raises(ValueError, match=r"expected state.lstm_c, state.lstm_h; got state.h"):
        step(np.ones((2, 4), np.float32), {"h": np.ones((2, 8))})


def test_what_leaves_are_called_and_which_action_is_most_likely():
    loc = jnp.array([[0.5, -2.0]])
    squashed = puffer_jax.TanhNormal(loc, jnp.ones(()))
    assert plain(squashed)["tanh"]["scale"].shape == (1, 2)
    np.testing.assert_array_equal(most_likely(puffer_jax.Normal(loc, loc**2)), loc)
    np.testing.assert_array_equal(most_likely((loc, -loc)), [[0, 1]])
    assert plain(loc) is loc


class Custom(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(3))

    def __call__(self, observations):
        return observations["a"] * self.scale, observations["b"][0][:, None]


def test_observations_of_a_policy_of_your_own():
    with pytest.raises(ValueError, match=r"Custom does not tell its observations; give env="):
        step_of(Custom(), batch=None, output="logits", env=None, observations=None)
    observations = {"a": np.ones((2, 3), np.float64), "b": (np.arange(2, dtype=np.float32),)}
    step = step_of(Custom(), batch=5, output="logits", env=None, observations=observations)
    assert step.observations["a"].shape == (5, 3) and step.observations["a"].dtype == np.float32
    drawn, _ = step.draw(5, np.random.default_rng(0))
    assert drawn["b"][0].tolist() == [0, 1, 0, 1, 0]
    assert step.function(drawn, None)[1].shape == (5, 1)


def test_a_state_that_does_not_start_from_zeros_is_refused():
    policy = SimpleNamespace(initial_state=lambda batch: {"h": jnp.ones((batch, 2))})
    with pytest.raises(ValueError, match=r"initial_state is not zero in state.h; episodes"):
        _state_like(policy, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "h5"}, "format is 'h5'; expected 'stablehlo' or 'onnx'"),
        ({"output": "sample"}, "output is 'sample'; expected 'logits' or 'action'"),
        ({"batch": 0}, "batch is 0; expected a positive number, or None for any"),
        ({"env": env(BOX, Discrete(3)), "observations": np.ones((1, 4))}, "env or observations"),
        ({"observations": np.ones(())}, "observations have no batch axis"),
        ({"platforms": ("gpu",)}, "platforms are gpu; expected some of cpu, cuda, rocm, tpu"),
        ({"platforms": ()}, "platforms are none"),
    ],
)
def test_arguments_that_are_none(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_step(Custom(), tmp_path / "step", **options)
    assert not [*tmp_path.iterdir()]


def test_files_that_are_no_steps(tmp_path):
    (tmp_path / "step").write_bytes(b"no program at all, but long enough to look at")
    with pytest.raises(ValueError, match=r"is not a whole file of jax\.export"):
        load_step(tmp_path / "step")
    with pytest.raises(FileNotFoundError):
        load_step(tmp_path / "missing")
    square = jax.export.export(jax.jit(lambda x: x * x))(jnp.ones(3))
    (tmp_path / "step").write_bytes(square.serialize())
    with pytest.raises(ValueError, match=r"holds no step: expected a function of \(observations"):
        load_step(tmp_path / "step")


def test_without_jax2onnx_the_message_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ImportError, match=r"ONNX needs jax2onnx: pip install 'puffer_jax\[onnx\]'"):
        export_step(Custom(), tmp_path / "step.onnx", format="onnx")


def test_pooling_for_onnx_is_ours():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 3))
    np.testing.assert_array_equal(onnx._max_pool(x), _max_pool_xla(x))
    np.testing.assert_array_equal(onnx._max_pool(x[:, :4, :5]), _max_pool_xla(x[:, :4, :5]))
