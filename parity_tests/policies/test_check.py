"""check_policy: the built-in policies keep every rule, and a broken one fails exactly its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from support import reference as ref

import puffer_jax
from puffer_jax.policies.check import check_policy
from puffer_jax.policies.check import run as check_run

pytestmark = pytest.mark.usefixtures("quick")

ENV = ref.stub_env(Box(-1, 1, (5,)), Discrete(3))
CONTINUOUS = ref.stub_env(Box(-np.inf, np.inf, (4,)), Box(-1, 1, (2,)))
MIXED = Dict(
    image=Box(0, 255, (2, 3), np.uint8),
    number=Discrete(4, start=-1),
    flags=MultiBinary(3),
    pair=Tuple((Box(-2, np.inf, (2,)), MultiDiscrete([3, 2]))),
)
CARTPOLE = Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (4,))


def rngs():
    return nnx.Rngs(0)


def text(report):
    """The report without its line breaks."""
    return " ".join(str(report).split())


# --- policies that keep the rules --------------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [
        ENV,
        CONTINUOUS,
        ref.stub_env(CARTPOLE, MultiDiscrete([2, 1, 3])),
        ref.stub_env(Discrete(6), Discrete(2)),
        ref.stub_env(MultiDiscrete([3, 2]), Discrete(2)),
        ref.stub_env(MIXED, Discrete(2)),
        ref.emulated(MIXED, Discrete(2)),
        ref.emulated(Dict(a=Box(-1, 1, (3,)), b=Box(-1, 1, (2,))), Discrete(2)),
    ],
    ids=["box", "continuous", "cartpole", "discrete", "multidiscrete", "dict", "bytes", "floats"],
)
def test_default_passes(env):
    policy = ref.generic(lambda: puffer_jax.Default(env, 16, rngs=rngs()))
    report = check_policy(policy, env, raise_on_failure=True)
    assert {c.result for c in report.checks} == {"ok"}
    assert len(report.checks) == 15


@pytest.mark.tree
def test_lstm_passes():
    def build():
        policy = puffer_jax.Default(ENV, 16, rngs=rngs())
        return puffer_jax.LSTMWrapper(ENV, policy, 16, 16, rngs=rngs())

    policy = ref.generic(build)
    report = check_policy(policy, ENV, raise_on_failure=True)
    assert {c.result for c in report.checks} == {"ok"}
    assert [c.name for c in report.checks][-5:] == ["rows", "gradients", "time", "done", "weights"]


def test_bfloat16_passes():
    policy = ref.generic(lambda: puffer_jax.Default(ENV, 16, rngs=rngs(), dtype=jnp.bfloat16))
    assert check_policy(policy, ENV).ok


def test_convolutional_passes():
    env = ref.stub_env(Box(0, 255, (1, 36, 36), np.uint8), Discrete(3))
    sizes = {"framestack": 1, "flat_size": 64, "hidden_size": 32, "output_size": 32}
    policy = ref.generic(lambda: puffer_jax.Convolutional(env, **sizes, rngs=rngs()))
    assert check_policy(policy, env, raise_on_failure=True, batch_size=3).ok


def test_procgen_resnet_passes():
    env = ref.stub_env(Box(0, 255, (9, 8, 3), np.uint8), Discrete(3))
    policy = ref.generic(lambda: puffer_jax.ProcgenResnet(env, 2, 16, rngs=rngs()))
    assert check_policy(policy, env, raise_on_failure=True, batch_size=3).ok


# --- policies that break one -------------------------------------------------------------------


class Custom(nnx.Module):
    is_continuous = False

    def __init__(self, width=3):
        self.hidden_size = 8
        self.encoder = nnx.Linear(5, 8, rngs=rngs())
        self.actor = nnx.Linear(8, width, rngs=rngs())
        self.critic = nnx.Linear(8, 1, rngs=rngs())

    def encode_observations(self, observations, state=None):
        return jnp.tanh(self.encoder(jnp.asarray(observations)))

    def decode_actions(self, hidden):
        return self.actor(hidden), self.critic(hidden)


class NoDecoder(nnx.Module):
    hidden_size, is_continuous = 5, False

    def encode_observations(self, observations, state=None):
        return observations


class NoHiddenSize(Custom):
    def __init__(self):
        super().__init__()
        del self.hidden_size


class WrongHiddenSize(Custom):
    def __init__(self):
        super().__init__()
        self.hidden_size = 9


class SaysContinuous(Custom):
    is_continuous = True


class FlatValues(Custom):
    def decode_actions(self, hidden):
        return self.actor(hidden), self.critic(hidden)[:, 0]


class ListOfLogits(Custom):
    def decode_actions(self, hidden):
        return [self.actor(hidden)], self.critic(hidden)


class NoState(Custom):
    def encode_observations(self, observations):
        return super().encode_observations(observations)


class Blind(Custom):
    def __init__(self):
        super().__init__()
        self.encoder = nnx.Param(jnp.ones((1, 8)))

    def encode_observations(self, observations, state=None):
        return jnp.repeat(self.encoder[...], len(observations), axis=0)


class BlindCritic(Custom):
    def decode_actions(self, hidden):
        return self.actor(hidden), self.critic(jnp.ones_like(hidden))


class Unused(Custom):
    def __init__(self):
        super().__init__()
        self.forgotten = nnx.Linear(8, 8, rngs=rngs())


class Overflow(Custom):
    def encode_observations(self, observations, state=None):
        hidden = super().encode_observations(observations)
        return hidden / (1 - jnp.asarray(observations).min(-1, keepdims=True))


class NormAtZero(Custom):
    def encode_observations(self, observations, state=None):
        hidden = super().encode_observations(observations)
        return hidden * jnp.sqrt((hidden**2).sum(-1, keepdims=True))


class BatchMean(Custom):
    def encode_observations(self, observations, state=None):
        hidden = super().encode_observations(observations)
        return hidden - 0.01 * hidden.mean(0)


class RowNumber(Custom):
    def encode_observations(self, observations, state=None):
        hidden = super().encode_observations(observations)
        return hidden + jnp.arange(len(hidden))[:, None]


class Squeezed(Custom):
    def encode_observations(self, observations, state=None):
        return super().encode_observations(observations).squeeze()


class BranchOnData(Custom):
    def encode_observations(self, observations, state=None):
        hidden = super().encode_observations(observations)
        return hidden if hidden.sum() > -1e9 else 2 * hidden


class Counting(Custom):
    calls = 0

    def encode_observations(self, observations, state=None):
        self.calls += 1
        return super().encode_observations(observations)


NOISE = np.random.default_rng(0)


class Noisy(Custom):
    def encode_observations(self, observations, state=None):
        return super().encode_observations(observations) + NOISE.standard_normal()


class Dropout(Custom):
    def __init__(self):
        super().__init__()
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))

    def encode_observations(self, observations, state=None):
        return self.dropout(super().encode_observations(observations))


class OtherForward(Custom):
    def forward_eval(self, observations, state=None):
        logits, values = self.decode_actions(self.encode_observations(observations))
        return logits, 2 * values


BROKEN = [
    (NoDecoder, "methods", "define decode_actions"),
    (NoHiddenSize, "attributes", "hidden_size is missing; set self.hidden_size"),
    (SaysContinuous, "attributes", "set self.is_continuous = False"),
    (WrongHiddenSize, "hidden", "gives (8, 8); it should give (batch, hidden_size) = (8, 9)"),
    (lambda: Custom(4), "logits", "logits (8, 3); decode_actions gives logits (8, 4)"),
    (FlatValues, "values", "values are (8,); they should be (batch, 1) = (8, 1)"),
    (ListOfLogits, "forward", "logits is a list; return (logits, values)"),
    (NoState, "forward", "TypeError: "),
    (Blind, "observation", "logits and values do not depend on the observation"),
    (BlindCritic, "observation", "values do not depend on the observation"),
    (Unused, "gradients", "no gradient reaches forgotten.weight, forgotten.bias; use them"),
    (
        Overflow,
        "finite",
        "NaN, infinity or a scale <= 0 in logits on highest observations; values on",
    ),
    (NormAtZero, "gradients", "the gradient of encoder.weight, encoder.bias is not finite"),
    (BatchMean, "rows", "a row's logits, values depends on what the other rows hold"),
    (RowNumber, "rows", "a row's logits, values depends on its place in the batch"),
    (Squeezed, "rows", "a row's logits, values depends on the size of the batch"),
    (BranchOnData, "jit", "TracerBoolConversionError: Attempted boolean conversion"),
    (Counting, "pure", "a call changes the policy's attributes"),
    (Noisy, "pure", "the same observations gave other logits, values"),
    (Dropout, "parameters", "dropout.rngs"),
    (OtherForward, "agreement", "forward_eval(x, state) gives other values"),
]


@pytest.mark.parametrize(("make", "failing", "reason"), BROKEN)
def test_broken_policy_fails_its_own_check(make, failing, reason):
    report = check_policy(make(), ENV)
    assert report.failures == (failing,), str(report)
    assert reason in text(report)


@pytest.mark.tree
def test_custom_policy_passes_and_is_left_alone():
    policy = Custom()
    before = puffer_jax.split(policy)
    assert check_policy(policy, ENV).ok
    after = puffer_jax.split(policy)
    assert before[0] == after[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


def test_masked_logits_are_finite_enough():
    class Masked(Custom):
        def decode_actions(self, hidden):
            logits, values = super().decode_actions(hidden)
            return jnp.where(jnp.array([True, True, False]), logits, -jnp.inf), values

    assert check_policy(Masked(), ENV).ok


def test_continuous_logits():
    class Scale(Custom):
        is_continuous = True
        scale = 0.5

        def decode_actions(self, hidden):
            return puffer_jax.Normal(self.actor(hidden), jnp.full((1, 3), self.scale)), self.critic(
                hidden
            )

    class NegativeScale(Scale):
        scale = -0.5

    env = ref.stub_env(Box(-1, 1, (5,)), Box(-1, 1, (3,)))
    assert check_policy(Scale(), env).ok
    assert check_policy(NegativeScale(), env).failures == ("finite", "gradients")
    report = check_policy(Scale(), ref.stub_env(Box(-1, 1, (5,)), Box(-1, 1, (2,))))
    assert report.failures == ("logits",)
    assert "puffer_jax.Normal(loc, scale)" in text(report)


def test_multidiscrete_logits_are_a_tuple():
    report = check_policy(Custom(), ref.stub_env(Box(-1, 1, (5,)), MultiDiscrete([2, 1])))
    assert report.failures == ("logits",)
    assert "a tuple with one array (batch, n) for each component: logits[0] (8, 2)," in text(report)


def test_layer_without_torch_counterpart_is_only_a_warning():
    class Bilinear(Custom):
        def __init__(self):
            super().__init__()
            self.bilinear = nnx.Einsum("bi,ij->bj", (8, 8), rngs=rngs())
            self.unused = nnx.Einsum("bi,ij->bj", (8, 8), rngs=rngs())

        def decode_actions(self, hidden):
            return super().decode_actions(self.bilinear(hidden))

    report = check_policy(Bilinear(), ENV)
    assert report.failures == ("gradients",)
    reasons = {c.name: c.reason for c in report.checks}
    assert "no gradient reaches unused.kernel; " in reasons["gradients"]
    assert [c.result for c in report.checks if c.name == "weights"] == ["warning"]
    assert "no torch rule for this Einsum" in reasons["weights"]


# --- recurrent ---------------------------------------------------------------------------------


class Recurrent(Custom):
    """A leaky integrator between encoder and heads."""

    state_dtype = jnp.float32

    def initial_state(self, batch):
        return {"h": jnp.zeros((batch, 8), jnp.float32)}

    def forward_eval(self, observations, state=None):
        state = self.initial_state(len(observations)) if state is None else state
        h = jnp.tanh(state["h"] + self.encode_observations(observations))
        return *self.decode_actions(h), {"h": h.astype(self.state_dtype)}

    def forward(self, observations, state=None, done=None):
        batch, time = observations.shape[:2]
        state = self.initial_state(batch) if state is None else state
        steps = []
        for t in range(time):
            state = self.before(state, None if done is None else done[:, t])
            logits, values, state = self.forward_eval(observations[:, t], state)
            steps.append((logits, values))
        logits, values = (jnp.stack(x, 1) for x in zip(*steps, strict=True))
        return logits.reshape(batch * time, -1), values.reshape(batch, time), state

    def before(self, state, done):
        return state if done is None else {"h": jnp.where(done[:, None], 0, state["h"])}


class Forgetful(Recurrent):
    def before(self, state, done):
        return state


class Amnesiac(Recurrent):
    def before(self, state, done):
        return self.initial_state(len(state["h"]))


class Widening(Recurrent):
    state_dtype = jnp.float64


class TimeFirst(Recurrent):
    def forward(self, observations, state=None, done=None):
        logits, values, state = super().forward(observations, state, done)
        return logits.reshape(*values.shape, -1).swapaxes(0, 1).reshape(logits.shape), values, state


@pytest.mark.parametrize(
    ("make", "failing", "reason"),
    [
        (Recurrent, (), ""),
        (Forgetful, ("done",), "start from initial_state before each observation"),
        (Amnesiac, ("time",), "gives other logits, values than steps of forward_eval"),
        (Widening, ("carry",), "state['h'] (8, 8) float32; forward_eval gives state['h'] (8, 8) f"),
        (TimeFirst, ("time",), "gives other logits than steps of forward_eval"),
    ],
)
def test_recurrent(make, failing, reason):
    report = check_policy(make(), ENV)
    assert report.failures == failing, str(report)
    assert reason in text(report)


def test_a_state_that_causes_a_retrace():
    class Weak(Recurrent):
        def initial_state(self, batch):
            return {"h": jax.lax.full((batch, 8), 0.0)}

    assert Weak().initial_state(2)["h"].weak_type
    with jax.enable_x64(False):
        report = check_policy(Weak(), ENV)
    assert report.failures == ("jit",), str(report)
    assert "traced again; give the arrays of initial_state an explicit dtype" in text(report)


# --- the report --------------------------------------------------------------------------------


def test_report_reads_well():
    report = check_policy(WrongHiddenSize(), ENV)
    assert not report.ok
    first, *lines = str(report).splitlines()
    assert first == "WrongHiddenSize acting in Discrete(n=3): 1 FAILED"
    assert lines[3] == "  forward      ok       runs on zero, extreme and random observations"
    assert max(map(len, lines)) <= 100
    assert str(check_policy(Custom(), ENV)).startswith("Custom acting in Discrete(n=3): ok\n")


def test_checks_that_cannot_run_say_why():
    report = check_policy(NoDecoder(), ENV)
    results = {c.name: (c.result, c.reason) for c in report.checks}
    assert results["forward"] == ("not run", "it needs: methods")
    assert results["gradients"] == ("not run", "it needs: jit")
    assert results["parameters"][0] == results["weights"][0] == "ok"


def test_raise_on_failure():
    report = check_policy(FlatValues(), ENV)
    with pytest.raises(ValueError, match="values are") as raised:
        check_policy(FlatValues(), ENV, raise_on_failure=True)
    assert str(raised.value) == str(report)


def test_faults_of_the_caller_are_raised():
    with pytest.raises(ValueError, match="batch_size is 1"):
        check_policy(Custom(), ENV, batch_size=1)
    with pytest.raises(ValueError, match="policies act in"):
        check_policy(Custom(), ref.stub_env(Box(-1, 1, (5,)), Box(-1, 1, (2, 2))))
    with pytest.raises(AttributeError, match="neither `single_observation_space`"):
        check_policy(Custom(), object())


# --- the observations --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", check_run._KINDS)
def test_observations_lie_in_the_space(kind):
    run = check_run._Run(Custom(), ref.stub_env(MIXED, Discrete(2)), 8, 0)
    x = jax.tree.map(np.asarray, run.observations[kind])
    for row in range(8):
        sample = jax.tree.map(lambda leaf, row=row: leaf[row], x)
        # gymnasium wants the very dtypes of the spaces.
        sample["number"] = np.int64(sample["number"])
        sample["pair"] = (sample["pair"][0], sample["pair"][1].astype(np.int64))
        assert MIXED.contains(sample)
    if kind == "highest":
        assert (x["image"] == 255).all() and (x["number"] == 2).all() and (x["flags"] == 1).all()
        assert (x["pair"][0] == 1e6).all() and (x["pair"][1] == [2, 1]).all()
    if kind == "lowest":
        assert (x["number"] == -1).all() and (x["pair"][0] == -2).all()
    if kind == "zero":
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(x))


def test_random_observations_reach_every_value():
    run = check_run._Run(Custom(), ref.stub_env(MIXED, Discrete(2)), 200, 0)
    x = run.observations["random"]
    assert set(x["number"].tolist()) == {-1, 0, 1, 2}
    assert set(x["flags"].ravel().tolist()) == {0, 1}
    assert x["image"].min() < 5 and x["image"].max() > 250
    assert np.ptp(x["pair"][0]) > 1.8


def test_emulated_bytes_hold_the_drawn_fields():
    env = ref.emulated(MIXED, Discrete(2))
    run = check_run._Run(Custom(), env, 4, 0)
    x = run.observations["highest"]
    assert x.dtype == np.uint8 and x.shape == (4, *env.single_observation_space.shape)
    fields = np.asarray(x).view(env.emulated["emulated_observation_dtype"])[:, 0]
    assert (fields["image"] == 255).all() and (fields["number"] == 1).all()
    assert (fields["pair"]["f0"] == 1e6).all() and (fields["pair"]["f1"] == 1).all()


def test_a_space_of_one_observation_is_no_fault_of_the_policy():
    class Bandit(Blind):
        pass

    assert check_policy(Bandit(), ref.stub_env(Discrete(1), Discrete(3))).ok
