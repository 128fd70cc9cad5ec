"""Everything that needs a device, in one command and at most eight minutes.

    python parity_tests/on_device.py --platform gpu --out on_device

On a machine with jax for its device, flax, optax and orbax (`pip install -e .`), this says how far
each policy is from its float64 results in each precision, how far each kernel is from XLA's
operations on random shapes, and how fast the important rows of `puffer-jax bench` are; the latter
beside PufferLib where torch, gymnasium and pufferlib-core are installed, too. It writes `OUT.json`
after each part, and `OUT.md` with the tables. Exit code 0, 1 if a number is beyond its bar, 2 if
something is missing.

`--platform cpu --tiny` tries the script itself, in a minute.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
NEEDED = ("jax", "flax", "optax", "orbax.checkpoint", "numpy", "jaxtyping")
COMPARED = ("torch", "gymnasium", "pufferlib")
SHAPES = {"nature": (4, 84, 84), "resnet": (64, 64, 3)}
POLICIES = ("default", "lstm", "nature", "resnet")
PRECISIONS = {"float64": "highest", "float32": "highest", "tf32": "tensorfloat32", "bfloat16": None}
# float64 and float32 have the bars of the tests. A TF32 product rounds its factors to 11 bits
# (5e-4), of bfloat16 to 8 (4e-3); a policy has a handful of products in a row, a gradient twice.
COARSE = {"tf32": (1e-2, 3e-2), "bfloat16": (3e-2, 1e-1)}
ROWS = ("eval-default-4096", "eval-lstm-4096", "lstm-fwdbwd-512x64-128", "naturecnn-fwdbwd-256")
ROWS += ("resnet-fwdbwd-256", "advantage-4096x64", "update-lstm", "trainer-jax-1024-*")

Table = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--platform", choices=("gpu", "tpu", "cpu"), default="gpu")
    parser.add_argument("--out", type=Path, default=Path("on_device"), help="without suffix")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true", help="small shapes, one row")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    if missing := [name for name in NEEDED if not installed(name)]:
        print(f"not installed: {', '.join(missing)}. `pip install -e .` beside jax for the device")
        return 2
    if absent := [name for name in COMPARED if not installed(name)]:
        print(f"{', '.join(absent)} not installed: only our own times are measured")
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda,cpu", "tpu": "tpu,cpu", "cpu": "cpu"}[
        given.platform
    ]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    import jax

    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        print(f"JAX finds no {given.platform}: {error}")
        return 2
    report: dict[str, Any] = {
        "device": device.device_kind,
        "versions": {name: version(name) for name in (*NEEDED, *COMPARED)},
        "date": time.strftime("%Y-%m-%d"),
    }
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "parity": lambda: parity(given.tiny),
        "kernels": lambda: kernels(given.platform, given.tiny),
        "bench": lambda: bench(given, deadline),
    }
    # What is measured last gets what is left of the time.
    shares = {"parity": 0.4, "kernels": 0.6, "bench": 1.0}
    began = time.monotonic()
    for name, part in parts.items():
        table: Table = []
        report[name] = table
        until = began + shares[name] * (deadline - began)
        for row in part():
            table.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            if time.monotonic() > until:
                table.append({"row": "(no time left)"})
                break
        given.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    given.out.with_suffix(".md").write_text(page(report))
    print(f"{given.out}.json and {given.out}.md after {time.monotonic() - began:.0f} s")
    return int(any(row.get("ok") is False for name in parts for row in report[name]))


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def version(name: str) -> str | None:
    package = {"orbax.checkpoint": "orbax-checkpoint", "pufferlib": "pufferlib-core"}.get(
        name, name
    )
    try:
        return importlib.metadata.version(package or name)
    except importlib.metadata.PackageNotFoundError:
        return None


def policy_of(net: str, **dtypes: Any) -> Any:
    import numpy as np
    from flax import nnx

    import puffer_jax.kernels
    from puffer_jax.base.spaces import Box, Discrete

    shape = SHAPES.get(net, (4,))
    kind = np.uint8 if len(shape) == 3 else np.float32
    space = Box(0 if len(shape) == 3 else -np.inf, 255 if len(shape) == 3 else np.inf, shape, kind)
    env: Any = SimpleNamespace(single_observation_space=space, single_action_space=Discrete(6))
    env.observation_space, env.action_space = space, env.single_action_space
    if net == "nature":
        return puffer_jax.Convolutional(env, 4, flat_size=3136, rngs=nnx.Rngs(0), **dtypes)
    if net == "resnet":
        return puffer_jax.ProcgenResnet(env, rngs=nnx.Rngs(0), **dtypes)
    policy = puffer_jax.Default(env, 128, rngs=nnx.Rngs(0), **dtypes)
    if net == "lstm":
        return puffer_jax.LSTMWrapper(env, policy, 128, 128, rngs=nnx.Rngs(0), **dtypes)
    return policy


def results(net: str, precision: str, obs: Any) -> dict[str, Any]:
    """Outputs of a policy and gradients of a loss of them, with float32's weights."""
    import jax
    import jax.numpy as jnp

    import puffer_jax.kernels

    wide = jnp.float64 if precision == "float64" else jnp.float32
    compute = jnp.bfloat16 if precision == "bfloat16" else wide
    graphdef, _ = puffer_jax.split(policy_of(net, param_dtype=wide, dtype=compute))
    _, params = puffer_jax.split(policy_of(net, param_dtype=jnp.float32))
    params = jax.tree.map(lambda x: x.astype(wide), params)

    def loss(params: Any, obs: Any) -> Any:
        logits, values, *_ = puffer_jax.merge(graphdef, params).forward(obs, None)
        return (logits**2).mean() + (values**2).mean(), (logits, values)

    with jax.default_matmul_precision(PRECISIONS[precision]):
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, outputs), gradients = run(params, obs)
    return {"forward": outputs, "gradient": gradients}


def parity(tiny: bool) -> Iterator[dict[str, Any]]:
    """Errors of outputs and gradients against float64 on the CPU, by XLA."""
    import jax
    import numpy as np
    from support.bars import BARS

    import puffer_jax.kernels

    jax.config.update("jax_enable_x64", True)
    numbers = np.random.default_rng(0)
    for net in POLICIES[:2] if tiny else POLICIES:
        lead = (3 if tiny else 64, *((5,) if net == "lstm" else ()))
        shape = (*lead, *SHAPES.get(net, (4,)))
        images = net in SHAPES
        obs = numbers.integers(0, 256, shape) if images else numbers.normal(size=shape)
        obs = obs.astype(np.uint8 if images else np.float32)
        with jax.default_device(jax.devices("cpu")[0]), puffer_jax.kernels.use("xla"):
            exact = results(net, "float64", obs)
        for precision in PRECISIONS:
            found = results(net, precision, obs)
            for kind, place in (("forward", 0), ("gradient", 1)):
                error = worst(found[kind], exact[kind])
                bar = COARSE[precision][place] if precision in COARSE else BARS[kind][precision]
                row = f"{net} {kind} {precision}"
                yield {"row": row, "error": error, "bar": bar, "ok": error <= bar}


def worst(found: Any, exact: Any) -> float:
    """The largest difference, relative to the largest magnitude of its array."""
    import jax
    import numpy as np

    errors = [0.0]
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        errors.append(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)))
    return max(errors)


def kernels(platform: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Each kernel for the platform against XLA's operations, on random shapes."""
    import jax
    import numpy as np

    import puffer_jax.ppo.update  # noqa: F401  (it declares operations, too)
    from puffer_jax.kernels import OPERATIONS

    numbers = np.random.default_rng(1)
    for name, operation in sorted(OPERATIONS.items()):
        if platform not in operation.implementations:
            continue
        if name not in ARGUMENTS:
            yield {"row": name, "note": "has a kernel, but this script knows no arguments"}
            continue
        arguments, bar = ARGUMENTS[name]
        error, tried = 0.0, 0
        ways = {way: operation.implementations[way] for way in ("xla", platform)}
        for _ in range(2 if tiny else 8):
            arrays, options = arguments(numbers, 8 if tiny else 300)
            if platform not in operation.kernels(*arrays, **options):
                continue
            tried += 1
            with jax.default_matmul_precision("highest"):
                exact, found = (jax.jit(partial(way, **options))(*arrays) for way in ways.values())
            error = max(error, worst(found, exact))
        yield {"row": name, "shapes": tried, "error": error, "bar": bar, "ok": error <= bar}


def _some(numbers: Any, *shape: int) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(numbers.normal(size=shape), jnp.float32)


def _recurrence(numbers: Any, most: int) -> tuple[Any, dict[str, Any]]:
    shape = numbers.integers(1, most, 2)
    return (_some(numbers, *shape), 0.9 * _some(numbers, *shape).clip(-1, 1)), {}


def _lstm(numbers: Any, most: int) -> tuple[Any, dict[str, Any]]:
    batch, time, inputs = (int(n) for n in numbers.integers(1, most // 4 + 2, 3))
    hidden = int(numbers.choice([8, 32, 100, 128])) if most > 8 else 8
    weights = [0.1 * _some(numbers, 4 * hidden, n) for n in (inputs, hidden)]
    done = numbers.random((batch, time)) < 0.1
    state = [_some(numbers, batch, hidden) for _ in range(2)]
    x = _some(numbers, batch, time, inputs)
    return (*weights, _some(numbers, 4 * hidden), x, *state, done), {"dtype": None}


def _step(numbers: Any, most: int) -> tuple[Any, dict[str, Any]]:
    (w, u, bias, x, h, c, _), options = _lstm(numbers, most)
    return (w, u, bias, bias, x[:, 0], h, c), options


def _arrays(numbers: Any, most: int) -> tuple[Any, dict[str, Any]]:
    return tuple(_some(numbers, most, 3) for _ in range(4)), {}


def _score(numbers: Any, most: int) -> tuple[Any, dict[str, Any]]:
    actions = int(numbers.integers(2, 20))
    logits = 3 * _some(numbers, most, actions)
    return (logits, numbers.integers(0, actions, most)), {}


def _matrices(numbers: Any, most: int) -> tuple[Any, dict[str, Any]]:
    shapes = (most, 4), (2, most), (1, most), (most, 7)
    return tuple(_some(numbers, *shape) for shape in shapes), {"dtype": None}


# Random arguments of each operation, and how far its results may be apart: rounding of float32 in
# as many steps as an LSTM has, or as one sum has terms. Five Newton-Schulz steps enlarge it.
ARGUMENTS: dict[str, tuple[Callable[..., Any], float]] = {
    "first_nonfinite": (_arrays, 0.0),
    "lstm_scan": (_lstm, 2e-5),
    "lstm_step": (_step, 5e-6),
    "norm": (_arrays, 5e-6),
    "orthogonalize": (_matrices, 1e-4),
    "recurrence": (_recurrence, 2e-5),
    "score": (_score, 5e-6),
    "sums": (_arrays, 2e-5),
}


def bench(given: Any, deadline: float) -> Iterator[dict[str, Any]]:
    """Rows of `puffer-jax bench`, one process each."""
    if given.platform == "tpu":
        yield {"row": "bench", "note": "`puffer-jax bench` measures CPUs and GPUs"}
        return
    for row in ("eval-default-1",) if given.tiny else ROWS:
        left = deadline - time.monotonic()
        if left < 20:
            yield {"row": row, "note": "no time left"}
            continue
        path = given.out.with_name(f"{given.out.name}-bench.json")
        command = [sys.executable, "-m", "puffer_jax", "bench", "--device", given.platform]
        command += ["--rows", row, "--seconds", "1", "--json", str(path)]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        environment.pop("JAX_PLATFORMS")
        try:
            done = subprocess.run(
                command, env=environment, timeout=left, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            yield {"row": row, "note": "no time left"}
            continue
        written = sorted(path.parent.glob(f"{path.stem}*.json"))
        if not written:
            yield {"row": row, "ok": False, "note": done.stderr.strip()[-500:]}
        for file in written:
            measured = json.loads(file.read_text())
            for name, result in measured["rows"].items():
                ours = result["contestants"].get("ours", {})
                yield {
                    "row": f"{name} {measured['header']['precision']}",
                    "cost of": result["cost_of"],
                    "ours": ours.get("median"),
                    **{other: x["median"] for other, x in result["ratios"].items()},
                    "ok": not (result["mismatch"] or ours.get("failed")),
                    "note": result["mismatch"] or ours.get("failed"),
                }
            file.unlink()


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {x}" for name, x in report["versions"].items() if x)
    lines = [f"On one {report['device']}, {report['date']}; {versions}.", ""]
    for name in ("parity", "kernels", "bench"):
        keys = list(dict.fromkeys(key for row in report[name] for key in row))
        lines += [f"## {name}", "", f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
        lines += [f"| {' | '.join(cell(row.get(key)) for key in keys)} |" for row in report[name]]
        lines.append("")
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2e}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
