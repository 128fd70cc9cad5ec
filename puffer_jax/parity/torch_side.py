"""The torch side of a comparison."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from puffer_jax.base.packages import TORCH, require
from puffer_jax.parity.shared import (
    Arrays,
    Call,
    Inputs,
    Outputs,
    Run,
    TorchModule,
    cast_floats,
    decode_encoded,
    first_step,
    loss_weights,
    named,
    named_outputs,
)

T = TypeVar("T")


def import_torch() -> ModuleType:
    """The package torch.

    Raises:
        ImportError: it is missing; the message has the line that installs it.
    """
    return require("torch", "comparing with torch", TORCH)


def run_torch(policy: TorchModule, inputs: Inputs, precision: str) -> Run:
    """Run a copy of the policy, forward and backward, in "float64" or "float32"."""
    torch = import_torch()
    dtype = getattr(torch, precision)
    policy = copy.deepcopy(policy).to(dtype)
    parameters = {name: p.requires_grad_(True) for name, p in policy.named_parameters()}
    device = next((p.device for p in parameters.values()), "cpu")

    def tensors(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: torch.from_numpy(np.array(x)).to(device), tree)

    def arrays(tensors: Outputs) -> Arrays:
        return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}

    observations = inputs.observations
    # An emulated environment packs bytes, even where they are called float32.
    if not any(getattr(module, "is_dict_obs", False) for module in policy.modules()):
        observations = cast_floats(observations, precision)
    observations, done = tensors(observations), tensors(inputs.done)
    state = tensors(cast_floats(inputs.state, precision))
    state = state or dict.fromkeys(inputs.state_names)
    with _torch_computing_in(dtype):
        calls = _record_torch(policy)
        if not inputs.recurrent:
            own_forward = type(policy).forward is not torch.nn.Module.forward
            outputs = named_outputs(
                (policy if own_forward else decode_encoded(policy))(observations)
            )
        elif done is None:
            outputs = _torch_segment(policy, observations, state)
        else:
            outputs = _torch_steps(policy, observations, state, done)
            calls = {name: _fold_steps(each, done.shape[1]) for name, each in calls.items()}
        layers = {name: list(each) for name, each in calls.items()}
        if inputs.evaluate:
            if inputs.recurrent:
                result = (*policy.forward_eval(first_step(observations), state), state)
            else:
                result = policy.forward_eval(observations)
            outputs |= named({"eval": named_outputs(result)})
        weights = tensors(cast_floats(loss_weights(outputs, inputs.seed), precision))
        # Some decorate `forward_eval` with `torch.no_grad`.
        weights = {name: w for name, w in weights.items() if outputs[name].requires_grad}
        loss = sum((weight * outputs[name]).sum() for name, weight in weights.items())
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
    named_gradients = arrays(dict(zip(parameters, gradients, strict=True)))
    return Run(arrays(outputs), named_gradients, layers, frozenset(weights))


def _torch_segment(policy: TorchModule, observations: PyTree, state: Outputs) -> Outputs:
    names = tuple(state)
    state = {name: None if x is None else x[None] for name, x in state.items()}
    logits, values = policy(observations, state)
    state |= {name: state[name][0] for name in names}
    return named_outputs((logits, values, state))


def _torch_steps(policy: TorchModule, observations: PyTree, state: Outputs, done: Any) -> Outputs:
    steps = []
    names, state = tuple(state), dict(state)
    for t in range(done.shape[1]):
        continuing = ~done[:, t, None]
        for name in names:
            state[name] = None if state[name] is None else state[name] * continuing
        logits, values = policy.forward_eval(jax.tree.map(lambda x: x[:, t], observations), state)  # noqa: B023
        steps.append(named({"logits": logits, "values": values, "state.hidden": state["hidden"]}))
    stack = import_torch().stack
    outputs = {name: stack([step[name] for step in steps], 1) for name in steps[0]}
    for name, output in outputs.items():
        if name.startswith("logits"):
            outputs[name] = output.flatten(0, 1)
    outputs["values"] = outputs["values"].flatten(1)
    return outputs | {f"state.{name}": state[name] for name in names}


def _fold_steps(calls: list[Call], steps: int) -> list[Call]:
    """The calls of all steps as the calls that one whole segment would have made."""
    each = len(calls) // steps

    def fold(arrays: list[np.ndarray]) -> np.ndarray:
        array = np.stack(arrays, axis=1)
        return array.reshape(-1, *array.shape[2:])

    def whole(calls: list[Call]) -> Call:
        inputs = [call.input for call in calls if call.input is not None]
        output = fold([call.output for call in calls])
        return Call(output, fold(inputs) if len(inputs) == len(calls) else None)

    return [whole(calls[i::each]) for i in range(each)]


@contextmanager
def _torch_computing_in(dtype: Any) -> Iterator[None]:
    """Make torch compute in `dtype` at full precision, whatever the code inside casts to."""
    torch = import_torch()

    class EverythingDouble(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., object],
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> object:
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


def _record_torch(policy: TorchModule) -> dict[str, list[Call]]:
    """Have every layer append its calls; the names come in the order the layers finish."""
    torch = import_torch()
    calls: dict[str, list[Call]] = {}

    def recording(name: str, module: TorchModule, forward: Callable[..., T]) -> Callable[..., T]:
        time_first = isinstance(module, torch.nn.RNNBase) and not module.batch_first

        def kept(tensor: Any) -> np.ndarray:
            if time_first and tensor.ndim == 3:
                tensor = tensor.transpose(0, 1)
            # A copy, since an in-place activation may follow.
            return np.array(tensor.detach().cpu().numpy())

        def call(*args: object, **kwargs: object) -> T:
            given = kept(args[0]) if args and isinstance(args[0], torch.Tensor) else None
            output = forward(*args, **kwargs)
            array: Any = output[0] if isinstance(output, tuple) else output
            if isinstance(array, torch.Tensor):
                calls.setdefault(name, []).append(Call(kept(array), given))
            return output

        return call

    for name, module in policy.named_modules():
        if name:
            # Not a forward hook: LSTMWrapper calls `self.lstm.forward`, which bypasses hooks.
            module.forward = recording(name, module, module.forward)
    return calls
