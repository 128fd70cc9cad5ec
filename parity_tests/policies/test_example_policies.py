"""The policies of examples/policies/: each equals its torch twin and runs as users run it."""

import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from gymnasium.spaces import Discrete
from support import reference as ref
from torch import nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import puffer_jax
from puffer_jax.policies.check import check_policy

EXAMPLES = Path(__file__).parents[2] / "examples" / "policies"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "toy")
ROWS = 12


@pytest.fixture(scope="module", autouse=True)
def importable():
    """As for `python examples/policies/NAME.py`, whose folder is where it imports from."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(autouse=True)
def seeded():
    """The twins start from torch's own initialisation."""
    torch.manual_seed(0)


def example(name):
    return importlib.import_module(name)


# --- the twins -----------------------------------------------------------------------------------


class Twin(nn.Module):
    """What the actor-critics share; subclasses define `encode`."""

    def add_heads(self, hidden, actions):
        self.actor = nn.Linear(hidden, actions)
        self.critic = nn.Linear(hidden, 1)

    def decode(self, hidden):
        return self.actor(hidden), self.critic(hidden)

    def forward(self, x):
        return self.decode(self.encode(x))


class Basic(Twin):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.add_heads(64, 3)

    def encode(self, x):
        return self.encoder(x.flatten(1))


class Cnn(Twin):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(4, 32, 8, 4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 1 * 2, 128),
            nn.ReLU(),
        )
        self.add_heads(128, 4)

    def encode(self, x):
        return self.network(x.double() / 255)


class EfficientCnn(Twin):
    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(2, 16, 5, 3, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.project = nn.Linear(32 * 3 * 2, 128)
        self.add_heads(128, 2)

    def encode(self, x):
        return torch.relu(self.project(self.convolutions(x.double().permute(0, 3, 1, 2) / 255)))


class Wrapped(Twin):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 32)
        self.add_heads(32, 3)

    def encode(self, x):
        return torch.tanh(self.encoder(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = Wrapped()
        self.lstm = nn.LSTM(32, 32)
        # PufferLib ties a cell to it for acting; its checkpoints list both.
        self.cell = nn.LSTMCell(32, 32)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.cell, name, getattr(self.lstm, f"{name}_l0"))

    def forward(self, x):
        outputs, _ = self.lstm(self.policy.encode(x).transpose(0, 1))
        logits, values = self.policy.decode(outputs.transpose(0, 1).flatten(0, 1))
        return logits, values.reshape(x.shape[:2])


class MultiInput(Twin):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.image = nn.Linear(8 * 5 * 4, 64)
        self.vector = nn.Linear(5, 64)
        self.joint = nn.Linear(128, 64)
        self.add_heads(64, 4)

    def encode(self, x):
        image = torch.relu(self.conv(x["image"].double().permute(0, 3, 1, 2) / 255)).flatten(1)
        parts = [torch.relu(self.image(image)), torch.relu(self.vector(x["vector"].double()))]
        return torch.relu(self.joint(torch.cat(parts, 1)))


class Continuous(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(1, 2))
        self.encoder = nn.Linear(3, 64)
        self.mean = nn.Linear(64, 2)
        self.critic = nn.Linear(64, 1)

    def forward(self, x):
        hidden = torch.tanh(self.encoder(x))
        mean = self.mean(hidden)
        return Normal(mean, self.log_std.exp().expand_as(mean)), self.critic(hidden)


class Structured(Twin):
    def __init__(self):
        super().__init__()
        self.kind = nn.Embedding(4, 8)
        self.unit = nn.Linear(10, 16)
        self.board = nn.Linear(16, 16)
        self.joint = nn.Linear(32, 64)
        self.add_heads(64, 4)

    def encode(self, x):
        kind, position = x["unit"]
        unit = torch.relu(self.unit(torch.cat([self.kind(kind), position.double()], 1)))
        board = torch.relu(self.board(x["board"].double().flatten(1) / 255))
        return torch.relu(self.joint(torch.cat([unit, board], 1)))


class Shared(Twin):
    def __init__(self, hidden=64):
        super().__init__()
        self.encoder = nn.Linear(5, hidden)
        self.add_heads(hidden, 2)

    def encode(self, x):
        return torch.relu(self.encoder(x))


class Independent(nn.Module):
    def __init__(self):
        super().__init__()
        self.agents = nn.ModuleList([Shared(32) for _ in range(3)])

    def forward(self, x):
        """Row by row, which cannot get the order wrong."""
        logits, values = zip(
            *[self.agents[int(r[0, 2:].argmax())](r) for r in x.split(1)], strict=True
        )
        return torch.cat(logits), torch.cat(values)

    def grouped(self, x):
        """The loop over agents whose results are concatenated."""
        agent = x[:, 2:].argmax(1)
        return torch.cat([net(x[agent == i])[0] for i, net in enumerate(self.agents)])


class Attention(Twin):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.add_heads(32, 3)

    def encode(self, x):
        absent = x[..., 0] <= 0
        absent[:, 0] = False
        tokens = torch.relu(self.embed(x))
        query = tokens[:, :1]
        gathered, _ = self.attention(query, tokens, tokens, key_padding_mask=absent)
        return (query + gathered)[:, 0]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x):
        return x + self.outer(torch.relu(self.inner(self.norm(x))))


class Residual(Twin):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 64)
        self.blocks = nn.Sequential(*[Block(64) for _ in range(3)])
        self.add_heads(64, 2)

    def encode(self, x):
        return self.blocks(self.stem(x))


class Normalizer(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        return ((x - self.mean) / torch.sqrt(self.var + 1e-8)).clamp(-10, 10)


class Normalization(Twin):
    def __init__(self):
        super().__init__()
        self.normalizer = Normalizer(2)
        self.encoder = nn.Linear(2, 64)
        self.add_heads(64, 2)
        self.normalizer.mean += torch.tensor([3.0, -0.5])
        self.normalizer.var *= torch.tensor([2.0, 0.01])  # narrow: some rows are clipped
        self.normalizer.count += 100

    def encode(self, x):
        return torch.tanh(self.encoder(self.normalizer(x)))


# --- what each pair is compared on ---------------------------------------------------------------


def numbers(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def images(*shape):
    return np.random.default_rng(2).integers(0, 256, (ROWS, *shape), np.uint8)


def rows_of_agents():
    """Positions and one-hot agents, in no order."""
    agents = np.eye(3)[np.random.default_rng(4).integers(0, 3, ROWS)]
    return np.concatenate([numbers(ROWS, 2), agents], 1)


def some_entities():
    x = numbers(ROWS, 6, 5)
    x[0, :, 0] = -1  # nobody but the agent itself
    return x


def emulated(module):
    """The real PufferLib's emulation of the example's space: env, bytes, what was packed."""
    env = ref.emulated(module.SPACE, Discrete(4))
    packed = ref.emulated_observations(env, ROWS)
    return env, packed, jax.tree.map(lambda *leaves: np.stack(leaves), *env.env.samples)


# Of an example's module: twin, env, observations for ours and, where they differ, for torch.
CASES = {
    "attention": lambda m: (Attention, m.ENV, some_entities()),
    "basic": lambda m: (Basic, m.ENV, numbers(ROWS, 2, 3)),
    "cnn": lambda m: (Cnn, m.ENV, images(4, 36, 44)),
    "continuous": lambda m: (Continuous, m.ENV, numbers(ROWS, 3)),
    "efficient_cnn": lambda m: (EfficientCnn, m.image_env(17, 11, 2), images(17, 11, 2)),
    "independent_multi_agent": lambda m: (Independent, m.ENV, rows_of_agents()),
    "multi_input": lambda m: (MultiInput, *emulated(m)),
    "normalization": lambda m: (Normalization, m.ENV, 3 * numbers(ROWS, 2)),
    "recurrent": lambda m: (Recurrent, m.ENV, numbers(ROWS, 5, 3)),
    "residual": lambda m: (Residual, m.ENV, numbers(ROWS, 4)),
    "shared_multi_agent": lambda m: (Shared, m.ENV, rows_of_agents()),
    "structured": lambda m: (Structured, *emulated(m)),
}
SIZES = {"cnn": {"hidden_size": 128}}


def build(name, env, seed=0, **options):
    module = example(name)
    make = module.recurrent if name == "recurrent" else module.Policy
    return make(env, **SIZES.get(name, {}), rngs=nnx.Rngs(seed), **options)


def forward(policy, x):
    if hasattr(policy, "initial_state"):
        return named(*policy(x)[:2])
    return named(*policy.decode_actions(policy.encode_observations(x)))


def named(logits, values):
    if hasattr(logits, "loc"):
        return {"loc": logits.loc, "scale": logits.scale, "values": values}
    return {"logits": logits, "values": values}


def unbuilt(name, env, **options):
    """A policy in float64 with positive numbers for parameters; initialising compiles for long."""
    graphdefs = []

    def make():
        graphdef, params = puffer_jax.split(build(name, env, param_dtype=jnp.float64, **options))
        graphdefs.append(graphdef)
        return params

    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: 0.2 * rng.random(x.shape), jax.eval_shape(make))
    return puffer_jax.merge(graphdefs[0], params)


def same_weights(policy, twin):
    """Give the twin generic weights, and those to ours."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    puffer_jax.load_state_dict(policy, twin.state_dict())
    assert list(puffer_jax.state_dict(policy)) == list(twin.state_dict())


def loss(outputs):
    """A loss of generic gradients: sum(w * y + u * y**2 / 2)."""
    rng, total = np.random.default_rng(3), 0.0
    for y in outputs.values():
        w, u = rng.standard_normal((2, *y.shape))
        if isinstance(y, torch.Tensor):
            w, u = torch.from_numpy(w), torch.from_numpy(u)
        total += (w * y + u * y * y / 2).sum()
    return total


@functools.partial(jax.jit, static_argnums=(1, 2))
@functools.partial(jax.grad, has_aux=True)
def gradients_of_loss(params, graphdef, run):
    outputs = run(puffer_jax.merge(graphdef, params))
    return loss(outputs), outputs


def both(policy, twin, run_ours, run_theirs):
    """Named outputs and gradients of ours, then theirs."""
    graphdef, params = puffer_jax.split(policy)
    gradients, ours = gradients_of_loss(params, graphdef, run_ours)
    gradients = puffer_jax.state_dict(puffer_jax.merge(graphdef, gradients))
    gradients = {key: g for key, g in gradients.items() if not key.startswith("cell.")}
    twin.zero_grad()
    theirs = run_theirs(twin)
    loss(theirs).backward()
    theirs = {key: y.detach().numpy() for key, y in theirs.items()}
    return ours, gradients, theirs, {key: p.grad.numpy() for key, p in twin.named_parameters()}


def worst(ours, theirs):
    """The largest error relative to an array's largest magnitude; in float64."""
    errors = []
    for key in theirs:
        y, expected = np.asarray(ours[key]), np.asarray(theirs[key])
        assert (y.dtype, expected.dtype, y.shape) == (np.float64, np.float64, expected.shape)
        assert np.isfinite(y).all()
        errors.append(abs(y - expected).max() / abs(expected).max())
    return max(errors)


# --- the tests -----------------------------------------------------------------------------------


def test_every_example_has_a_case_and_a_line_in_the_index():
    assert sorted(CASES) == NAMES
    index = (EXAMPLES.parent / "README.md").read_text()
    paths = [f"policies/{name}.py" for name in NAMES] + ["ppo.py", "demo.py"]
    assert [path for path in paths if f"python examples/{path}" not in index] == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", NAMES)
def test_twin(name):
    make, env, x, *fields = CASES[name](example(name))
    theirs_x = jax.tree.map(torch.from_numpy, fields[0] if fields else x)
    policy, twin = unbuilt(name, env), make().double()
    from_jax = puffer_jax.state_dict(policy)
    same_weights(policy, twin)
    run = lambda p: forward(p, x)  # noqa: E731
    for direction in ("torch to JAX", "JAX to torch"):
        if direction == "JAX to torch":
            puffer_jax.load_state_dict(policy, from_jax)
            tensors = {key: torch.from_numpy(array.copy()) for key, array in from_jax.items()}
            twin.load_state_dict(tensors, strict=True)
        ours, our_gradients, theirs, gradients = both(
            policy, twin, run, lambda p: named(*p(theirs_x))
        )
        errors = worst(ours, theirs), worst(our_gradients, gradients)
        print(f"{name}, {direction}: forward {errors[0]:.1e}, gradient {errors[1]:.1e}")
        assert errors[0] <= 1e-14
        assert errors[1] <= 1e-13
        # Torch's buffers, the statistics of normalization.py, are parameters without a gradient.
        buffers = our_gradients.keys() - gradients.keys()
        assert buffers == {key for key, _ in twin.named_buffers()}
        assert not any(our_gradients[key].any() for key in buffers)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_rules_of_a_policy(name):
    module = example(name)
    env = module.image_env(15, 11, 1) if name == "efficient_cnn" else module.ENV
    if name != "normalization":
        policy = ref.generic(lambda: build(name, env))
    else:
        policy = build(name, env)
        graphdef, params = puffer_jax.split(policy)
        x = np.random.default_rng(0).uniform(-9, 999, (100, 2)).astype(np.float32)
        policy = puffer_jax.merge(graphdef, module.update(params, x))
    report = check_policy(policy, env)
    if name == "normalization":  # whose statistics are not trained
        assert report.failures == ("gradients",)
        (reason,) = (check.reason for check in report.checks if check.name == "gradients")
        found = set(re.findall(r"\w+\.\w+", reason))
        assert found == {f"normalizer.{name}" for name in ("mean", "var", "count")}
    else:
        assert report.ok, report


@pytest.mark.usefixtures("quick")
def test_multi_input_takes_a_dict_as_well_as_bytes():
    env, packed, fields = emulated(example("multi_input"))
    policy = unbuilt("multi_input", env)
    jax.tree.map(np.testing.assert_array_equal, forward(policy, fields), forward(policy, packed))


def test_efficient_cnn_finds_its_flat_size():
    module = example("efficient_cnn")
    for shape in ((17, 11, 2), (30, 64, 3)):
        height, width = ((((s + 2 - 5) // 3 + 1) + 2 - 3) // 2 + 1 for s in shape[:2])
        policy = jax.eval_shape(
            lambda s=shape: nnx.state(build("efficient_cnn", module.image_env(*s)))
        )
        assert policy["project"]["kernel"].shape == (32 * height * width, 128)


@pytest.mark.usefixtures("quick")
def test_squashed_log_prob():
    """Of given actions, near the edges too, and its gradient, through the policy."""
    x = numbers(ROWS, 3)
    actions = np.tanh(2 * numbers(ROWS, 2, seed=7))
    actions[0] = 1 - 1e-6, 1e-6 - 1
    policy = unbuilt("continuous", example("continuous").ENV, squash=True)
    twin = Continuous().double()
    same_weights(policy, twin)

    def theirs(twin):
        normal, values = twin(torch.from_numpy(x))
        squashed = TransformedDistribution(normal, [TanhTransform()])
        return {"logprob": squashed.log_prob(torch.from_numpy(actions)).sum(1), "values": values}

    def ours(policy):
        dist, values = policy.decode_actions(policy.encode_observations(x))
        return {"logprob": puffer_jax.sample_logits(dist, actions)[1], "values": values}

    found, our_gradients, expected, gradients = both(policy, twin, ours, theirs)
    errors = worst(found, expected), worst(our_gradients, gradients)
    print(f"squashed: log-prob {errors[0]:.1e}, gradient {errors[1]:.1e}")
    assert max(errors) <= 1e-13


@pytest.mark.usefixtures("quick")
def test_bare_tanh_has_a_wrong_log_prob():
    right, bare = example("continuous").integrals(0.3, 0.8)
    u = 0.3 + 0.8 * np.linspace(-9, 9, 1001)
    density = np.exp(-(((u - 0.3) / 0.8) ** 2) / 2)
    lost = (density * np.tanh(u) ** 2).sum() / density.sum()
    assert abs(right - 1) < 1e-4
    assert abs(bare - (1 - lost)) < 1e-4
    assert lost > 0.3


@pytest.mark.usefixtures("quick")
def test_independent_agents_keep_the_order_of_the_batch():
    x = rows_of_agents()
    module = example("independent_multi_agent")
    policy, twin = unbuilt("independent_multi_agent", module.ENV), Independent().double()
    same_weights(policy, twin)
    logits = np.asarray(forward(policy, x)["logits"])
    order = np.random.default_rng(0).permutation(ROWS)
    assert abs(logits[order] - logits).max() > 0.1
    # A row's sums may run in another order where it stands elsewhere in the batch.
    np.testing.assert_allclose(
        forward(policy, x[order])["logits"], logits[order], rtol=1e-12, equal_nan=False
    )

    # What a loop over agents returns are the same rows, grouped.
    with torch.no_grad():
        grouped = twin.grouped(torch.from_numpy(x)).numpy()
    by_agent = np.argsort(x[:, 2:].argmax(1), kind="stable")
    assert (by_agent != np.arange(ROWS)).any()
    np.testing.assert_allclose(grouped, logits[by_agent], rtol=1e-12, equal_nan=False)
    assert abs(grouped - logits).max() > 0.1


@pytest.mark.usefixtures("quick")
def test_independent_agents_share_nothing():
    policy = unbuilt("independent_multi_agent", example("independent_multi_agent").ENV)
    graphdef, params = puffer_jax.split(policy)
    x = np.concatenate([numbers(ROWS, 2), np.eye(3)[[1] * ROWS]], 1)

    gradients, _ = gradients_of_loss(params, graphdef, lambda p: forward(p, x))
    sizes = [
        max(float(abs(g).max()) for g in jax.tree.leaves(agent))
        for _, agent in sorted(gradients["agents"].items())
    ]
    assert sizes[0] == sizes[2] == 0 < sizes[1]


@pytest.mark.usefixtures("quick")
def test_absent_entities_do_not_matter():
    policy = unbuilt("attention", example("attention").ENV)
    x = some_entities()
    other = x.copy()
    other[:, 1:, 1:] += 5 * (x[:, 1:, :1] <= 0)
    assert (other != x).any()
    jax.tree.map(np.testing.assert_array_equal, forward(policy, other), forward(policy, x))
    # The order of the others does not, either.
    shuffled = x[:, [0, 3, 5, 1, 2, 4]]
    assert worst(forward(policy, shuffled), forward(policy, x)) <= 1e-13


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("cuts", [[], [1], [5, 6, 300, 301], range(50, 1000, 50)])
def test_normalization_is_exact_under_batching(cuts):
    module = example("normalization")
    x = np.array([500, 0.0]) + np.array([1, 1e-3]) * numbers(1000, 2)
    _, params = puffer_jax.split(build("normalization", module.ENV, param_dtype=jnp.float64))
    compiled = params
    for part in np.split(x, list(cuts)):
        params = module.update(params, part)
        compiled = jax.jit(module.update)(compiled, part)
    for found in (params["normalizer"], compiled["normalizer"]):
        assert found["count"] == 1000
        # Relative to the std where the mean is near zero.
        scale = np.maximum(abs(x.mean(0)), x.std(0))
        assert (abs(found["mean"] - x.mean(0)) <= 1e-12 * scale).all()
        assert x.var(0).min() > 1e-7
        # Sums of a thousand numbers in another order.
        np.testing.assert_allclose(found["var"], x.var(0), rtol=1e-12, equal_nan=False)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_normalization_is_saved_with_the_weights(tmp_path, suffix):
    module, x = example("normalization"), 5 + numbers(64, 2).astype(np.float32)
    graphdef, params = puffer_jax.split(build("normalization", module.ENV))
    policy = puffer_jax.merge(graphdef, module.update(params, x))
    puffer_jax.save_weights(policy, tmp_path / f"policy.{suffix}")
    loaded = build("normalization", module.ENV, seed=1)
    puffer_jax.load_weights(loaded, tmp_path / f"policy.{suffix}")
    jax.tree.map(
        np.testing.assert_array_equal, puffer_jax.split(loaded)[1], puffer_jax.split(policy)[1]
    )
    assert puffer_jax.split(loaded)[1]["normalizer"]["count"] == 64
    normal = loaded.normalizer(x)
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(0), 1, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_an_optimizer_leaves_the_statistics_alone():
    module, x = example("normalization"), 5 + numbers(64, 2)
    graphdef, params = puffer_jax.split(unbuilt("normalization", module.ENV))
    params = module.update(params, x)
    adam = optax.adam(0.1)

    gradients, _ = gradients_of_loss(params, graphdef, lambda p: forward(p, x))
    change, _ = adam.update(gradients, adam.init(params), params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(change["normalizer"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(change["encoder"]))


# What `main()` has to print besides the reward, and the least reward of its greedy actions.
PRINTED = {
    "attention": (
        ["4,548 parameters", "attention.in_proj_weight       (96, 32)", "not matter: True"],
        0.9,
    ),
    "basic": (["4,868 parameters; logits (512, 3), values (512, 1)", "encoder.2.weight"], 0.9),
    "cnn": (["network.0.weight               (32, 4, 8, 8)", "network.7.weight"], 0.75),
    "continuous": (["loc (256, 2)", "log_std", "TanhNormal 1.000", "Normal's sample 0.661"], -0.1),
    "efficient_cnn": (["(21, 21, 1) need a flat layer of 512", "project.weight"], 0.9),
    "independent_multi_agent": (["agents.2.actor.weight", "logits, shuffled: True"], 0.9),
    "multi_input": (["212 bytes a row", "from a dict: True"], 0.9),
    "normalization": (["normalizer.mean", "count: [256.]", "greedy 0.5"], 0.9),
    "recurrent": (["lstm.weight_hh_l0", "cell.bias_hh", "step 4"], 0.9),
    "residual": (["blocks.2.norm.weight", "25,859 parameters"], 0.75),
    "shared_multi_agent": (["3 agents are 300 rows", "the first 4 environments"], 0.9),
    "structured": (["bytes 20 to 27 are unit.f1, float32 (2,)", "kind.weight"], 0.9),
}


@pytest.mark.parametrize("name", NAMES)
def test_main(name, capsys, request):
    if name in ("cnn", "efficient_cnn"):  # which compute for longer than they compile
        request.getfixturevalue("optimised")
    least = np.min(example(name).main())
    out = capsys.readouterr().out
    pieces, bar = PRINTED[name]
    assert [piece for piece in pieces if piece not in out] == []
    assert float(re.findall(r"greedy (-?[\d.]+)", out)[-1]) == pytest.approx(least, abs=0.1)
    assert least >= bar


def test_from_the_shell(tmp_path):
    """Without x64, from another folder, and without a warning."""
    name = "continuous"
    command = [sys.executable, "-W", "error::UserWarning", EXAMPLES / f"{name}.py"]
    environment = os.environ | {"JAX_ENABLE_X64": "0"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [piece for piece in PRINTED[name][0] if piece not in result.stdout] == []
    assert result.stderr == ""
