"""PufferLib 4's policies: twins made of torch.nn's layers, stepped one by one, are the judges."""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from support.bars import BARS, named, relative_error, stub_env

import puffer_jax
from puffer_jax import v4
from puffer_jax.nn.cores import Core

pytestmark = pytest.mark.usefixtures("quick")

BATCH, TIME, HIDDEN, OBS = 4, 5, 8, 6
FORWARD, GRADIENT = BARS["forward"]["float64"], BARS["gradient"]["float64"]
FRAMES = stub_env(Box(0, 255, (2, 36, 44), np.uint8), Discrete(3))
IMAGES = stub_env(Box(0, 255, (12, 9, 3), np.uint8), Discrete(3))
DOUBLE = {"param_dtype": jnp.float64}


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


# --- twins --------------------------------------------------------------------------------------


class FlatTwin(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(OBS, HIDDEN)

    def forward(self, x):
        return self.encoder(x.flatten(1).double())


class NatureTwin(torch.nn.Module):
    def __init__(self):
        super().__init__()
        nn = torch.nn
        convolutions = nn.Conv2d(2, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)
        layers = [layer for conv in convolutions for layer in (conv, nn.ReLU())]
        linear = nn.Linear(64 * 1 * 2, HIDDEN)
        self.network = nn.Sequential(*layers, nn.Flatten(), linear, nn.ReLU())

    def forward(self, x):
        return self.network(x.double() / 255)


class BlockTwin(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv0, self.conv1 = (torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return self.conv1(self.conv0(x.relu()).relu()) + x


class SequenceTwin(torch.nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.conv = torch.nn.Conv2d(inputs, width, 3, padding=1)
        self.res_block0, self.res_block1 = BlockTwin(width), BlockTwin(width)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(self.conv(x), 3, 2, 1)
        return self.res_block1(self.res_block0(x))


class ImpalaTwin(torch.nn.Module):
    def __init__(self):
        super().__init__()
        nn, widths = torch.nn, [3, 4, 8, 8]
        sequences = map(SequenceTwin, widths, widths[1:])
        linear = nn.Linear(8 * 2 * 2, HIDDEN)
        self.network = nn.Sequential(*sequences, nn.Flatten(), nn.ReLU(), linear, nn.ReLU())

    def forward(self, x):
        return self.network(x.permute(0, 3, 1, 2).double() / 255)


class DecoderTwin(torch.nn.Module):
    def __init__(self, nvec):
        super().__init__()
        self.nvec = nvec
        if max(nvec) == 1:
            self.decoder_mean = torch.nn.Linear(HIDDEN, len(nvec))
            self.decoder_logstd = torch.nn.Parameter(torch.zeros(1, len(nvec)))
        else:
            self.decoder = torch.nn.Linear(HIDDEN, sum(nvec))
        self.value_function = torch.nn.Linear(HIDDEN, 1)

    def forward(self, x):
        values = self.value_function(x)
        if max(self.nvec) == 1:
            mean = self.decoder_mean(x)
            scale = self.decoder_logstd.exp().expand_as(mean)
            return SimpleNamespace(loc=mean, scale=scale), values
        logits = self.decoder(x)
        return logits.split(self.nvec, 1) if len(self.nvec) > 1 else logits, values


class MLPTwin(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        nn = torch.nn
        pairs = ((nn.Linear(HIDDEN, HIDDEN), nn.GELU()) for _ in range(layers))
        self.net = nn.Sequential(*(layer for pair in pairs for layer in pair))

    def forward(self, x, state):
        return self.net(x), {}


class MinGRUTwin(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        linear = partial(torch.nn.Linear, HIDDEN, 3 * HIDDEN, bias=False)
        self.layers = torch.nn.ModuleList(linear() for _ in range(layers))

    def forward(self, x, state):
        new = []
        for layer, h in zip(self.layers, state["mingru_h"].unbind(1), strict=True):
            u, g, p = layer(x).chunk(3, -1)
            z, p = g.sigmoid(), p.sigmoid()
            new.append((1 - z) * h + z * torch.where(u >= 0, u + 0.5, u.sigmoid()))
            x = p * new[-1] + (1 - p) * x
        return x, {"mingru_h": torch.stack(new, 1)}


def tied(module, cell, name, layers):
    whole = getattr(module, name)
    module.cell = torch.nn.ModuleList(cell(HIDDEN, HIDDEN) for _ in range(layers))
    for i, one in enumerate(module.cell):
        for weight in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(one, weight, getattr(whole, f"{weight}_l{i}"))


class LSTMTwin(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.lstm = torch.nn.LSTM(HIDDEN, HIDDEN, layers, batch_first=True)
        tied(self, torch.nn.LSTMCell, "lstm", layers)

    def forward(self, x, state):
        new = []
        rows = zip(self.cell, state["lstm_h"].unbind(1), state["lstm_c"].unbind(1), strict=True)
        for cell, h, c in rows:
            new.append(cell(x, (h, c)))
            x = new[-1][0]
        h, c = (torch.stack(parts, 1) for parts in zip(*new, strict=True))
        return x, {"lstm_h": h, "lstm_c": c}


class GRUTwin(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.gru = torch.nn.GRU(HIDDEN, HIDDEN, layers, batch_first=True)
        tied(self, torch.nn.GRUCell, "gru", layers)
        self.norm = torch.nn.RMSNorm(HIDDEN)

    def forward(self, x, state):
        new = []
        for cell, h in zip(self.cell, state["gru_h"].unbind(1), strict=True):
            new.append(cell(x, h))
            x = self.norm(x + new[-1])
        return x, {"gru_h": torch.stack(new, 1)}


class Twin(torch.nn.Module):
    def __init__(self, encoder, decoder, network):
        super().__init__()
        self.encoder, self.decoder, self.network = encoder, decoder, network

    def forward_eval(self, x, state):
        hidden, state = self.network(self.encoder(x), state)
        return *self.decoder(hidden), state

    def forward(self, x, state, done):
        """Acting, step by step; an episode begins with the zero state."""
        rows = []
        for t in range(x.shape[1]):
            going_on = ~done[:, t, None, None]
            state = {name: part * going_on for name, part in state.items()}
            logits, values, state = self.forward_eval(x[:, t], state)
            rows.append(named(logits, values))
        stacked = {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}
        flat = {n: x.flatten(0, 1) if n != "values" else x[:, :, 0] for n, x in stacked.items()}
        return flat | {f"state.{name}": state[name] for name in sorted(state)}


ENCODERS = {"flat": FlatTwin, "nature": NatureTwin, "impala": ImpalaTwin}
NETWORKS = {"MinGRU": MinGRUTwin, "MLP": MLPTwin, "LSTM": LSTMTwin, "GRU": GRUTwin}


def policy(network="MinGRU", layers=1, nvec=(3,), encoder="flat", seed=0, dtype=jnp.float64):
    options = {"rngs": nnx.Rngs(seed), "param_dtype": dtype}
    if encoder == "nature":
        front = v4.NatureEncoder(FRAMES, HIDDEN, framestack=2, flat_size=128, **options)
    elif encoder == "impala":
        front = v4.ImpalaEncoder(IMAGES, HIDDEN, cnn_width=4, **options)
    else:
        front = v4.DefaultEncoder(OBS, HIDDEN, **options)
    decoder = v4.DefaultDecoder(nvec, HIDDEN, **options)
    return v4.Policy(front, decoder, getattr(v4, network)(HIDDEN, layers, **options))


def twin(network="MinGRU", layers=1, nvec=(3,), encoder="flat"):
    return Twin(ENCODERS[encoder](), DecoderTwin(nvec), NETWORKS[network](layers)).double()


def loaded(theirs, ours):
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in puffer_jax.state_dict(ours).items()})
    return theirs


def observations(encoder):
    if encoder == "flat":
        return normal(BATCH, TIME, OBS)
    shape = (FRAMES if encoder == "nature" else IMAGES).observation_space.shape
    return np.random.default_rng(0).integers(0, 256, (BATCH, TIME, *shape), np.uint8)


def bits(module):
    return {name: (x.dtype, x.tobytes()) for name, x in puffer_jax.state_dict(module).items()}


CASES = [
    ("MinGRU", 1, (1, 1), "flat"),
    ("MinGRU", 4, (2, 3), "flat"),
    ("MLP", 1, (3,), "nature"),
    ("MLP", 3, (1, 1), "flat"),
    ("LSTM", 1, (3,), "impala"),
    ("LSTM", 2, (1,), "flat"),
    ("LSTM", 4, (2, 3), "flat"),
    ("GRU", 1, (2, 3), "flat"),
    ("GRU", 3, (3,), "flat"),
]


@pytest.mark.parametrize("network, layers, nvec, encoder", CASES)
def test_it_is_its_torch_twin(network, layers, nvec, encoder):
    ours = policy(network, layers, nvec, encoder)
    for _, variable in nnx.to_flat_state(nnx.state(ours)):  # biases and log-std, too
        variable[...] += 0.1 * normal(*variable.shape)
    theirs = loaded(twin(network, layers, nvec, encoder), ours)
    assert isinstance(ours.network, Core)
    x, done = observations(encoder), normal(BATCH, TIME) > 0.5
    zero = {name: part for name, part in ours.initial_state(BATCH).items() if name != "hidden"}
    state = {name: normal(*part.shape, seed=i) for i, (name, part) in enumerate(zero.items())}
    torch_state = {name: torch.from_numpy(part) for name, part in state.items()}
    graphdef, params = puffer_jax.split(ours)

    def run(params):
        logits, values, last = puffer_jax.merge(graphdef, params).forward(x, state, done)
        outputs = named(logits, values, {n: p for n, p in last.items() if n != "hidden"})
        weights = (normal(*part.shape, seed=9) for part in outputs.values())
        return sum((p * w).sum() for p, w in zip(outputs.values(), weights, strict=True)), outputs

    gradients, outputs = jax.jit(jax.grad(run, has_aux=True))(params)
    expected = theirs(torch.from_numpy(x), torch_state, torch.from_numpy(done))
    assert set(outputs) == set(expected)
    for name, part in expected.items():
        assert relative_error(outputs[name], part.detach()) <= FORWARD, name
    weights = [torch.from_numpy(normal(*part.shape, seed=9)) for part in expected.values()]
    loss = sum((p * w).sum() for p, w in zip(expected.values(), weights, strict=True))
    loss.backward()
    by_name = puffer_jax.state_dict(puffer_jax.merge(graphdef, gradients))
    for name, parameter in theirs.named_parameters():
        assert relative_error(by_name[name], parameter.grad) <= GRADIENT, name

    act = jax.jit(lambda params: puffer_jax.merge(graphdef, params).forward_eval(x[:, 0], state))
    logits, values, new = act(params)
    found = named(logits, values, {n: part for n, part in new.items() if n != "hidden"})
    expected = named(*theirs.forward_eval(torch.from_numpy(x[:, 0]), torch_state))
    assert set(found) == set(expected)
    for name, part in expected.items():
        assert relative_error(found[name], part.detach()) <= FORWARD, name
    assert new["hidden"].shape == (BATCH, HIDDEN)


def test_cores_of_several_layers_are_torchs():
    x = normal(BATCH, TIME, HIDDEN)
    inputs = jnp.asarray(x)
    lstm = v4.LSTM(HIDDEN, 3, rngs=nnx.Rngs(0), **DOUBLE)
    theirs = loaded(LSTMTwin(3).double(), lstm)
    y, _ = lstm.scan(inputs, lstm.initial_state(BATCH))
    assert relative_error(y, theirs.lstm(torch.from_numpy(x))[0].detach()) <= FORWARD
    # The original's training form; with one layer it is what acts.
    for layers in (1, 2):
        options = {"rngs": nnx.Rngs(0), "norm_in_training": "last", **DOUBLE}
        gru = v4.GRU(HIDDEN, layers, **options)
        theirs = loaded(GRUTwin(layers).double(), gru)
        expected = theirs.norm(torch.from_numpy(x) + theirs.gru(torch.from_numpy(x))[0])
        y, _ = gru.scan(inputs, gru.initial_state(BATCH))
        assert relative_error(y, expected.detach()) <= FORWARD
        gru.norm_in_training = "each"
        other = relative_error(gru.scan(inputs, gru.initial_state(BATCH))[0], y)
        assert other <= FORWARD if layers == 1 else other > 0.1


def test_initial_weights():
    for network in NETWORKS:
        # A width that a layer can be told by.
        part = getattr(v4, network)(40, 2, rngs=nnx.Rngs(0))
        for name, weight in puffer_jax.state_dict(part).items():
            bound = 1 / math.sqrt(40)
            if network in ("MLP", "MinGRU"):
                assert bound * 0.8 < np.abs(weight).max() <= bound, name
                assert name.endswith("bias") or 0.9 < weight.std() * math.sqrt(3) / bound < 1.1
            elif name == "norm.weight":
                np.testing.assert_array_equal(weight, 1)
            elif "bias" in name:
                np.testing.assert_array_equal(weight, 0)
            else:
                np.testing.assert_allclose(weight.T @ weight, np.eye(40), atol=1e-5)
    for encoder in ENCODERS:
        for name, weight in puffer_jax.state_dict(policy(nvec=(1, 1), encoder=encoder)).items():
            if name == "decoder.decoder_logstd":
                np.testing.assert_array_equal(weight, np.zeros((1, 2)))
            elif name.endswith("weight"):
                assert 0.6 < np.abs(weight).max() * math.sqrt(math.prod(weight.shape[1:])) <= 1


def test_what_does_not_fit_is_said():
    rngs = nnx.Rngs(0)
    encoder, decoder = v4.DefaultEncoder(OBS, 8, rngs=rngs), v4.DefaultDecoder((3,), 8, rngs=rngs)
    network = v4.MinGRU(8, rngs=rngs)
    env = stub_env(Box(-1, 1, (2, 3)), Discrete(3))
    ours = v4.Policy(encoder, decoder, network, env=env)
    assert ours.forward(np.ones((2, 4, 2, 3), np.float32))[1].shape == (2, 4)
    cases = [
        ("network.hidden_size is 9", lambda: v4.Policy(encoder, decoder, v4.MLP(9, rngs=rngs))),
        ("obs_size is 6, but .* have 5 numbers", (Box(-1, 1, (5,)), Discrete(3))),
        (r"nvec=\(3,\) is for .*MultiDiscrete", (Box(-1, 1, (6,)), MultiDiscrete([2, 2]))),
        ("DefaultEncoder reads arrays; got", (Dict(a=Box(-1, 1, (6,))), Discrete(3))),
        (r"nvec is \(\); expected", lambda: v4.DefaultDecoder((), rngs=rngs)),
        ("num_layers is 0", lambda: v4.LSTM(8, 0, rngs=rngs)),
        ("'each' or 'last'; got 'no'", lambda: v4.GRU(8, norm_in_training="no", rngs=rngs)),
        ("framestack is 1 but .* 2 channels", lambda: v4.NatureEncoder(FRAMES, rngs=rngs)),
        ("ImpalaEncoder takes images", lambda: v4.ImpalaEncoder(env, rngs=rngs)),
        (r"\(2, 5\) have 5 numbers each; obs_size is 6", lambda: encoder(jnp.ones((2, 5)))),
    ]
    for message, build in cases:
        with pytest.raises(ValueError, match=message):
            if callable(build):
                build()
            else:
                v4.Policy(encoder, decoder, network, env=stub_env(*build))


@pytest.mark.parametrize(
    "network, nvec, encoder, hints",
    [
        ("MinGRU", (1, 1), "flat", {}),
        ("MLP", (3,), "nature", {}),
        ("LSTM", (3,), "impala", {"image_shape": (12, 9, 3)}),
        ("GRU", (2, 3), "flat", {"nvec": (2, 3)}),
    ],
)
def test_weights_go_both_ways(network, nvec, encoder, hints, tmp_path):
    ours = policy(network, 2, nvec, encoder, dtype=jnp.float32)
    theirs = twin(network, 2, nvec, encoder).float()
    tensors = puffer_jax.state_dict(ours)
    assert {k: v.shape for k, v in tensors.items()} == {
        k: tuple(v.shape) for k, v in theirs.state_dict().items()
    }
    names = [name for name, _ in theirs.named_parameters()]
    assert [name for name in tensors if name in names] == names  # in torch's order, too
    puffer_jax.save_weights(ours, tmp_path / "ours.pt")
    theirs.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True), strict=True)
    assert all(np.array_equal(theirs.state_dict()[name], x) for name, x in tensors.items())

    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    found = [puffer_jax.policy_from_checkpoint(tmp_path / "theirs.pt", **hints)]
    for suffix in (".safetensors", ".bin"):  # which say of themselves what they hold
        puffer_jax.save_weights(ours, tmp_path / f"x{suffix}")
        found.append(puffer_jax.policy_from_checkpoint(tmp_path / f"x{suffix}"))
    own = puffer_jax.split(ours)[0]
    for other in found:
        assert type(other) is v4.Policy and bits(other) == bits(ours)
        assert puffer_jax.split(other)[0].shapes == own.shapes
        assert other.env_spec.single_action_space == ours.env_spec.single_action_space
    if network in ("LSTM", "GRU"):
        name = network.lower()
        cell = {k: x for k, x in tensors.items() if not k.startswith(f"network.{name}.")}
        assert bits(puffer_jax.policy_from_checkpoint(cell, **hints)) == bits(ours)
        more = tensors | {f"network.{name}.weight_ih_l2": np.zeros((8, 8), np.float32)}
        with pytest.raises(ValueError, match=r"weight_ih_l2.* more layers"):
            puffer_jax.load_state_dict(ours, more)
        with pytest.raises(ValueError, match=r"cell\.1\.bias_hh and network.* differ here"):
            puffer_jax.load_state_dict(
                ours, tensors | {"network.cell.1.bias_hh": tensors["network.cell.1.bias_hh"] + 1}
            )


def test_a_checkpoint_with_a_part_of_ones_own(tmp_path):
    class Halved(v4.DefaultEncoder):
        def __call__(self, observations):
            return super().__call__(observations) / 2

    rngs = nnx.Rngs(0)
    decoder, network = v4.DefaultDecoder((3,), HIDDEN, rngs=rngs), v4.MinGRU(HIDDEN, rngs=rngs)
    ours = v4.Policy(Halved(OBS, HIDDEN, rngs=rngs), decoder, network)
    puffer_jax.save_weights(ours, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"custom encoder, .*Halved; build it yourself"):
        puffer_jax.policy_from_checkpoint(tmp_path / "x.safetensors")


def test_it_trains(tmp_path):
    env = puffer_jax.environments.make("cartpole")
    options = {"rngs": nnx.Rngs(0)}
    ours = v4.Policy(
        v4.DefaultEncoder(4, HIDDEN, **options),
        v4.DefaultDecoder((2,), HIDDEN, **options),
        v4.MinGRU(HIDDEN, 2, **options),
        env=env,
    )
    config = puffer_jax.PuffeRLConfig.v4(
        horizon=8,
        batch_size=32,
        minibatch_size=16,
        total_timesteps=64,
        num_envs=4,
        store_initial_state=True,
        optimizer="adam",
        data_dir=str(tmp_path),
    )
    learner = puffer_jax.PuffeRL(config, env, ours)
    before = bits(learner.policy)
    for _ in range(2):
        learner.evaluate()
        learner.train()
    after = bits(learner.policy)
    assert all(after[name] != before[name] for name in before)
    assert all(np.isfinite(loss) for loss in learner.losses.values())
    again = puffer_jax.policy_from_checkpoint(learner.close(), env=env)
    assert type(again) is v4.Policy and bits(again) == after
