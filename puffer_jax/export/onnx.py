"""ONNX, as jax2onnx writes it and onnxruntime runs it."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from puffer_jax.base.packages import require
from puffer_jax.export.step import Step, named
from puffer_jax.kernels import use
from puffer_jax.kernels.choice import replace

INSTALL = "'puffer_jax[onnx]'"

_ROWS = 3

# Of the largest magnitude. onnxruntime sums in another order, and its tanh and logistic are
# approximations: float32's 1e-6 of a layer add up to 1e-5 in a deep network. Narrower floats lose
# what they lose in every framework.
_CLOSE, _CLOSE_NARROW = 1e-4, 5e-2


def packages() -> tuple[Any, Any, Any]:
    """The modules jax2onnx, onnx and onnxruntime.

    Raises:
        ImportError: one is missing.
    """
    names = ("jax2onnx", "onnx", "onnxruntime")
    jax2onnx, onnx, onnxruntime = (require(name, "ONNX", INSTALL) for name in names)
    return jax2onnx, onnx, onnxruntime


def checked(step: Step) -> bytes:
    """The step as an ONNX model, which gave what the policy gives.

    Raises:
        ValueError: jax2onnx cannot express it, onnxruntime cannot run it, or its results differ.
    """
    name, content = step.name, _converted(step)
    rows = step.batch or _ROWS
    arguments = step.draw(rows, np.random.default_rng(0))
    with use("xla"):
        expected = _outputs(step, jax.jit(step.function)(*arguments))
    try:
        found = _run(content, _inputs(arguments))
    except Exception as error:  # onnxruntime's own, which have no common class
        raise ValueError(
            f"{name} cannot be exported: onnxruntime cannot run it: {error}"
        ) from error
    for key, array in expected.items():
        apart = _apart(found[key], np.asarray(array))
        narrow = jnp.finfo(array.dtype).bits < 32 if _is_floating(array) else False
        if apart > (_CLOSE_NARROW if narrow else _CLOSE):
            raise ValueError(
                f"{name} cannot be exported: in onnxruntime, {key} differs by {apart:.1e} of its "
                "largest magnitude"
            )
    return content


def _converted(step: Step) -> bytes:
    jax2onnx, onnx, _ = packages()
    arguments = (step.observations, step.state)
    leaves, tree = jax.tree.flatten(arguments)

    def flat(*leaves: Array) -> list[Array]:
        return jax.tree.leaves(step.function(*jax.tree.unflatten(tree, leaves)))

    # Traced before jax2onnx sees it, which puts operators of its own in the place of Flax's layers
    # and jax.numpy's functions.
    with ExitStack() as stack:
        stack.enter_context(use("xla"))
        stack.enter_context(replace("max_pool", "xla", _max_pool))
        program = jax.make_jaxpr(flat)(*leaves)
    names = [*_outputs(step, jax.eval_shape(step.function, *arguments))]
    results = dict(zip(program.jaxpr.outvars, names, strict=True))  # of equal ones, the last name
    jaxpr = program.jaxpr.replace(outvars=[*results], debug_info=None)
    wide = any(x.dtype == np.float64 for x in [*leaves, *program.out_avals])
    logger = logging.getLogger("onnx_ir.serde")  # it warns of shapes that it leaves out
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model = jax2onnx.to_onnx(
            lambda *leaves: jax.core.eval_jaxpr(jaxpr, program.consts, *leaves),
            leaves,
            input_names=[*_inputs(arguments)],
            output_names=[*results.values()],
            enable_double_precision=wide,
        )
    except Exception as error:  # of any class, from the operation that it does not know
        raise ValueError(f"{step.name} cannot be exported: jax2onnx: {error}") from error
    finally:
        logger.setLevel(level)
    _name_again(onnx, model.graph, program.jaxpr.outvars, names, results)
    return model.SerializeToString()


def _name_again(
    onnx: Any, graph: Any, variables: list[Any], names: list[str], results: Mapping[Any, str]
) -> None:
    """Add the outputs that are others' values, in the order of all."""
    outputs = {output.name: output for output in graph.output}
    for variable, name in zip(variables, names, strict=True):
        if name not in outputs:
            same = outputs[results[variable]]
            outputs[name] = onnx.ValueInfoProto()
            outputs[name].CopyFrom(same)
            outputs[name].name = name
            graph.node.append(onnx.helper.make_node("Identity", [same.name], [name]))
    del graph.output[:]
    graph.output.extend(outputs[name] for name in names)


def _max_pool(x: Array) -> Array:
    """`puffer_jax.kernels.pooling`'s, without the window over four axes that ONNX has not.

    At the edges the nearest row or column stands in for the padding, which changes no maximum.
    """
    x = jnp.concatenate([x[:, :1], x, x[:, -1:]], axis=1)
    size = x.shape[1] - 2
    x = jnp.maximum(jnp.maximum(x[:, :size:2], x[:, 1 : size + 1 : 2]), x[:, 2::2])
    x = jnp.concatenate([x[:, :, :1], x, x[:, :, -1:]], axis=2)
    size = x.shape[2] - 2
    return jnp.maximum(jnp.maximum(x[:, :, :size:2], x[:, :, 1 : size + 1 : 2]), x[:, :, 2::2])


def _inputs(arguments: tuple[PyTree, PyTree]) -> dict[str, Any]:
    observations, state = arguments
    return named(observations, "observations") | named(state, "state")


def _outputs(step: Step, results: tuple[PyTree, PyTree, PyTree]) -> dict[str, Any]:
    first, values, state = results
    return named(first, step.output) | {"values": values} | named(state, "new_state")


def _run(content: bytes, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    onnxruntime = packages()[2]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of constants that it removes
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(content, options, providers=providers)
    feed = {given.name: np.asarray(inputs[given.name]) for given in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def _is_floating(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest magnitude; infinite for another shape."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return np.inf
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True):
        return np.inf
    apart = np.abs(found - expected)[finite].max(initial=0)
    return float(apart / max(np.abs(expected[finite]).max(initial=0), 1e-30))
