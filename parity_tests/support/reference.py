"""Running the reference and ours side by side, in either precision."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import jax
import numpy as np
import pufferlib.emulation
import torch
from flax import nnx
from torch.overrides import TorchFunctionMode

import puffer_jax
from support.bars import BARS, FLOAT32_RATIO, Outputs, assert_arrays_close, record
from support.bars import stub_env as stub_env

# Two numbers that are each within the bar of the exact ones keep their order, if that far apart.
MARGIN = 2 * BARS["forward"]["float32"]


class _FloatIsDouble(TorchFunctionMode):
    """The reference casts with `.float()`; in float64 that must not round."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*args, **(kwargs or {}))


@contextmanager
def torch_precision(dtype: str) -> Iterator[None]:
    """Run the reference, unchanged, in "float32" or "float64"."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    mode = _FloatIsDouble() if dtype == "float64" else nullcontext()
    try:
        with warnings.catch_warnings(), mode:
            # torch deprecates _check_is_size, which the reference's nativize_tensor calls.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_default_dtype(default)


class _Decisions(TorchFunctionMode):
    """Notes how narrowly ReLUs and max-pools decide, relative to their largest input."""

    def __init__(self, margins: list[float]):
        super().__init__()
        self.margins = margins

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if "relu" in name:
            x = args[0].detach()
            self.margins.append(float(x.abs().min() / x.abs().max()))
        elif "max_pool" in name:
            self.margins.append(_pool_margin(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _pool_margin(x: torch.Tensor, size: int, *, stride: int, padding: int, **_: Any) -> float:
    """The least lead of a window's largest element over its second."""
    padded = torch.nn.functional.pad(x.detach(), [padding] * 4, value=-torch.inf)
    windows = padded.unfold(2, size, stride).unfold(3, size, stride).flatten(4)
    first, second = windows.topk(2).values.unbind(-1)
    return float((first - second).min() / x.detach().abs().max())


@contextmanager
def decisions() -> Iterator[list[float]]:
    """The margins of all decisions of the reference, from which a gradient jumps.

    They are those of its float64 run; a float32 run decides alike if rounding cannot reach them.
    """
    margins: list[float] = []
    with _Decisions(margins):
        yield margins


# --- environments ------------------------------------------------------------------------------


class SampledEnv(gymnasium.Env):
    """Hands out samples of its observation space and remembers them."""

    def __init__(self, observation_space: Any, action_space: Any):
        self.observation_space = observation_space
        self.action_space = action_space
        self.samples: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        if seed is not None:
            self.observation_space.seed(seed)
        self.samples.append(self.observation_space.sample())
        return self.samples[-1], {}


def emulated(observation_space: Any, action_space: Any) -> pufferlib.emulation.GymnasiumPufferEnv:
    """The real emulation around an environment with these spaces."""
    return pufferlib.emulation.GymnasiumPufferEnv(SampledEnv(observation_space, action_space))


def emulated_observations(env: pufferlib.emulation.GymnasiumPufferEnv, count: int) -> np.ndarray:
    """(count, width): what the emulated environment hands out on `count` resets."""
    rows = [env.reset(seed=5)[0].copy(), *(env.reset()[0].copy() for _ in range(count - 1))]
    return np.concatenate(rows)


def stack(drawn: list[Any]) -> Any:
    """Observations stacked leaf by leaf; dicts and tuples keep their form and order."""
    if isinstance(drawn[0], dict):
        return {key: stack([one[key] for one in drawn]) for key in drawn[0]}
    if isinstance(drawn[0], tuple):
        return tuple(stack(list(leaves)) for leaves in zip(*drawn, strict=True))
    return np.stack(drawn)


def samples(space: Any, count: int) -> Any:
    """`count` samples of a space, stacked."""
    space.seed(5)
    return stack([space.sample() for _ in range(count)])


# --- running both sides ------------------------------------------------------------------------


@dataclass
class Result:
    """Named outputs, and gradients under torch's parameter names."""

    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray] = field(default_factory=dict)


def randomise(module: Any, scale: float = 0.1) -> Any:
    """Move every parameter off its initial value, so that no bias is zero and no logit tiny."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def loss_of(outputs: Outputs) -> Any:
    """A loss with generic gradients: sum(w * y) over logits and values y.

    Linear, so that w is the cotangent in either precision. One made of y would carry the rounding
    of y into every gradient, and where a gradient is a sum that nearly cancels, show little else.
    States are left out: the reference detaches them.
    """
    generator = np.random.default_rng(3)
    total = 0.0
    for name, y in outputs.items():
        if "state." not in name:
            w = generator.standard_normal(y.shape).astype(np.float32)  # exact in both precisions
            w = (
                torch.from_numpy(w).to(y.dtype)
                if isinstance(y, torch.Tensor)
                else w.astype(y.dtype)
            )
            total = total + (w * y).sum()
    return total


def run_torch(
    policy: torch.nn.Module, dtype: str, run: Callable[[Any], Outputs], gradients: bool = True
) -> Result:
    """Outputs of `run(policy)` in `dtype`, and the gradients of `loss_of` them."""
    with torch_precision(dtype):
        policy = copy.deepcopy(policy).to(getattr(torch, dtype))
        outputs = run(policy)
        found = {}
        if gradients:
            loss_of(outputs).backward()
            found = {name: p.grad.numpy() for name, p in policy.named_parameters()}
    return Result({name: y.detach().numpy() for name, y in outputs.items()}, found)


def run_jax(
    policy: Any, run: Callable[[Any], Outputs], gradients: bool = True, compiled: bool = False
) -> Result:
    """The same for ours; the precision is that of its parameters."""
    graphdef, params = puffer_jax.split(policy)

    def losses(params: Any) -> tuple[Any, Outputs]:
        outputs = run(puffer_jax.merge(graphdef, params))
        return loss_of(outputs), outputs

    if not gradients:
        outputs, found = losses(params)[1], {}
    else:
        function = jax.grad(losses, has_aux=True)
        grads, outputs = (jax.jit(function) if compiled else function)(params)
        found = torch_names(graphdef, grads)
    # jit returns a dict sorted by key; torch's order is that of the calls.
    return Result({name: np.asarray(y) for name, y in outputs.items()}, found)


def torch_names(graphdef: Any, params: Any) -> dict[str, np.ndarray]:
    """Parameters or gradients under the names of torch's `named_parameters()`."""
    tensors = puffer_jax.state_dict(puffer_jax.merge(graphdef, params))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("cell.")}


def skeleton(build: Callable[[], Any]) -> Any:
    """Our policy with zeros for parameters: building it abstractly saves compiling its init."""
    graphdef, params = puffer_jax.split(nnx.eval_shape(build))
    return puffer_jax.merge(graphdef, jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), params))


def generic(build: Callable[[], Any], seed: int = 0) -> Any:
    """Our policy with weights of about their usual size, and no bias zero; at once, likewise."""
    random = np.random.default_rng(seed)

    def weight(zeros: np.ndarray) -> jax.Array:
        fan_in = zeros.size // zeros.shape[-1] if zeros.ndim > 1 else 100
        return jax.device_put(
            (random.uniform(-1, 1, zeros.shape) / fan_in**0.5).astype(zeros.dtype)
        )

    graphdef, params = puffer_jax.split(skeleton(build))
    return puffer_jax.merge(graphdef, jax.tree.map(weight, params))


def twin(theirs: torch.nn.Module, build: Callable[[str], Any], dtype: str) -> Any:
    """Our policy, of parameters in `dtype`, holding the weights of theirs.

    Args:
        theirs: a torch policy in float32.
        build: dtype -> our policy.
        dtype: "float32" or "float64".
    """
    policy = skeleton(lambda: build(dtype))
    assert puffer_jax.load_state_dict(policy, theirs.state_dict()) == ([], [])
    assert list(puffer_jax.state_dict(policy)) == list(theirs.state_dict())
    return policy


# --- comparing ---------------------------------------------------------------------------------


def assert_results_close(ours: Result, exact: Result, dtype: str, policy: str = "") -> None:
    """Outputs and gradients within the bars, outputs of exactly this dtype.

    Args:
        ours: computed in `dtype`.
        exact: the reference's in float64, whatever `dtype` is: in which order it adds float32
            numbers depends on the processor, and says nothing about ours.
        dtype: "float32" or "float64".
        policy: its name in the record of worst errors.
    """
    assert {name: y.dtype for name, y in ours.outputs.items() if y.dtype != dtype} == {}
    assert {name: y.dtype for name, y in exact.outputs.items() if y.dtype != np.float64} == {}
    outputs = {name: ours.outputs[name] for name in exact.outputs}
    assert len(outputs) == len(ours.outputs)
    assert_arrays_close(outputs, exact.outputs, "forward", dtype, policy)
    if exact.gradients:
        assert_arrays_close(ours.gradients, exact.gradients, "gradient", dtype, policy)


def error_ratio(ours: Result, theirs: Result, exact: Result) -> float:
    """RMS error of our float32 numbers over that of torch's; each array by its largest value.

    Outputs and gradients count together: a few outputs alone would measure chance.
    """

    def rms(result: Result) -> float:
        arrays = result.outputs | result.gradients
        scaled = [
            (arrays[name].astype(np.float64) - y).ravel() / np.abs(y).max()
            for name, y in (exact.outputs | exact.gradients).items()
        ]
        return float(np.sqrt(np.square(np.concatenate(scaled)).mean()))

    return rms(ours) / rms(theirs)


def check(
    theirs: torch.nn.Module,
    build: Callable[[str], Any],
    run_theirs: Callable[[Any], Outputs],
    run_ours: Callable[[Any], Outputs],
    *,
    dtypes: tuple[str, ...] = ("float64", "float32"),
    gradients: bool = True,
    compiled: bool = False,
    name: str | None = None,
) -> None:
    """Hold ours against the reference: outputs, gradients, and the size of the float32 error.

    Args:
        theirs: a torch policy in float32; its weights are loaded into ours.
        build: dtype of parameters -> our policy.
        run_theirs: torch policy -> named outputs.
        run_ours: our policy -> named outputs.
        dtypes: the precisions of ours; both are held to the reference's float64 result, and the
            float32 error also to that of the reference's own float32 result.
        gradients: whether to compare those of `loss_of` too.
        compiled: run ours under `jax.jit`.
        name: of the policy in the record of worst errors.
    """
    name = name or type(theirs).__name__
    with decisions() as margins:
        exact = run_torch(theirs, "float64", run_theirs, gradients)
    for dtype in dtypes:
        ours = run_jax(twin(theirs, build, dtype), run_ours, gradients, compiled)
        assert_results_close(ours, exact, dtype, name)
        if dtype == "float32":
            if gradients:
                assert min(margins, default=1.0) > MARGIN, "choose other inputs"
            torchs = run_torch(theirs, "float32", run_theirs, gradients)
            ratio = error_ratio(ours, torchs, exact)
            record(name, "ratio", "float32", ratio)
            assert ratio <= FLOAT32_RATIO
