"""Recurrent policies with a core other than PufferLib's LSTM: torch's GRU is the judge."""

import math
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from gymnasium.spaces import Box, Discrete
from support.bars import BARS, relative_error, stub_env

import puffer_jax
from puffer_jax.nn.cores import CORES, Core
from puffer_jax.parity.comparison import compare
from puffer_jax.parity.reference import reference_policy
from puffer_jax.policies import is_recurrent
from puffer_jax.policies.recurrent import with_core

pytestmark = pytest.mark.usefixtures("quick")

BATCH, TIME, INPUTS, HIDDEN = 5, 7, 6, 9
ENV = stub_env(Box(-1, 1, (4,)), Discrete(3))
FORWARD, GRADIENT = BARS["forward"]["float64"], BARS["gradient"]["float64"]


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def gru(seed=0, dtype=jnp.float64, inputs=INPUTS):
    return puffer_jax.GRU(inputs, HIDDEN, rngs=nnx.Rngs(seed), param_dtype=dtype)


def torch_gru(core):
    twin = torch.nn.GRU(INPUTS, HIDDEN, batch_first=True, dtype=torch.float64)
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in puffer_jax.state_dict(core).items()})
    return twin


def policy(core="gru", seed=0, param_dtype=jnp.float32):
    options = {"rngs": nnx.Rngs(seed), "param_dtype": param_dtype}
    return with_core(core, ENV, puffer_jax.Default(ENV, HIDDEN, **options), **options)


class Twin(torch.nn.Module):
    """What PufferLib's LSTMWrapper would be with a GRU."""

    def __init__(self, inner):
        super().__init__()
        self.policy = inner
        self.gru = torch.nn.GRU(HIDDEN, HIDDEN)
        self.cell = torch.nn.GRUCell(HIDDEN, HIDDEN)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.cell, name, getattr(self.gru, f"{name}_l0"))

    def forward_eval(self, observations, state):
        h = self.cell(self.policy.encode_observations(observations), state["gru_h"])
        state["hidden"] = state["gru_h"] = h
        return self.policy.decode_actions(h)

    def forward(self, observations, state):
        batch, time = observations.shape[:2]
        encoded = self.policy.encode_observations(observations.flatten(0, 1))
        hidden, h = self.gru(encoded.reshape(batch, time, -1).transpose(0, 1), state["gru_h"])
        hidden = hidden.transpose(0, 1)
        logits, values = self.policy.decode_actions(hidden.flatten(0, 1))
        state |= {"hidden": hidden, "gru_h": h}
        return logits, values.reshape(batch, time)


def twin(ours):
    inner = SimpleNamespace(policy=ours.policy, env_spec=ours.env_spec)
    torch.manual_seed(0)
    return Twin(reference_policy(inner.policy))


def bits(module):
    return {name: (x.dtype, x.tobytes()) for name, x in puffer_jax.state_dict(module).items()}


# --- the layer ----------------------------------------------------------------------------------


def test_gru_is_torchs_forward_and_backward():
    core = gru()
    theirs = torch_gru(core)
    x, h, weights = normal(BATCH, TIME, INPUTS), normal(BATCH, HIDDEN), normal(BATCH, TIME, HIDDEN)
    tx, th = (torch.from_numpy(a).requires_grad_() for a in (x, h))
    outputs, last = theirs(tx, th[None])
    loss = (outputs * torch.from_numpy(weights)).sum() + last.square().sum()
    expected = torch.autograd.grad(loss, [tx, th, *theirs.parameters()])
    graphdef, params = puffer_jax.split(core)

    def ours(x, h, params):
        y, state = puffer_jax.merge(graphdef, params).scan(x, {"gru_h": h})
        return (y * weights).sum() + jnp.square(state["gru_h"]).sum(), (y, state["gru_h"])

    gradients, found = jax.jit(jax.grad(ours, (0, 1, 2), has_aux=True))(x, h, params)
    assert relative_error(found[0], outputs.detach()) <= FORWARD
    assert relative_error(found[1], last[0].detach()) <= FORWARD
    ours_by_name = puffer_jax.state_dict(puffer_jax.merge(graphdef, gradients[2]))
    assert list(ours_by_name) == [name for name, _ in theirs.named_parameters()]
    errors = map(relative_error, [*gradients[:2], *ours_by_name.values()], expected)
    assert max(errors) <= GRADIENT


def test_gru_step_is_torchs_cell_and_scan_repeats_it():
    core = gru(1)
    cell = torch.nn.GRUCell(INPUTS, HIDDEN, dtype=torch.float64)
    cell.load_state_dict(
        {k.removesuffix("_l0"): torch.from_numpy(v) for k, v in puffer_jax.state_dict(core).items()}
    )
    x, h = normal(BATCH, TIME, INPUTS, seed=1), normal(BATCH, HIDDEN, seed=1)
    x, h, done = map(jnp.asarray, (x, h, normal(BATCH, TIME) > 0.3))
    assert done.any() and not done.all()
    state, expected, steps = {"gru_h": h}, torch.from_numpy(np.array(h)), []
    for t in range(TIME):
        going_on = ~done[:, t, None]
        state = {"gru_h": state["gru_h"] * going_on}
        y, state = core.step(x[:, t], state)
        expected = cell(
            torch.from_numpy(np.array(x[:, t])), expected * torch.from_numpy(np.array(going_on))
        )
        assert relative_error(y, expected.detach()) <= FORWARD
        np.testing.assert_array_equal(y, state["gru_h"])
        steps.append(y)
    outputs, last = core.scan(x, {"gru_h": h}, done)
    assert relative_error(outputs, jnp.stack(steps, 1)) <= FORWARD
    assert relative_error(last["gru_h"], state["gru_h"]) <= FORWARD


def test_gru_is_initialised_as_torchs():
    assert isinstance(gru(), Core) and list(CORES) == ["lstm", "gru", "mingru"]
    for name, weight in puffer_jax.state_dict(gru(inputs=200)).items():
        bound = 1 / math.sqrt(HIDDEN)
        assert bound * 0.85 < np.abs(weight).max() <= bound, name
        if name == "weight_ih_l0":
            assert relative_error(weight.std(), bound / math.sqrt(3)) < 0.03


def test_gru_in_bfloat16_keeps_its_states():
    core = puffer_jax.GRU(INPUTS, HIDDEN, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    exact = gru(dtype=jnp.float32)
    x = jnp.asarray(normal(BATCH, TIME, INPUTS), jnp.float32)
    y, state = core.scan(x, core.initial_state(BATCH))
    assert y.dtype == state["gru_h"].dtype == jnp.float32
    error = relative_error(y, exact.scan(x, exact.initial_state(BATCH))[0])
    assert 1e-5 < error < 3e-2


# --- the policy ---------------------------------------------------------------------------------


def test_the_policy_is_its_torch_twins():
    ours = policy()
    theirs = twin(ours)
    puffer_jax.load_state_dict(ours, theirs.state_dict())
    observations = normal(BATCH, TIME, 4).astype(np.float32)
    state = {"gru_h": normal(BATCH, HIDDEN).astype(np.float32)}
    for inputs in ((observations,), (observations, state), (observations, state, normal(5, 7) > 1)):
        report = compare(theirs, ours, *inputs)
        report.assert_close()
        assert not report.weights_differ and not report.not_compared
        layers = {row.name for row in report.of("layer")}
        assert {"gru", "policy.encoder.0", "policy.decoder"} <= layers
    gates = puffer_jax.state_dict(ours)["gru.bias_hh_l0"]
    gates[-1] += 1
    puffer_jax.load_state_dict(ours, {"gru.bias_hh_l0": gates}, strict=False)
    report = compare(theirs, ours, observations, state)
    assert report.weights_differ == ("gru.bias_hh_l0",) and report.first_difference == "gru"


def test_scan_is_repeated_steps_and_done_resets():
    ours = policy(param_dtype=jnp.float64)
    x, done = normal(BATCH, TIME, 4), normal(BATCH, TIME, seed=3) > 0.3
    state = ours.initial_state(BATCH)
    assert list(state) == ["hidden", "gru_h"] and is_recurrent(ours)
    logits, values, last = ours.forward(x, state, done)
    assert last["hidden"].shape == (BATCH, TIME, HIDDEN)
    for t in range(TIME):
        state = jax.tree.map(lambda s: s * ~done[:, t, None], state)  # noqa: B023
        step_logits, step_values, state = ours.forward_eval(x[:, t], state)
        assert relative_error(logits.reshape(BATCH, TIME, -1)[:, t], step_logits) <= FORWARD
        assert relative_error(values[:, t : t + 1], step_values) <= FORWARD
    assert relative_error(last["gru_h"], state["gru_h"]) <= FORWARD
    with pytest.raises(ValueError, match=r"gru_h'\] has shape \(4, 9\); expected .*\(5, 9\)"):
        ours.forward_eval(x[:, 0], {"gru_h": normal(4, HIDDEN)})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_a_checkpoint_is_recognised(suffix, tmp_path):
    ours, path = policy(seed=1), tmp_path / f"x{suffix}"
    theirs = twin(ours)
    assert list(puffer_jax.state_dict(ours)) == list(theirs.state_dict())
    puffer_jax.save_weights(ours, path)
    if suffix == ".pt":
        theirs.load_state_dict(torch.load(path, weights_only=True))
        torch.save(theirs.state_dict(), path)
    found = puffer_jax.policy_from_checkpoint(path)
    assert type(found) is puffer_jax.Recurrent and type(found.core) is puffer_jax.GRU
    assert bits(found) == bits(ours)
    assert puffer_jax.split(found)[0].shapes == puffer_jax.split(ours)[0].shapes


@pytest.mark.parametrize("core", [name for name, core in CORES.items() if core.cell_names])
def test_of_tied_keys_one_is_enough(core):
    ours = policy(core, seed=2)
    tensors = puffer_jax.state_dict(ours)
    cell = {name: x for name, x in tensors.items() if not name.startswith(f"{core}.")}
    assert bits(puffer_jax.policy_from_checkpoint(cell)) == bits(ours)


class Leaky(nnx.Module):
    """A user's own core."""

    name = "leak"
    input_size = hidden_size = HIDDEN
    param_dtype = jnp.float32

    def __init__(self):
        self.rate = nnx.Param(jnp.full(HIDDEN, 0.5))

    def initial_state(self, batch_size):
        return {"leak": jnp.zeros((batch_size, HIDDEN))}

    def step(self, x, state):
        y = x + self.rate[...] * state["leak"]
        return y, {"leak": y}

    def scan(self, x, state, done=None):
        raise NotImplementedError


def test_a_core_of_ones_own(tmp_path):
    inner = puffer_jax.Default(ENV, HIDDEN, rngs=nnx.Rngs(0))
    before = bits(inner)
    ours = puffer_jax.Recurrent(ENV, inner, Leaky(), rngs=None)
    assert bits(ours.policy) == before and "leak.rate" in puffer_jax.state_dict(ours)
    logits, _, state = ours.forward_eval(jnp.ones((2, 4)))
    assert logits.shape == (2, 3) and state["leak"].shape == (2, HIDDEN)
    puffer_jax.save_weights(ours, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"custom core, .*Leaky; build it yourself"):
        puffer_jax.policy_from_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="Recurrent's input_size is 9 but Default's hidden_size"):
        puffer_jax.Recurrent(
            ENV, puffer_jax.Default(ENV, 8, rngs=nnx.Rngs(0)), Leaky(), rngs=nnx.Rngs(0)
        )
    with pytest.raises(ValueError, match="no such core: grru \\(did you mean gru"):
        with_core("grru", ENV, inner, rngs=nnx.Rngs(0))


# --- training -----------------------------------------------------------------------------------

CONFIG = {"bptt_horizon": 8, "batch_size": 32, "minibatch_size": 16, "total_timesteps": 160}


def trainer(kind, folder):
    config = {**CONFIG, "data_dir": str(folder), "checkpoint_interval": 2}
    if kind == "native":
        env = envs = puffer_jax.environments.make("cartpole")
        config["num_envs"] = 4
    else:
        envs = gymnasium.make_vec("CartPole-v1", num_envs=4, vectorization_mode="sync")
        env = envs
    rngs = nnx.Rngs(0)
    inner = puffer_jax.Default(env, HIDDEN, rngs=rngs)
    ours = with_core("gru", env, inner, rngs=rngs)
    config = puffer_jax.PuffeRLConfig.recommended(**config, optimizer="adam")
    return puffer_jax.PuffeRL(config, envs, ours)


def epochs(trainer, count):
    for _ in range(count):
        trainer.evaluate()
        trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["native", "host"])
def test_it_trains(kind, tmp_path):
    learner = trainer(kind, tmp_path)
    before = bits(learner.policy)
    epochs(learner, 3)
    after = bits(learner.policy)
    assert all(after[name] != before[name] for name in before)
    assert all(np.isfinite(loss) for loss in learner.losses.values())
    learner.close()


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole = epochs(trainer("native", tmp_path / "a"), 4)
    first = epochs(trainer("native", tmp_path / "b"), 2)
    first.save_checkpoint()
    second = trainer("native", tmp_path / "b")
    second.restore(first.run_folder)
    epochs(second, 2)
    assert bits(second.policy) == bits(whole.policy)
    moments = zip(*(jax.tree.leaves(t.state.opt_state) for t in (second, whole)), strict=True)
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in moments)


def test_a_state_of_any_shape_is_reset_where_an_episode_starts():
    state = {"h": jnp.ones((2, 3)), "layers": jnp.ones((2, 4, 3)), "count": jnp.ones(2)}
    reset = jax.jit(puffer_jax.reset_where)(jnp.array([False, True]), state)
    for name, part in reset.items():
        np.testing.assert_array_equal(part[0], state[name][0])
        np.testing.assert_array_equal(part[1], np.zeros(state[name].shape[1:]))
    assert puffer_jax.reset_where(np.zeros(2, bool), None) is None
    # As many layers as agents: the wrong axis would not be noticed by broadcasting.
    square = puffer_jax.reset_where(np.array([True, False]), jnp.ones((2, 2)))
    np.testing.assert_array_equal(square, [[0, 0], [1, 1]])
    with pytest.raises(ValueError, match=r"done has shape \(3,\), a part of the state \(2, 3\)"):
        puffer_jax.reset_where(np.zeros(3, bool), state["h"])
