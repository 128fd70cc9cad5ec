"""Golden files: what the reference computes, for where it cannot be installed.

`python parity_tests/golden.py` writes golden/*.safetensors anew; that needs the reference, reading
them does not. A file holds, in torch's layout and under torch's names:

    weights/NAME    int8; the weight is that times 2**-k, with k in the metadata: exact in any
                    precision, and a quarter of the size of float32
    inputs/NAME     observations and states
    outputs/NAME    the reference's logits, values and states in float64
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


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("torch", "pufferlib-core", "numpy")}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        tensors, metadata = generate(name)
        save_file(tensors, path_of(name), metadata)
        print(f"{path_of(name)}: {path_of(name).stat().st_size / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
