"""Our side of a comparison."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, PyTree

from puffer_jax.nn.torch_layout import torch_modules
from puffer_jax.parity.shared import (
    Call,
    Inputs,
    Outputs,
    Run,
    cast_floats,
    decode_encoded,
    first_step,
    loss_weights,
    named,
    named_outputs,
)
from puffer_jax.weights.state_dicts import named_parameters, state_dict

T = TypeVar("T")


def run_jax(
    policy: nnx.Module, inputs: Inputs, precision: str, differentiated: frozenset[str]
) -> Run:
    """Run the policy, forward and backward, in "float64" or "float32".

    Outputs and gradients are those of the policy as it is, which may compute several layers in one
    pass. The layers' outputs come from a second pass, with recorders.

    Args:
        policy: left as it is.
        inputs: the inputs that torch had.
        precision: the precision of parameters, inputs and computation.
        differentiated: the outputs that make up torch's loss.
    """
    # What the torch twin calls buffers, a BatchNorm's statistics say, is not differentiated.
    graphdef, params, buffers = nnx.split(policy, nnx.Param, ...)
    dtype = jnp.dtype(precision)

    def build(params: PyTree) -> Any:
        module = nnx.merge(graphdef, params, cast_floats(buffers, dtype))
        _set_dtypes(module, dtype)
        return module

    def train(module: Any, observations: PyTree, state: PyTree, done: Array | None) -> Outputs:
        if inputs.recurrent:
            return named_outputs(module.forward(observations, state, done))
        call = module if callable(module) else decode_encoded(module)
        return named_outputs(getattr(module, "forward", call)(observations))

    def evaluate(module: Any, observations: PyTree, state: PyTree) -> Outputs:
        if inputs.recurrent:
            result = module.forward_eval(first_step(observations), state)
        else:
            result = module.forward_eval(observations)
        return named({"eval": named_outputs(result)})

    def loss(
        params: PyTree, observations: PyTree, state: PyTree, done: Array | None
    ) -> tuple[Array, Outputs]:
        outputs = train(build(params), observations, state, done)
        if inputs.evaluate:
            outputs |= evaluate(build(params), observations, state)
        weights = loss_weights(outputs, inputs.seed)
        terms = (
            jnp.sum(weight.astype(dtype) * outputs[name])
            for name, weight in weights.items()
            if name in differentiated
        )
        return sum(terms, jnp.zeros((), dtype)), outputs

    @jax.jit
    def run_recorded(params: PyTree, *arrays: PyTree) -> dict[str, list[Call]]:
        module = build(params)
        layers = _record_jax(module)
        train(module, *arrays)
        return layers

    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        cast = cast_floats((params, inputs.observations, inputs.state), dtype)
        run = jax.jit(jax.grad(loss, has_aux=True))
        gradients, outputs = jax.device_get(run(*cast, inputs.done))
        layers = jax.device_get(run_recorded(*cast, inputs.done))
    tensors = named_parameters(policy)[0]
    named_gradients = {
        name: gradient
        for name, gradient in state_dict(nnx.merge(graphdef, gradients, buffers)).items()
        if name not in tensors or tensors[name].variables  # a constant's would be its value
    }
    return Run(outputs, named_gradients, layers, differentiated & outputs.keys())


def _set_dtypes(module: nnx.Module, dtype: np.dtype) -> None:
    for _, submodule in nnx.iter_modules(module):
        for name in ("dtype", "param_dtype"):
            current = vars(submodule).get(name)
            if isinstance(current, str | type | np.dtype) and jnp.issubdtype(current, jnp.floating):
                vars(submodule)[name] = dtype


def _record_jax(module: nnx.Module) -> dict[str, list[Call]]:
    """Have every layer, and every plain function in a Sequential, append its calls."""
    calls: dict[str, list[Call]] = {}
    outside = get_opaque_trace_state(convention="nnx")

    def recorder(name: str) -> Callable[..., None]:
        def record(output: object, first: object = None, *_: object) -> None:
            array = output[0] if isinstance(output, tuple) else output
            # What is computed inside a scan or vmap has no single value out here.
            if isinstance(array, jax.Array) and get_opaque_trace_state("nnx") == outside:
                given = first if isinstance(first, jax.Array) else None
                calls.setdefault(name, []).append(Call(array, given))

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


def _recording(function: Callable[..., T], record: Callable[..., None]) -> Callable[..., T]:
    def call(*args: object, **kwargs: object) -> T:
        output = function(*args, **kwargs)
        record(output, *args)
        return output

    return call


@functools.cache
def _recording_class(cls: type) -> type:
    """A subclass whose instances hand every call to their `_record`."""

    def recording(method: Callable[..., T]) -> Callable[..., T]:
        def call(self: Any, *args: object, **kwargs: object) -> T:
            output = method(self, *args, **kwargs)
            self._record(output, *args)
            return output

        return call

    methods = {}
    if any("__call__" in vars(base) for base in cls.__mro__):
        methods["__call__"] = recording(cls.__call__)
    if hasattr(cls, "step") and hasattr(cls, "scan"):  # a recurrent core
        methods |= {"step": recording(cls.step), "scan": recording(cls.scan)}
    return type(cls.__name__, (cls,), methods)
