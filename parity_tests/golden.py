"""Golden files: what the reference computes, for where it cannot be installed.

`python parity_tests/golden.py` writes golden/*.safetensors anew; that needs the reference, reading
them does not. A file holds, in torch's layout and under torch's names:

    weights/NAME    int8; the weight is that times 2**-k, with k in the metadata: exact in any
                    precision, and a quarter of the size of float32
    inputs/NAME     observations and states
    outputs/NAME    the reference's logits, values and states in float64

golden/v4 has a `.pt` file of PufferLib 4's Python policies, a `.bin` file of its native trainer,
and what they compute.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from safetensors import safe_open
from safetensors.numpy import save_file
from support.bars import named, prefixed, stub_env

FOLDER = Path(__file__).parent / "golden"
NAMES = ("default", "lstm", "convolutional", "procgen")
BATCH, TIME, HIDDEN = 4, 3, 9

Arrays = dict[str, np.ndarray]


@dataclass
class Golden:
    weights: Arrays
    inputs: Arrays
    outputs: Arrays
    versions: dict[str, str]


def build(name: str, library: Any, **options: Any) -> Any:
    """The policy of a golden file, from `pufferlib.models` or `puffer_jax`."""
    if name == "default":
        env = stub_env(Box(-1, 1, (5, 3)), MultiDiscrete([2, 1, 4]))
        return library.Default(env, HIDDEN, **options)
    if name == "lstm":
        env = stub_env(Box(-1, 1, (7,)), Box(-1, 1, (3,)))
        policy = library.Default(env, HIDDEN, **options)
        return library.LSTMWrapper(env, policy, HIDDEN, HIDDEN, **options)
    if name == "convolutional":
        env = stub_env(Box(0, 255, (1, 36, 44), np.uint8), Discrete(5))
        sizes = {"hidden_size": HIDDEN, "output_size": HIDDEN, "framestack": 1, "flat_size": 128}
        return library.Convolutional(env, **sizes, **options)
    env = stub_env(Box(0, 255, (13, 18, 3), np.uint8), Discrete(5))
    return library.ProcgenResnet(env, 4, HIDDEN, **options)


def run_ours(policy: Any, inputs: Arrays) -> dict[str, Any]:
    """Named outputs of our policy."""
    x = inputs["observations"]
    if "lstm_h" not in inputs:
        return named(*policy(x))
    state = {name: jnp.asarray(inputs[name]) for name in ("lstm_h", "lstm_c")}
    step = named(*policy.forward_eval(x[:, 0], state))
    return {**named(*policy(x)), **prefixed("eval", step)}


def run_theirs(policy: Any, inputs: Arrays) -> dict[str, Any]:
    """Named outputs of the reference's policy, of which states are in its parameters' dtype."""
    import torch

    x = torch.from_numpy(inputs["observations"])
    if "lstm_h" not in inputs:
        return named(*policy(x))
    dtype = policy.lstm.bias_ih_l0.dtype
    acting = {n: torch.from_numpy(inputs[n]).to(dtype) for n in ("lstm_h", "lstm_c")}
    training = {"lstm_h": None, "lstm_c": None}
    outputs = named(*policy(x, training))
    for key in sorted(training):
        state = training[key] if key == "hidden" else training[key].squeeze(0)
        outputs[f"state.{key}"] = state
    step = named(*policy.forward_eval(x[:, 0], acting), acting)
    return {**outputs, **prefixed("eval", step)}


def reference_outputs(name: str, weights: Arrays, inputs: Arrays) -> Arrays:
    """What the reference computes in float64 with these weights; the one place that needs it."""
    import pufferlib.models
    import torch
    from support.reference import run_torch

    policy = build(name, pufferlib.models)
    tensors = {key: torch.from_numpy(weight) for key, weight in weights.items()}
    # Tied keys are left out of the file and restored by the tie.
    missing, unexpected = policy.load_state_dict(tensors, strict=False)
    assert not unexpected and all(key.startswith("cell.") for key in missing)
    run = run_torch(policy, "float64", lambda policy: run_theirs(policy, inputs), gradients=False)
    return run.outputs


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def load(name: str) -> Golden:
    """Read a golden file; weights as float32."""
    groups: dict[str, Arrays] = {"weights": {}, "inputs": {}, "outputs": {}}
    with safe_open(path_of(name), framework="np") as file:
        metadata = file.metadata()
        exponents, order = json.loads(metadata["exponents"]), json.loads(metadata["order"])
        for key in order:
            group, _, rest = key.partition("/")
            groups[group][rest] = file.get_tensor(key)
    weights = {
        key: np.ldexp(tensor.astype(np.float32), -exponents[key])
        for key, tensor in groups["weights"].items()
    }
    return Golden(weights, groups["inputs"], groups["outputs"], json.loads(metadata["versions"]))


def generate(name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a golden file."""
    import pufferlib.models

    random = np.random.default_rng(NAMES.index(name))
    tensors: dict[str, np.ndarray] = {}
    exponents, weights = {}, {}
    policy = build(name, pufferlib.models)
    for key, parameter in policy.named_parameters():
        shape = tuple(parameter.shape)
        integers = random.integers(-127, 128, shape, dtype=np.int8)
        # The spread of a Linear initialised by torch, sqrt(3 / fan_in), keeps activations sane.
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 16
        exponents[key] = round(float(np.log2(127 / np.sqrt(3 / fan_in))))
        tensors[f"weights/{key}"] = integers
        weights[key] = np.ldexp(integers.astype(np.float32), -exponents[key])

    space = policy_observation(name)
    shape = (BATCH, TIME, *space.shape) if name == "lstm" else (BATCH, *space.shape)
    if space.dtype == np.uint8:
        inputs = {"observations": random.integers(0, 256, shape, dtype=np.uint8)}
    else:
        inputs = {"observations": random.standard_normal(shape).astype(np.float32)}
    if name == "lstm":
        for key in ("lstm_h", "lstm_c"):
            inputs[key] = random.standard_normal((BATCH, HIDDEN)).astype(np.float32)
    outputs = reference_outputs(name, weights, inputs)
    tensors |= {f"inputs/{key}": array for key, array in inputs.items()}
    tensors |= {f"outputs/{key}": np.ascontiguousarray(array) for key, array in outputs.items()}
    metadata = {
        "exponents": json.dumps(exponents),
        # safetensors sorts by dtype and name.
        "order": json.dumps(list(tensors)),
        "versions": json.dumps(versions()),
    }
    return tensors, metadata


def policy_observation(name: str) -> Box:
    """The observation space `build` uses."""

    class Library:
        def __getattr__(self, _: str) -> Any:
            return lambda env, *args, **options: env.observation_space

    class Inner(Library):
        LSTMWrapper = staticmethod(lambda env, *args, **options: env.observation_space)

    return build(name, Inner())


# --- PufferLib 4, of which there is no wheel: what a twin of torch's operations computes ----------

V4 = FOLDER / "v4"
V4_OBS, V4_ACTIONS, V4_LAYERS = 5, 3, 2


def v4_env() -> Any:
    return stub_env(Box(-1, 1, (V4_OBS,)), Discrete(V4_ACTIONS))


def v4_weights(native: bool) -> Arrays:
    """Multiples of 1/64, by the names of PufferLib 4's Python policies, or in the native order."""
    random = np.random.default_rng(4 + native)
    shapes: dict[str, tuple[int, ...]] = {}
    if native:
        shapes["encoder.weight"] = HIDDEN, V4_OBS
        shapes["decoder.weight"] = V4_ACTIONS + 1, HIDDEN
    else:
        layers = {"encoder.encoder": V4_OBS, "decoder.decoder": HIDDEN}
        rows = {"encoder.encoder": HIDDEN, "decoder.decoder": V4_ACTIONS}
        for name, inputs in (layers | {"decoder.value_function": HIDDEN}).items():
            shapes[f"{name}.weight"] = rows.get(name, 1), inputs
            shapes[f"{name}.bias"] = (rows.get(name, 1),)
    for i in range(V4_LAYERS):
        shapes[f"network.layers.{i}.weight"] = 3 * HIDDEN, HIDDEN
    return {n: random.integers(-40, 41, s).astype(np.float32) / 64 for n, s in shapes.items()}


def v4_outputs(weights: Arrays, observations: np.ndarray) -> Arrays:
    """Logits and values (batch * time, ...) in float64, step by step from the zero state."""
    import torch

    w = {name: torch.from_numpy(tensor).double() for name, tensor in weights.items()}
    native, rows = "decoder.weight" in w, []
    states = [torch.zeros(len(observations), HIDDEN).double() for _ in range(V4_LAYERS)]
    for x in torch.from_numpy(observations).double().unbind(1):
        name = "encoder" if native else "encoder.encoder"
        y = torch.nn.functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))
        for i, h in enumerate(states):
            u, g, p = (y @ w[f"network.layers.{i}.weight"].T).chunk(3, -1)
            candidate = torch.where(u >= 0, u + 0.5, u.sigmoid())
            states[i] = h + g.sigmoid() * (candidate - h)
            y = p.sigmoid() * states[i] + (1 - p.sigmoid()) * y
        names = ("decoder",) if native else ("decoder.decoder", "decoder.value_function")
        heads = [torch.nn.functional.linear(y, w[f"{n}.weight"], w.get(f"{n}.bias")) for n in names]
        rows.append(torch.cat(heads, 1))
    outputs = torch.stack(rows, 1).flatten(0, 1).numpy()
    return {"logits": outputs[:, :-1].copy(), "values": outputs[:, -1].reshape(-1, TIME).copy()}


def write_v4() -> None:
    """`python.pt` as torch writes it, `native.bin` as the native trainer, what both compute."""
    import torch

    V4.mkdir(exist_ok=True)
    random = np.random.default_rng(3)
    tensors = {"observations": random.standard_normal((BATCH, TIME, V4_OBS)).astype(np.float32)}
    for name in ("python", "native"):
        weights = v4_weights(name == "native")
        outputs = v4_outputs(weights, tensors["observations"])
        tensors |= {f"{name}/{key}": array for key, array in outputs.items()}
        if name == "python":
            state = {key: torch.from_numpy(tensor) for key, tensor in weights.items()}
            torch.save(state, V4 / "python.pt")
            continue
        data = np.zeros(0, np.float32)
        for tensor in weights.values():  # each begins at a multiple of 8 floats
            data = np.concatenate([data, np.zeros(-len(data) % 8, np.float32), tensor.ravel()])
        data.astype("<f4").tofile(V4 / "native.bin")
    save_file(tensors, V4 / "outputs.safetensors", {"versions": json.dumps(versions())})


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("torch", "pufferlib-core", "numpy")}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        tensors, metadata = generate(name)
        save_file(tensors, path_of(name), metadata)
        print(f"{path_of(name)}: {path_of(name).stat().st_size / 1024:.1f} KiB")
    write_v4()


if __name__ == "__main__":
    main()
