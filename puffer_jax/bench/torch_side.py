"""The contestants on torch: the reference's policies and trainer, eager and compiled.

The only module here that imports torch and pufferlib; it runs in the bench's child process.
"""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pufferlib.emulation
import pufferlib.models
import pufferlib.pytorch
import pufferlib.vector
import torch

from puffer_jax import vector
from puffer_jax.bench import envs as bench_envs
from puffer_jax.bench import rows
from puffer_jax.bench.rows import Case

DEVICE = torch.device("cpu")
# Where the reference's advantage comes from.
EXTENSION, COMPILED = "its extension", "its loops, compiled with g++"
try:
    from pufferlib import _C  # noqa: F401

    ADVANTAGE = EXTENSION
except ImportError:
    ADVANTAGE = COMPILED if shutil.which("g++") else "its formula in NumPy"


def start(threads: int, device: str, precision: str) -> dict[str, object]:
    """Set threads, device and precision; returns what runs here."""
    global DEVICE
    if device == "gpu" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no GPU here: is it built for CUDA?")
    torch.set_num_threads(threads)
    DEVICE = torch.device("cpu" if device == "cpu" else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True  # as in the reference's trainer
    name = torch.cuda.get_device_name() if device == "gpu" else "cpu"
    versions = {"torch": torch.__version__, "pufferlib-core": version("pufferlib-core")}
    return {**versions, "device": name, "advantage": ADVANTAGE}


def forget() -> None:
    """Drop compiled programs."""
    torch._dynamo.reset()


def device_memory() -> int | None:
    """Peak memory on the device in bytes; None if it has no memory of its own."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _arrays(tensors: dict[str, torch.Tensor]) -> rows.Arrays:
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def matmul(size: int) -> Case:
    """A square float32 matrix product."""
    x, y = (torch.from_numpy(rows.observations((size, size), seed)).to(DEVICE) for seed in (0, 1))

    def call() -> None:
        torch.matmul(x, y)
        _wait()

    return Case(call)


class _MinGRU(torch.nn.Module):
    """PufferLib 4's MinGRU as it trains: in log space, from the zero state. There is no wheel."""

    def __init__(self, hidden: int, layers: int):
        super().__init__()
        weights = (torch.nn.Linear(hidden, 3 * hidden, bias=False) for _ in range(layers))
        self.layers = torch.nn.ModuleList(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        softplus = torch.nn.functional.softplus
        for layer in self.layers:
            u, gate, p = layer(x).chunk(3, dim=-1)
            candidate = torch.where(u >= 0, torch.log(u.relu() + 0.5), -softplus(-u))
            kept = -softplus(gate).cumsum(dim=1)
            added = candidate - softplus(-gate)
            states = (kept + torch.logcumsumexp(added - kept, dim=1)).exp()
            p = p.sigmoid()
            x = p * states + (1 - p) * x
        return x


class _MinGRUPolicy(torch.nn.Module):
    """PufferLib 4's Policy around it, under its names."""

    def __init__(self, inputs: int, hidden: int, actions: int):
        super().__init__()
        nn = torch.nn
        self.encoder = nn.ModuleDict({"encoder": nn.Linear(inputs, hidden)})
        heads = {"decoder": nn.Linear(hidden, actions), "value_function": nn.Linear(hidden, 1)}
        self.decoder = nn.ModuleDict(heads)
        self.network = _MinGRU(hidden, rows.MINGRU_LAYERS)

    def forward(self, obs: torch.Tensor, state: object = None) -> tuple[torch.Tensor, ...]:
        hidden = self.network(self.encoder["encoder"](obs)).flatten(0, 1)
        return self.decoder["decoder"](hidden), self.decoder["value_function"](hidden)


def _policy(net: str, shape: tuple[int, ...], hidden: int, actions: int) -> Any:
    """The reference's policy, with the weights that all sides use."""
    kind = (0, 255, shape, np.uint8) if len(shape) == 3 else (-np.inf, np.inf, shape, np.float32)
    space, action = gymnasium.spaces.Box(*kind), gymnasium.spaces.Discrete(actions)
    env = SimpleNamespace(observation_space=space, action_space=action)
    env.single_observation_space, env.single_action_space = space, action
    models = pufferlib.models
    match net:
        case "default":
            policy = models.Default(env, hidden)
        case "lstm":
            policy = models.LSTMWrapper(env, models.Default(env, hidden), hidden, hidden)
        case "mingru":
            policy = _MinGRUPolicy(shape[0], hidden, actions)
        case "naturecnn":
            policy = models.Convolutional(env, framestack=4, flat_size=3136)
        case _:
            policy = models.ProcgenResnet(env)
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    weights = rows.generic(shapes)
    policy.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    return policy.to(DEVICE)


def evaluate(net: str, batch: int, compiled: bool = False) -> Case:
    """`forward_eval` and `sample_logits`, from a host array to a host action."""
    policy = _policy(net, (4,), 128, 2)
    obs = rows.observations((batch, 4))
    state: dict[str, torch.Tensor] = {}
    if net == "lstm":
        zeros = torch.zeros(batch, 128, device=DEVICE)
        state = {"lstm_h": zeros, "lstm_c": zeros}

    def act(obs: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        logits, values = policy.forward_eval(obs, state)
        return *pufferlib.pytorch.sample_logits(logits), values

    if compiled:
        act = torch.compile(act)

    def call() -> Any:
        with torch.no_grad():
            action, _, entropy, values = act(torch.as_tensor(obs).to(DEVICE), state)
            return action.cpu().numpy(), entropy, values, dict(state)

    def outputs(result: Any) -> rows.Arrays:
        found = {"entropy": result[1].reshape(batch), "values": result[2]}
        return _arrays(found | {n: x for n, x in result[3].items() if n != "hidden"})

    return Case(call, outputs)


def train(
    net: str,
    lead: tuple[int, ...],
    shape: tuple[int, ...],
    hidden: int,
    backward: bool,
    compiled: bool = False,
) -> Case:
    """Logits and values, or a loss of them and its gradients."""
    policy = _policy(net, shape, hidden, 6 if len(shape) == 3 else 2)
    forward: Any = torch.compile(policy) if compiled else policy
    obs = torch.from_numpy(rows.observations((*lead, *shape))).to(DEVICE)

    def run() -> dict[str, torch.Tensor]:
        state = {"lstm_h": None, "lstm_c": None} if net == "lstm" else None
        logits, values = forward(obs, state)
        return {"logits": logits, "values": values.reshape(lead)}

    def call() -> dict[str, torch.Tensor]:
        if not backward:
            with torch.no_grad():
                found = run()
        else:
            policy.zero_grad()
            logits, values = run().values()
            loss = (logits**2).mean() + (values**2).mean()
            loss.backward()
            grads = {f"d {name}": p.grad for name, p in policy.named_parameters()}
            found = {"loss": loss, **grads}
        _wait()
        return found

    return Case(call, _arrays)


# --- learning -----------------------------------------------------------------------------------


def _numpy_advantage(values, rewards, terminals, ratio, gamma, decay, rho, c):
    """What `compute_puff_advantage` computes, for machines that cannot compile it."""
    advantages = np.zeros_like(values)
    running = np.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 2, -1, -1):
        alive = 1 - terminals[:, t + 1]
        delta = rewards[:, t + 1] + gamma * values[:, t + 1] * alive - values[:, t]
        delta = np.minimum(ratio[:, t], rho) * delta
        running = delta + gamma * decay * np.minimum(ratio[:, t], c) * running * alive
        advantages[:, t] = running
    return advantages


def compiled_advantage() -> Callable[..., np.ndarray]:
    """The reference's own loops, compiled from the source in its wheel."""
    source = (Path(pufferlib.__file__).parent / "extensions" / "pufferlib.cpp").read_text()
    names = ("puff_advantage_row", "puff_advantage")
    loops = [re.search(rf"void {name}\(.*?\n}}\n", source, re.DOTALL) for name in names]
    code = "".join(match.group() for match in loops if match)
    with tempfile.TemporaryDirectory() as folder:
        file, library = Path(folder, "advantage.cpp"), Path(folder, "advantage.so")
        file.write_text(f'#include <math.h>\nextern "C" {{\n{code}}}\n')
        subprocess.run(["g++", "-O3", "-shared", "-fPIC", file, "-o", library], check=True)
        run = ctypes.CDLL(str(library)).puff_advantage
    pointer, number = np.ctypeslib.ndpointer(np.float32, flags="C"), ctypes.c_float
    run.argtypes = [pointer] * 5 + [number] * 4 + [ctypes.c_int] * 2
    run.restype = None

    def advantage(values, rewards, terminals, ratio, *numbers):
        out = np.zeros_like(values)
        run(values, rewards, terminals, ratio, out, *numbers, *values.shape)
        return out

    return advantage


@functools.cache
def _pufferl() -> ModuleType:
    """The reference's trainer, silenced, and able to run where its extension cannot be loaded."""
    import pufferlib.pufferl as pufferl

    pufferl.PuffeRL.print_dashboard = lambda *args, **kwargs: None
    pufferl.Utilization = lambda: SimpleNamespace(stop=lambda: None)
    if ADVANTAGE != EXTENSION:
        loops = compiled_advantage() if ADVANTAGE == COMPILED else _numpy_advantage

        def compute(values, rewards, terminals, ratio, advantages, *numbers):
            arrays = (x.detach().cpu().numpy() for x in (values, rewards, terminals, ratio))
            return torch.from_numpy(loops(*arrays, *numbers)).to(values.device)

        pufferl._C_AVAILABLE = True
        pufferl.compute_puff_advantage = compute
    return pufferl


def advantage(segments: int, horizon: int) -> Case:
    """`compute_puff_advantage` on tensors that are on the device."""
    stored = rows.experience(segments, horizon)
    arrays = [stored[name] for name in ("values", "rewards", "terminals")]
    arrays += [np.exp(stored["logprobs"]), np.zeros_like(stored["values"])]
    tensors = [torch.from_numpy(x).to(DEVICE) for x in arrays]
    hypers = ("gamma", "gae_lambda", "vtrace_rho_clip", "vtrace_c_clip")
    numbers = [rows.CONFIG[name] for name in hypers]
    compute = _pufferl().compute_puff_advantage

    def call() -> torch.Tensor:
        found = compute(*tensors, *numbers)
        _wait()
        return found

    return Case(call, lambda x: _arrays({"advantage": x}))


def _trainer(policy: torch.nn.Module, net: str, envs: int, vecenv: Any) -> Any:
    config = rows.config_of(envs, use_rnn=net == "lstm", device=DEVICE.type)
    config["data_dir"] = tempfile.gettempdir()
    return _pufferl().PuffeRL(config, vecenv, policy)


def update(net: str, envs: int) -> Case:
    """`PuffeRL.train` with a buffer that is filled once."""
    policy = _policy(net, (4,), 128, 2)
    space, action = gymnasium.spaces.Box(-np.inf, np.inf, (4,)), gymnasium.spaces.Discrete(2)
    vecenv = SimpleNamespace(
        async_reset=lambda seed: None,
        num_agents=envs,
        agents_per_batch=envs,
        single_observation_space=space,
        single_action_space=action,
    )
    trainer = _trainer(policy, net, envs, vecenv)
    for name, array in rows.experience(envs, 64).items():
        getattr(trainer, name)[:] = torch.from_numpy(array)
    queue, draw = list(rows.minibatches(envs)), torch.multinomial
    torch.multinomial = lambda *_: torch.from_numpy(queue.pop(0)).to(DEVICE)
    try:
        trainer.train()
    finally:
        torch.multinomial = draw
    # The weights after an update with fixed minibatches.
    learned = _arrays({name: p.clone() for name, p in policy.named_parameters()})

    def call() -> None:
        trainer.train()
        _wait()

    return Case(call, lambda _: learned)


def trainer(net: str, envs: int, processes: bool = False) -> Case:
    """One epoch of `PuffeRL` on gymnasium's CartPole."""
    creator = functools.partial(_emulated, "cartpole")

    def make() -> tuple[Any, Callable[[], None]]:
        serial: rows.Arguments = {"backend": pufferlib.vector.Serial}
        options = _processes(envs) if processes else serial
        vecenv = pufferlib.vector.make(creator, num_envs=envs, **options)
        made = _trainer(_policy(net, (4,), 128, 2), net, envs, vecenv)

        def epoch() -> None:
            made.evaluate()
            made.train()
            _wait()

        return vecenv, epoch

    def measured() -> float:
        vecenv, epoch = make()
        with contextlib.closing(vecenv):
            epoch()
            began = time.perf_counter()
            epoch()
            return 64 * envs / (time.perf_counter() - began)

    # Workers are made for each measurement, since they spin even while idle.
    return Case(measured, rate=True) if processes else Case(make()[1], units=64 * envs)


def first_update(**arguments: Any) -> Case:
    """A process of its own, from its start to the end of the first call of `trainer`."""
    return rows.in_a_process(__name__, "trainer", arguments)


# --- environments -------------------------------------------------------------------------------


def _emulated(kind: str, buf: Any = None, seed: int = 0) -> Any:
    return pufferlib.emulation.GymnasiumPufferEnv(bench_envs.make(kind), buf=buf, seed=seed)


def _processes(envs: int) -> rows.Arguments:
    # Its workers spin while they wait, so with one on every core they starve the parent.
    cores = len(os.sched_getaffinity(0)) - 1
    workers = max(n for n in (1, 2, 4, 8) if n <= max(cores, 1))
    backend = pufferlib.vector.Multiprocessing
    return {"backend": backend, "num_workers": workers, "batch_size": envs, "overwork": True}


def vecenv(kind: str, backend: str) -> Case:
    """Steps per second of `pufferlib.vector`."""
    creator = functools.partial(_emulated, kind)
    options: rows.Arguments = {"backend": getattr(pufferlib.vector, backend), "num_envs": 8}
    if backend == "Multiprocessing":
        options |= _processes(8)

    def call() -> float:
        # Made for each measurement, since its workers spin even while idle.
        with contextlib.closing(pufferlib.vector.make(creator, **options)) as made:
            return vector.measure(made, rows.SECONDS)

    return Case(call, rate=True)


def emulation(kind: str) -> Case:
    """Steps of the reference's GymnasiumPufferEnv."""
    return rows.stepping(_emulated(kind))
