"""What is measured: the rows of the bench, their sizes and work. Imports no framework."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]

# Keyword arguments: names, numbers, switches and shapes, which go to another process.
Arguments = dict[str, Any]

# The reference's `[train]` section with the recipe for CartPole, for both sides.
CONFIG: Arguments = {
    "seed": 0,
    "device": "cpu",
    "torch_deterministic": True,
    "cpu_offload": False,
    "compile": False,
    "compile_mode": "default",
    "compile_fullgraph": False,
    "optimizer": "adam",
    "precision": "float32",
    "learning_rate": 5e-3,
    "anneal_lr": True,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-5,
    "max_grad_norm": 0.5,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "update_epochs": 4,
    "clip_coef": 0.2,
    "vf_coef": 2.0,
    "vf_clip_coef": 0.2,
    "ent_coef": 0.001,
    "vtrace_rho_clip": 1.0,
    "vtrace_c_clip": 1.0,
    "prio_alpha": 0.8,
    "prio_beta0": 0.2,
    "bptt_horizon": 64,
    "max_minibatch_size": 10**9,
    "total_timesteps": 10**9,
    "checkpoint_interval": 10**9,
    "env": "bench",
}


def config_of(envs: int, **more: object) -> Arguments:
    """`CONFIG` for epochs of 64 steps of each environment, in four minibatches."""
    return CONFIG | {"batch_size": 64 * envs, "minibatch_size": 16 * envs} | more


class Case(NamedTuple):
    """One contestant in one row, ready to be called.

    Attributes:
        call: does the work once and returns when it is done.
        outputs: from a call's result, the arrays by name that contestants must agree on.
        units: how many units of the row's work a call does.
        rate: whether `call` measures itself and returns units per second.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], Arrays] | None = None
    units: float = 1
    rate: bool = False


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: the row's name, which patterns select by.
        work: the work in words.
        family: name of the functions that build it, in the module of each side.
        contestants: who takes part: name -> arguments; `TORCH` says on which side.
        sizes: arguments shared by all contestants.
        flops: operations in one unit of work; 0: not counted.
        unit: what is shown: seconds per call, steps per second, or bytes of memory.
        tolerance: how far outputs may differ, relative to the largest magnitude of each array.
    """

    name: str
    work: str
    family: str
    contestants: dict[str, Arguments]
    sizes: Arguments = field(default_factory=dict)
    flops: float = 0.0
    unit: Literal["s", "steps/s", "bytes"] = "s"
    tolerance: float = 1e-4


# Contestants that run in torch's process; all others run in ours.
TORCH = ("torch", "torch.compile", "pufferlib")
_THREE: dict[str, Arguments] = {"ours": {}, "torch": {}, "torch.compile": {"compiled": True}}
MINGRU_LAYERS = 4  # PufferLib 4's default
_SHAPES = {"naturecnn": (4, 84, 84), "resnet": (64, 64, 3)}


def rows() -> Iterator[Row]:
    """All rows, in the order of the table."""
    yield from _evaluation()
    yield from _training()
    yield from _learning()
    yield from _trainers()
    yield from _environments()


def _evaluation() -> Iterator[Row]:
    for net in ("default", "lstm"):
        for batch in (1, 8, 64, 512, 4096):
            yield Row(
                f"eval-{net}-{batch}",
                f"forward_eval + sample_logits, host array to host action, batch {batch}",
                "evaluate",
                _THREE,
                {"net": net, "batch": batch},
                batch * network_flops(net, 4, 128, 2),
            )


def _training() -> Iterator[Row]:
    for hidden in (128, 512):
        for batch, time in ((512, 64), (64, 64), (2048, 16)):
            sizes = {"net": "lstm", "lead": (batch, time), "shape": (64,), "hidden": hidden}
            flops = batch * time * network_flops("lstm", 64, hidden, 2)
            more = {"ours, done": {"done": True}, "nnx.RNN": {"plain": True}}
            yield from _directions(
                f"{batch}x{time}-{hidden}", "B x T = {}, H {}", sizes, flops, more
            )
    sizes = {"net": "mingru", "lead": (512, 64), "shape": (64,), "hidden": 128}
    flops = 512 * 64 * network_flops("mingru", 64, 128, 2)
    more = {"ours, done": {"done": True}}
    yield from _directions("512x64-128", "4 layers, B x T = {}, H {}", sizes, flops, more)
    for net, shape in _SHAPES.items():
        for batch in (64, 256):
            sizes = {"net": net, "lead": (batch,), "shape": shape, "hidden": 0}
            more: dict[str, Arguments] = {"lax.conv": {"plain": True}} if net == "naturecnn" else {}
            flops = batch * network_flops(net, 0, 0, 6)
            yield from _directions(str(batch), "batch {}", sizes, flops, more)
    for net, lead, shape in (("lstm", (512, 64), (64,)), ("naturecnn", (256,), (4, 84, 84))):
        yield Row(
            f"memory-{net}",
            f"peak memory of the process in forward + backward, {'x'.join(map(str, lead))}",
            "train",
            {"ours": {}, "torch": {}},
            {"net": net, "lead": lead, "shape": shape, "hidden": 128, "backward": True},
            unit="bytes",
            tolerance=2e-3,
        )


def _directions(
    name: str, work: str, sizes: Arguments, flops: float, more: dict[str, Arguments]
) -> Iterator[Row]:
    words = work.format("x".join(map(str, sizes["lead"])), sizes["hidden"])
    for backward in (False, True):
        yield Row(
            f"{sizes['net']}-{'fwdbwd' if backward else 'fwd'}-{name}",
            f"{'forward + backward' if backward else 'forward (torch: no_grad)'}, {words}",
            "train",
            _THREE | more,
            sizes | {"backward": backward},
            flops * (3 if backward else 1),
            # In a backward pass, rounding may tip a ReLU or a maximum the other way.
            tolerance=2e-3 if backward else 1e-4,
        )


def _learning() -> Iterator[Row]:
    yield Row(
        "advantage-4096x64",
        "puff_advantage, 4096 segments of 64 steps",
        "advantage",
        {"ours": {}, "torch": {}},
        {"segments": 4096, "horizon": 64},
    )
    for net in ("default", "lstm"):
        yield Row(
            f"update-{net}",
            "one PPO update: 64 segments of 64 steps, 4 epochs of 4 minibatches",
            "update",
            {"ours": {}, "torch": {}},
            {"net": net, "envs": 64},
            16 * 16 * 64 * 3 * network_flops(net, 4, 128, 2),
            tolerance=2e-3,
        )


def _trainers() -> Iterator[Row]:
    host = "PuffeRL, gymnasium's CartPole, 64 environments"
    backends = {
        "": ("ours: Multiprocessing, a local worker, half batches in turn; torch: Serial", False),
        "-processes": ("Multiprocessing; ours with a local worker, half batches in turn", True),
    }
    for net in ("default", "lstm"):
        for name, (backend, processes) in backends.items():
            contestants: dict[str, Arguments] = {
                "ours": {"processes": True},
                "torch": {"processes": processes},
            }
            yield Row(
                f"trainer-host-64-{net}{name}",
                f"{host}; {backend}",
                "trainer",
                contestants if processes else contestants | {"ours, Serial": {}},
                {"net": net, "envs": 64},
                unit="steps/s",
            )
    for net in ("default", "lstm"):
        for envs in (64, 1024):
            yield Row(
                f"trainer-jax-{envs}-{net}",
                f"compiled CartPole, {envs} environments; torch: its PuffeRL on gymnasium's",
                "trainer",
                {"ours": {"native": True}, "torch": {}, "PureJaxRL": {"plain": True}},
                {"net": net, "envs": envs},
                unit="steps/s",
            )
    for net in ("default", "lstm"):
        yield Row(
            f"devices-1024-{net}",
            "PuffeRL on compiled CartPole, 1024 environments on 1, 2 and 8 devices made of the CPU",
            "devices",
            {"ours": {"count": 1}, "2 devices": {"count": 2}, "8 devices": {"count": 8}},
            {"net": net, "envs": 1024},
            unit="steps/s",
        )

    for net in ("default", "lstm"):
        yield Row(
            f"first-update-{net}",
            "a fresh process, until CartPole's first update (64 environments in turn) has ended",
            "first_update",
            {"ours": {}, "torch": {}, "ours, JAX-native": {"native": True}},
            {"net": net, "envs": 64},
        )


def _environments() -> Iterator[Row]:
    kinds = {
        "cartpole": "gymnasium's CartPole",
        "structured": "nested observations and actions",
        "image": "84x84x4 images",
        "slow": "steps of 1 ms",
    }
    backends = {
        "Serial": "",
        "Multiprocessing": "; ours: one per core, this process included; PufferLib's: one fewer",
    }
    for backend, processes in backends.items():
        for kind, words in kinds.items():
            yield Row(
                f"vecenv-{kind}-{backend.lower()}",
                f"{words}, 8 environments, random actions{processes}",
                "vecenv",
                {"ours": {}, "pufferlib": {}, "gymnasium": {"plain": True}},
                {"kind": kind, "backend": backend},
                unit="steps/s",
            )
    kinds["box"] = "four floats"
    for kind in ("box", "structured", "image"):
        yield Row(
            f"emulation-{kind}",
            f"GymnasiumPufferEnv.step, {kinds[kind]}, the environment's own step included",
            "emulation",
            {"ours": {}, "pufferlib": {}},
            {"kind": kind},
            unit="steps/s",
        )


def network_flops(net: str, inputs: int, hidden: int, actions: int) -> float:
    """Multiplications and additions in one observation's forward pass, matmuls and convolutions."""
    match net:
        case "default":
            return 2.0 * hidden * (inputs + actions + 1)
        case "lstm":
            return 2.0 * hidden * (inputs + actions + 1) + 2.0 * 4 * hidden * 2 * hidden
        case "mingru":
            return 2.0 * hidden * (inputs + actions + 1) + MINGRU_LAYERS * 2.0 * 3 * hidden * hidden
        case "naturecnn":
            convolutions = 20 * 20 * 32 * 4 * 64 + 9 * 9 * 64 * 32 * 16 + 7 * 7 * 64 * 64 * 9
            return 2.0 * (convolutions + 3136 * 512 + 512 * (actions + 1))
        case "resnet":
            total, side, channels = 0, 64, 3
            for out in (16, 32, 32):
                total += side * side * 9 * channels * out
                side, channels = side // 2, out
                total += 4 * side * side * 9 * out * out
            return 2.0 * (total + side * side * channels * 256 + 256 * (actions + 1))
    raise ValueError(f"no such network: {net!r}")


def generic(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Arrays:
    """Weights of roughly the usual size, the same on all sides; `shapes` by torch's names."""
    # An LSTMWrapper lists its LSTM's weights under a second name.
    tied = {"cell.weight_ih": "lstm.weight_ih_l0", "cell.weight_hh": "lstm.weight_hh_l0"}
    tied |= {"cell.bias_ih": "lstm.bias_ih_l0", "cell.bias_hh": "lstm.bias_hh_l0"}
    random = np.random.default_rng(seed)
    made: Arrays = {}
    for name in sorted(set(shapes) - set(tied)):
        shape = shapes[name]
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 100
        made[name] = (random.uniform(-1, 1, shape) / fan_in**0.5).astype(np.float32)
    return made | {name: made[tied[name]] for name in shapes if name in tied}


def observations(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Bytes for images (batch, three axes), otherwise normal float32."""
    random = np.random.default_rng(seed)
    if len(shape) == 4:
        return random.integers(0, 256, shape, np.uint8)
    return random.standard_normal(shape).astype(np.float32)


def experience(envs: int, horizon: int, seed: int = 2) -> Arrays:
    """What a rollout of CartPole might have left, (envs, horizon, ...)."""
    random = np.random.default_rng(seed)
    shape = envs, horizon
    floats = {
        "observations": random.standard_normal((*shape, 4)),
        "logprobs": np.log(random.uniform(0.4, 0.6, shape)),
        "values": random.standard_normal(shape),
        "rewards": random.uniform(-1, 1, shape),
        "terminals": random.random(shape) < 0.05,
    }
    arrays = {name: array.astype(np.float32) for name, array in floats.items()}
    return arrays | {"actions": random.integers(0, 2, shape)}


def in_a_process(module: str, family: str, arguments: Arguments) -> Case:
    """A Python that starts, builds a case of the module's, calls it once and ends."""
    code = f"import {module} as side; side.{family}(**{arguments!r}).call()"

    def call() -> float:
        began = perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the process failed: {done.stderr[-300:]}")
        return 1 / (perf_counter() - began)

    return Case(call, rate=True)  # nothing in it is faster the second time


# The length of one measurement of a vecenv.
SECONDS = 0.3


def stepping(env: Any) -> Case:
    """Steps of an emulated environment that never ends."""
    env.reset(seed=0)
    action = np.zeros((1, *env.single_action_space.shape), np.int32)

    def call() -> None:
        for _ in range(500):
            env.step(action)

    return Case(call, units=500)


def minibatches(envs: int, seed: int = 3) -> np.ndarray:
    """Rows of an update's 16 minibatches, for the comparison; (16, envs / 4)."""
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(envs)[: envs // 4] for _ in range(16)])
