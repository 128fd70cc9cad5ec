"""Prove that a torch policy and its JAX port compute one function, or show where they part.

    report = compare(torch_policy, jax_policy, observations)
    print(report)
    report.assert_close()

Both run in float64 and in float32. In float64 only another formula makes a visible difference;
in float32 torch's own rounding error, known from its float64 result, is the yardstick for ours.
"""

import copy
import functools
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import get_opaque_trace_state

from puffer_jax import policies
from puffer_jax.base import spaces
from puffer_jax.nn.images import Deferred
from puffer_jax.nn.lstm import LSTM
from puffer_jax.nn.params import merge, split
from puffer_jax.nn.torch_layout import torch_aliases, torch_modules
from puffer_jax.report import PRECISIONS, Errors, Kind, Report, Row
from puffer_jax.weights.state_dicts import state_dict

Arrays = dict[str, np.ndarray]

_INSTALL_TORCH = "pip install 'torch>=2.10'"

_INSTALL_REFERENCE = (
    "pip install torch==2.13.0 psutil && pip install --no-deps pufferlib-core==3.0.23"
)


class _Run(NamedTuple):
    outputs: Arrays
    gradients: Arrays
    layers: dict[str, list[np.ndarray]]


class _Inputs(NamedTuple):
    observations: Any
    state: Mapping[str, np.ndarray] | None
    done: np.ndarray | None
    recurrent: bool
    evaluate: bool
    seed: int


def compare(
    torch_policy: Any,
    jax_policy: nnx.Module,
    observations: Any,
    state: Mapping[str, Any] | None = None,
    done: Any = None,
    *,
    seed: int = 0,
) -> Report:
    """Run both policies, forward and backward, and measure how far they are apart.

    Compared are the training call, `forward_eval` where both have it, the gradients of a
    random linear loss over logits and values w.r.t. every parameter, and the output of every
    layer, in float64 and float32. The policies themselves are left as they are.

    Works on any `torch.nn.Module` and any `nnx.Module` whose parameters carry the same names
    (see `puffer_jax.modules`), with `forward` or with `encode_observations` and
    `decode_actions`. Casts to float32 inside the torch policy become casts to float64 for the
    float64 run; of ours the attributes `dtype` and `param_dtype` are set.

    Args:
        torch_policy: the original.
        jax_policy: the port. With `initial_state` it is recurrent, and `torch_policy` is
            called as PufferLib's LSTMWrapper is, with a state dict it writes into.
        observations: an array, or a dict or tuple of arrays, (batch, *obs). For recurrent
            policies (batch, time, *obs), or (batch, *obs) if `torch_policy.obs_shape` says so;
            `forward_eval` gets the first step.
        state: {"lstm_h", "lstm_c"} (batch, hidden) of a recurrent policy; None is zero.
        done: (batch, time), where an episode begins. PufferLib cannot reset within a segment,
            so the torch side then runs step by step.
        seed: of the loss.

    Raises:
        ImportError: torch is missing.
        TypeError: a layer of `jax_policy` has no torch counterpart.
        Exception: whatever a policy raises, with a note saying which one and in what precision.
    """
    _import_torch()
    recurrent = hasattr(jax_policy, "initial_state")
    evaluate = hasattr(jax_policy, "forward_eval") and hasattr(torch_policy, "forward_eval")
    observations = jax.tree.map(np.asarray, observations)
    obs_shape = getattr(torch_policy, "obs_shape", None)
    if recurrent and obs_shape is not None and np.ndim(observations) == len(obs_shape) + 1:
        observations = observations[:, None]
    if state is not None:
        state = {name: np.asarray(state[name]) for name in ("lstm_h", "lstm_c")}
    done = None if done is None else np.asarray(done, bool)
    inputs = _Inputs(observations, state, done, recurrent, evaluate, seed)

    weights_differ = tuple(_differing_weights(torch_policy, jax_policy))
    theirs, ours = [], []
    for precision in PRECISIONS:
        with _saying(f"raised by the torch policy in {precision}"):
            theirs.append(_run_torch(torch_policy, inputs, precision))
        with _saying(f"raised by the JAX policy in {precision}"):
            ours.append(_run_jax(jax_policy, inputs, precision))

    # LSTMWrapper's cell does step by step what its lstm does for whole segments.
    aliases = torch_aliases(jax_policy).items()
    tied = {alias.rpartition(".")[0]: name.rpartition(".")[0] for alias, name in aliases}
    theirs = [
        run._replace(layers={tied.get(name, name): each for name, each in run.layers.items()})
        for run in theirs
    ]
    rows = (
        *_rows("output", [run.outputs for run in theirs], [run.outputs for run in ours]),
        *_rows("gradient", [run.gradients for run in theirs], [run.gradients for run in ours]),
        *_rows("layer", [_calls(run) for run in theirs], [_calls(run) for run in ours]),
    )
    here, there = _calls(ours[0]).keys(), _calls(theirs[0]).keys()
    not_compared = [f"{name} (torch only)" for name in there if name not in here]
    not_compared += [f"{name} (JAX only)" for name in here if name not in there]
    return Report(rows, weights_differ, tuple(not_compared))


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"comparing with torch needs torch: {_INSTALL_TORCH}") from error
    return torch


@contextmanager
def _saying(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def _differing_weights(torch_policy: Any, jax_policy: nnx.Module) -> Iterator[str]:
    ours = state_dict(jax_policy)
    for name, parameter in torch_policy.named_parameters():
        tensor = parameter.detach().cpu().double().numpy()
        if name not in ours:
            yield f"{name} (missing in JAX)"
        elif tensor.shape != ours[name].shape:
            yield f"{name} ({tensor.shape} in torch, {ours[name].shape} in JAX)"
        elif not np.array_equal(tensor, ours[name].astype(np.float64), equal_nan=True):
            yield name
    # Torch lists tied parameters once, ours may be tied where torch has no second name.
    known = dict(torch_policy.named_parameters(remove_duplicate=False)) | torch_aliases(jax_policy)
    yield from (f"{name} (missing in torch)" for name in ours if name not in known)


def _calls(run: _Run) -> Arrays:
    return {
        f"{name} (call {i + 1})" if i else name: array
        for name, calls in run.layers.items()
        for i, array in enumerate(calls)
    }


def _rows(kind: Kind, theirs: list[Arrays], ours: list[Arrays]) -> Iterator[Row]:
    for name in theirs[0] | ours[0]:
        there = [arrays[name] for arrays in theirs if name in arrays]
        here = [arrays[name] for arrays in ours if name in arrays]
        if there and here:
            views = _layer_views(here, there[0].shape) if kind == "layer" else [here]
            rows = [_row(name, kind, there, view) for view in views]
            yield min(rows, key=lambda row: row.float64.relative)
        elif kind == "output":
            problem = f"missing in {'JAX' if there else 'torch'}"
            yield _failed(name, kind, (there or here)[0].shape, problem)


def _layer_views(here: list[np.ndarray], shape: tuple[int, ...]) -> Iterator[list[np.ndarray]]:
    """As it is, with channels first as torch has them, and with time folded into the batch."""
    yield here
    if here[0].ndim >= 3:
        yield [np.moveaxis(array, -1, 1) for array in here]
    if here[0].size == math.prod(shape):
        yield [array.reshape(shape) for array in here]


def _row(name: str, kind: Kind, theirs: list[np.ndarray], ours: list[np.ndarray]) -> Row:
    shape = theirs[0].shape
    if ours[0].shape != shape:
        return _failed(name, kind, shape, f"shape {ours[0].shape}, torch has {shape}")
    exact = theirs[0]
    return Row(
        name,
        kind,
        shape,
        _errors(ours[0], exact, np.dtype(np.float64)),
        _errors(ours[1], theirs[1], np.dtype(np.float32)),
        _mean_square(theirs[1], exact),
        _mean_square(ours[1], exact),
    )


def _failed(name: str, kind: Kind, shape: tuple[int, ...], problem: str) -> Row:
    infinite = Errors(math.inf, math.inf, math.inf)
    return Row(name, kind, shape, infinite, infinite, 0.0, math.inf, problem)


def _difference(array: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, float]:
    """Elementwise, infinite where only one side is a number; and the reference's magnitude."""
    array, reference = array.astype(np.float64), reference.astype(np.float64)
    equal = (array == reference) | (np.isnan(array) & np.isnan(reference))
    with np.errstate(invalid="ignore"):
        difference = np.where(equal, 0.0, np.abs(array - reference))
    magnitude = np.max(np.abs(reference), where=np.isfinite(reference), initial=0.0)
    return np.where(np.isnan(difference), np.inf, difference), float(magnitude) or 1.0


def _errors(array: np.ndarray, reference: np.ndarray, dtype: np.dtype) -> Errors:
    difference, magnitude = _difference(array, reference)
    finite = np.abs(np.where(np.isfinite(reference), reference, 0)).astype(dtype)
    negligible = dtype.type(magnitude * np.finfo(dtype).eps)
    spacing = np.spacing(np.maximum(finite, max(negligible, np.finfo(dtype).tiny)))
    ulp = difference / spacing.astype(np.float64)
    largest = float(difference.max(initial=0.0))
    return Errors(largest, largest / magnitude, float(ulp.max(initial=0.0)))


def _mean_square(array: np.ndarray, reference: np.ndarray) -> float:
    difference, magnitude = _difference(array, reference)
    return float(np.sqrt(np.mean(np.square(difference / magnitude)))) if difference.size else 0.0


def _named(output: Any, prefix: str = "") -> dict[str, Any]:
    """A policy's output as named arrays; of a distribution, its loc and scale."""
    if output is None:
        return {}
    if hasattr(output, "loc") and hasattr(output, "scale"):
        items = {f"{prefix}.loc": output.loc, f"{prefix}.scale": output.scale}
    elif isinstance(output, Mapping):
        items = {f"{prefix}.{key}" if prefix else key: value for key, value in output.items()}
    elif isinstance(output, tuple | list):
        items = {f"{prefix}[{i}]": value for i, value in enumerate(output)}
    else:
        return {prefix: output}
    return {k: v for name, value in items.items() for k, v in _named(value, name).items()}


def _outputs(result: Any) -> dict[str, Any]:
    if isinstance(result, tuple) and len(result) in (2, 3):
        return _named(dict(zip(("logits", "values", "state"), result, strict=False)))
    return _named(result, "output")


def _decode_encoded(policy: Any) -> Callable[[Any], Any]:
    return lambda observations: policy.decode_actions(policy.encode_observations(observations))


def _first_step(observations: Any) -> Any:
    return jax.tree.map(lambda x: x[:, 0], observations)


def _loss_weights(outputs: dict[str, Any], seed: int) -> Arrays:
    # A stream for each name: an output missing on one side must not shift the others. And
    # float32 numbers, so that both precisions differentiate the same loss.
    return {
        name: np.random.default_rng([seed, zlib.crc32(name.encode())])
        .standard_normal(tuple(output.shape))
        .astype(np.float32)
        for name, output in outputs.items()
        if not name.startswith("state.")
    }


def _cast_floats(tree: Any, dtype: Any) -> Any:
    def cast(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _run_torch(policy: Any, inputs: _Inputs, precision: str) -> _Run:
    torch = _import_torch()
    dtype = getattr(torch, precision)
    policy = copy.deepcopy(policy).to(dtype)
    parameters = {name: p.requires_grad_(True) for name, p in policy.named_parameters()}
    device = next((p.device for p in parameters.values()), "cpu")

    def tensors(tree: Any) -> Any:
        return jax.tree.map(lambda x: torch.from_numpy(np.array(x)).to(device), tree)

    def arrays(tensors: Mapping[str, Any]) -> Arrays:
        return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}

    observations = inputs.observations
    # What an emulated environment packs are bytes, even where they are called float32.
    if not any(getattr(module, "is_dict_obs", False) for module in policy.modules()):
        observations = _cast_floats(observations, precision)
    observations, done = tensors(observations), tensors(inputs.done)
    state = tensors(_cast_floats(inputs.state, precision))
    state = state or {"lstm_h": None, "lstm_c": None}
    with _torch_computing_in(dtype):
        calls = _record_torch(policy)
        if not inputs.recurrent:
            own_forward = type(policy).forward is not torch.nn.Module.forward
            outputs = _outputs((policy if own_forward else _decode_encoded(policy))(observations))
        elif done is None:
            outputs = _torch_segment(policy, observations, state)
        else:
            outputs = _torch_steps(policy, observations, state, done)
            calls = {name: _fold_steps(each, done.shape[1]) for name, each in calls.items()}
        weights = tensors(_cast_floats(_loss_weights(outputs, inputs.seed), precision))
        loss = sum((weight * outputs[name]).sum() for name, weight in weights.items())
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        layers = {name: list(each) for name, each in calls.items()}
        if inputs.evaluate:
            if inputs.recurrent:
                result = (*policy.forward_eval(_first_step(observations), state), state)
            else:
                result = policy.forward_eval(observations)
            outputs |= _named({"eval": _outputs(result)})
    return _Run(arrays(outputs), arrays(dict(zip(parameters, gradients, strict=True))), layers)


def _torch_segment(policy: Any, observations: Any, state: dict[str, Any]) -> dict[str, Any]:
    state = {name: None if x is None else x[None] for name, x in state.items()}
    logits, values = policy(observations, state)
    state |= {name: state[name][0] for name in ("lstm_h", "lstm_c")}
    return _outputs((logits, values, state))


def _torch_steps(
    policy: Any, observations: Any, state: dict[str, Any], done: Any
) -> dict[str, Any]:
    steps = []
    state = dict(state)
    for t in range(done.shape[1]):
        going_on = ~done[:, t, None]
        for name in ("lstm_h", "lstm_c"):
            state[name] = None if state[name] is None else state[name] * going_on
        logits, values = policy.forward_eval(jax.tree.map(lambda x: x[:, t], observations), state)  # noqa: B023
        steps.append(_named({"logits": logits, "values": values, "state.hidden": state["hidden"]}))
    stack = _import_torch().stack
    outputs = {name: stack([step[name] for step in steps], 1) for name in steps[0]}
    for name, output in outputs.items():
        if name.startswith("logits"):
            outputs[name] = output.flatten(0, 1)
    outputs["values"] = outputs["values"].flatten(1)
    return outputs | {f"state.{name}": state[name] for name in ("lstm_h", "lstm_c")}


def _fold_steps(calls: list[np.ndarray], steps: int) -> list[np.ndarray]:
    """The calls of all steps as the calls that a whole segment would have made."""
    each = len(calls) // steps
    stacked = [np.stack(calls[i::each], axis=1) for i in range(each)]
    return [array.reshape(-1, *array.shape[2:]) for array in stacked]


@contextmanager
def _torch_computing_in(dtype: Any) -> Iterator[None]:
    """Torch computes in `dtype` at full precision, whatever the code inside casts to."""
    torch = _import_torch()

    class EverythingDouble(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            # `view(torch.float32)` reinterprets bytes, which stay what they are.
            elif func is not torch.Tensor.view:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in kwargs.items()}
            return func(*args, **kwargs)

    default = torch.get_default_dtype()
    matmul = torch.get_float32_matmul_precision()
    convolution = torch.backends.cudnn.allow_tf32
    try:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        mode = EverythingDouble() if dtype == torch.float64 else nullcontext()
        with warnings.catch_warnings(), torch.enable_grad(), mode:
            # torch deprecates _check_is_size, which PufferLib's nativize_tensor calls.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_default_dtype(default)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def _record_torch(policy: Any) -> dict[str, list[np.ndarray]]:
    """Have every layer append its outputs; the names come in the order the layers finish."""
    torch = _import_torch()
    calls: dict[str, list[np.ndarray]] = {}

    def recording(name: str, module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        time_first = isinstance(module, torch.nn.RNNBase) and not module.batch_first

        def call(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            array = output[0] if isinstance(output, tuple) else output
            if isinstance(array, torch.Tensor):
                if time_first and array.ndim == 3:
                    array = array.transpose(0, 1)
                # A copy, since an in-place activation may follow.
                calls.setdefault(name, []).append(np.array(array.detach().cpu().numpy()))
            return output

        return call

    for name, module in policy.named_modules():
        if name:
            # No forward hook: LSTMWrapper calls `self.lstm.forward`, which passes hooks by.
            module.forward = recording(name, module, module.forward)
    return calls


def _run_jax(policy: nnx.Module, inputs: _Inputs, precision: str) -> _Run:
    graphdef, params = split(policy)
    dtype = jnp.dtype(precision)

    def build(params: Any) -> Any:
        module = merge(graphdef, params)
        _set_dtypes(module, dtype)
        return module

    def loss(params: Any, observations: Any, state: Any, done: Any) -> tuple[Any, Any]:
        module = build(params)
        layers = _record_jax(module)
        if inputs.recurrent:
            outputs = _outputs(module.forward(observations, state, done))
        else:
            call = module if callable(module) else _decode_encoded(module)
            outputs = _outputs(getattr(module, "forward", call)(observations))
        weights = _loss_weights(outputs, inputs.seed)
        total = sum(jnp.sum(w.astype(dtype) * outputs[name]) for name, w in weights.items())
        return total, (outputs, layers)

    @jax.jit
    def run(params: Any, observations: Any, state: Any, done: Any) -> tuple[Any, Any, Any]:
        gradients, (outputs, layers) = jax.grad(loss, has_aux=True)(
            params, observations, state, done
        )
        if inputs.evaluate:
            if inputs.recurrent:
                result = build(params).forward_eval(_first_step(observations), state)
            else:
                result = build(params).forward_eval(observations)
            outputs |= _named({"eval": _outputs(result)})
        return gradients, outputs, layers

    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        cast = _cast_floats((params, inputs.observations, inputs.state), dtype)
        gradients, outputs, layers = jax.device_get(run(*cast, inputs.done))
    return _Run(outputs, state_dict(merge(graphdef, gradients)), layers)


def _set_dtypes(module: Any, dtype: Any) -> None:
    for _, submodule in nnx.iter_modules(module):
        for name in ("dtype", "param_dtype"):
            current = vars(submodule).get(name)
            if isinstance(current, str | type | np.dtype) and jnp.issubdtype(current, jnp.floating):
                vars(submodule)[name] = dtype


def _record_jax(module: Any) -> dict[str, list[Any]]:
    """Have every layer append its outputs, and every plain function in a Sequential."""
    calls: dict[str, list[Any]] = {}
    outside = get_opaque_trace_state(convention="nnx")

    def recorder(name: str) -> Callable[[Any], None]:
        def record(output: Any) -> None:
            array = output[0] if isinstance(output, tuple) else output
            # What is computed inside a scan or vmap has no single value out here.
            if isinstance(array, jax.Array) and get_opaque_trace_state("nnx") == outside:
                calls.setdefault(name, []).append(array)

        return record

    for prefix, layer in torch_modules(module):
        if isinstance(layer, nnx.Sequential):
            for i, function in enumerate(layer.layers):
                if not isinstance(function, nnx.Module):
                    layer.layers[i] = _recording(function, recorder(f"{prefix}{i}"))
        if prefix and isinstance(layer, nnx.Module):
            object.__setattr__(layer, "__class__", _recording_class(type(layer)))
            vars(layer)["_record"] = recorder(prefix.removesuffix("."))
    return calls


def _recording(function: Callable[..., Any], record: Callable[[Any], None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        record(function.function(output) if isinstance(function, Deferred) else output)
        return output

    return call


@functools.cache
def _recording_class(cls: type) -> type:
    """A subclass whose instances hand every output to their `_record`."""

    def recording(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = method(self, *args, **kwargs)
            self._record(output)
            return output

        return call

    methods = {}
    if any("__call__" in vars(base) for base in cls.__mro__):
        methods["__call__"] = recording(cls.__call__)
    if issubclass(cls, LSTM):
        methods |= {"step": recording(cls.step), "scan": recording(cls.scan)}
    return type(cls.__name__, (cls,), methods)


def reference_policy(jax_policy: nnx.Module) -> Any:
    """PufferLib's own policy of the same class and sizes, with weights of its own.

    Raises:
        ImportError: pufferlib or torch is missing.
        ValueError: a custom class, or a space that PufferLib's policy cannot take.
    """
    try:
        import pufferlib.models as reference
    except ImportError as error:
        raise ImportError(f"PufferLib's policies need: {_INSTALL_REFERENCE} ({error})") from error

    class ProcgenResnet(reference.ProcgenResnet):
        # PufferLib's lacks what its LSTMWrapper asks of a policy.
        is_continuous = False

        def encode_observations(self, x: Any, state: Any = None) -> Any:
            return super().encode_observations(x)

    def twin(policy: Any, env: Any) -> Any:
        match policy:
            case policies.LSTMWrapper():
                inner = twin(policy.policy, env)
                return reference.LSTMWrapper(env, inner, policy.input_size, policy.hidden_size)
            case policies.Default():
                return reference.Default(env, policy.hidden_size)
            case policies.Convolutional():
                sizes = ("framestack", "flat_size", "hidden_size", "output_size")
                options = (*sizes, "channels_last", "downsample")
                return reference.Convolutional(env, **{n: getattr(policy, n) for n in options})
            case policies.ProcgenResnet():
                return ProcgenResnet(env, policy.cnn_width, policy.mlp_width)
        raise ValueError(f"PufferLib has no policy of the class {type(policy).__name__}")

    return twin(jax_policy, reference_env(jax_policy))


def reference_env(jax_policy: Any) -> SimpleNamespace:
    """What PufferLib's policies read of an environment, with the spaces of `jax_policy`.

    Boxes without bounds stand for what the policy knows only the shape of, so that sampling
    from the spaces gives standard normal numbers, and images of bytes.

    Raises:
        ImportError: gymnasium is missing.
        ValueError: a space that PufferLib's policies cannot take.
    """
    try:
        from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
    except ImportError as error:
        raise ImportError("PufferLib's policies need gymnasium: pip install gymnasium") from error

    def box(dtype: np.dtype, shape: tuple[int, ...]) -> Any:
        if dtype.kind == "f":
            return Box(-np.inf, np.inf, shape, dtype.type)
        return Box(0, 1 if dtype.kind == "b" else 100, shape, dtype.type)

    if not hasattr(jax_policy, "env_spec"):
        raise ValueError(f"PufferLib has no policy of the class {type(jax_policy).__name__}")
    match jax_policy.env_spec.single_action_space:
        case spaces.Discrete(n):
            action = Discrete(n)
        case spaces.MultiDiscrete(nvec):
            action = MultiDiscrete(list(nvec))
        case other:
            action = Box(-1, 1, other.shape)
    layout = jax_policy.env_spec.single_observation_space
    extra = {}
    inner = getattr(jax_policy, "policy", jax_policy)
    if layout.sample_dtype is not None:
        fields = layout.structured
        if any(fields[name].names for name in fields.names):
            raise ValueError("PufferLib's Default takes no nested Dict observations")
        leaves = {name: box(fields[name].base, fields[name].shape) for name in fields.names}
        emulated = {
            "observation_dtype": layout.sample_dtype,
            "emulated_observation_dtype": fields,
        }
        extra = {"env": SimpleNamespace(observation_space=Dict(leaves)), "emulated": emulated}
        observation = box(layout.sample_dtype, layout.shape)
    elif layout.structured is not None:
        observation = box(np.dtype(np.float32), (layout.features,))
    elif not layout.shape:
        raise ValueError(
            f"PufferLib's policies take arrays; the shape of the observations is {layout.shape}"
        )
    elif isinstance(inner, policies.Default):
        observation = box(np.dtype(np.float32), layout.shape)
    else:
        observation = Box(0, 255, layout.shape, np.uint8)
    return SimpleNamespace(
        single_observation_space=observation,
        observation_space=observation,
        single_action_space=action,
        action_space=action,
        **extra,
    )
