"""A comparison: both sides run, and a row for each array that they have in common."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree
from numpy.typing import ArrayLike

from puffer_jax.nn.torch_layout import torch_aliases
from puffer_jax.parity.hints import explain
from puffer_jax.parity.jax_side import run_jax
from puffer_jax.parity.report import BARS, PRECISIONS, Errors, Kind, Report, Row
from puffer_jax.parity.shared import Arrays, Call, Inputs, Run, TorchModule
from puffer_jax.parity.torch_side import import_torch, run_torch
from puffer_jax.policies.protocol import is_recurrent
from puffer_jax.weights.state_dicts import state_dict


def compare(
    torch_policy: TorchModule,
    jax_policy: nnx.Module,
    observations: PyTree,
    state: Mapping[str, ArrayLike] | None = None,
    done: ArrayLike | None = None,
    *,
    seed: int = 0,
    equal_nan: bool = False,
) -> Report:
    """Run both policies, forward and backward, and measure how far apart they are.

    It compares the training call, `forward_eval` where both have it, the gradients of a random
    linear loss over the logits and values of both w.r.t. every parameter, and the output of every
    layer, in float64 and float32. The policies themselves are left as they are.

    Outputs and gradients are those of the untouched policy, which may compute several layers in
    one pass. The layers' outputs come from a second run, in which each layer is called and
    recorded: they show where two policies part, not what the first run computed on its way.

    It works on any `torch.nn.Module` and any `nnx.Module` whose parameters carry the same names
    (see `puffer_jax.modules`), with `forward` or with `encode_observations` and
    `decode_actions`. For the float64 run, casts to float32 inside the torch policy become casts to
    float64, and the attributes `dtype` and `param_dtype` of ours are set.

    Args:
        torch_policy: the original.
        jax_policy: the port. With `initial_state` it is recurrent, and `torch_policy` is
            called as PufferLib's LSTMWrapper is, with a state dict it writes into.
        observations: an array, or a dict or tuple of arrays, (batch, *obs). For recurrent
            policies (batch, time, *obs), or (batch, *obs) if `torch_policy.obs_shape` says so;
            `forward_eval` gets the first step.
        state: a recurrent policy's state, {"lstm_h", "lstm_c"} for an LSTMWrapper; None: zeros.
        done: (batch, time), where an episode begins. PufferLib cannot reset within a segment,
            so the torch side then runs step by step.
        seed: the seed of the loss.
        equal_nan: whether a NaN of torch's is right where ours is one, too. By default it is a
            failure, for nothing was compared there.

    Raises:
        ImportError: torch is missing.
        TypeError: a layer of `jax_policy` has no torch counterpart.
        Exception: whatever a policy raises, with a note saying which one and in what precision.
    """
    import_torch()
    inputs = _inputs(torch_policy, jax_policy, observations, state, done, seed)

    weights_differ = tuple(_differing_weights(torch_policy, jax_policy))
    theirs, ours = [], []
    for precision in PRECISIONS:
        with _saying(f"raised by the torch policy in {precision}"):
            theirs.append(run_torch(torch_policy, inputs, precision))
        with _saying(f"raised by the JAX policy in {precision}"):
            ours.append(run_jax(jax_policy, inputs, precision, theirs[0].differentiated))

    # LSTMWrapper's cell does step by step what its lstm does for whole segments.
    aliases = torch_aliases(jax_policy).items()
    tied = {alias.rpartition(".")[0]: name.rpartition(".")[0] for alias, name in aliases}
    theirs = [
        run._replace(layers={tied.get(name, name): each for name, each in run.layers.items()})
        for run in theirs
    ]
    rows = (
        *_rows("output", [r.outputs for r in theirs], [r.outputs for r in ours], equal_nan),
        *_rows("gradient", [r.gradients for r in theirs], [r.gradients for r in ours], equal_nan),
        *_rows("layer", [_layers(r) for r in theirs], [_layers(r) for r in ours]),
    )
    here, there = _calls(ours[0]), _calls(theirs[0])
    not_compared = [f"{name} (torch only)" for name in there if name not in here]
    not_compared += [f"{name} (JAX only)" for name in here if name not in there]
    return Report(rows, weights_differ, tuple(not_compared), _hint(rows, there, here))


def _inputs(
    torch_policy: TorchModule,
    jax_policy: nnx.Module,
    observations: PyTree,
    state: Mapping[str, ArrayLike] | None,
    done: ArrayLike | None,
    seed: int,
) -> Inputs:
    state_names = ()
    if is_recurrent(jax_policy):
        zero = jax.eval_shape(lambda: jax_policy.initial_state(1))  # type: ignore[attr-defined]
        state_names = tuple(name for name in zero if name != "hidden")
    evaluate = hasattr(jax_policy, "forward_eval") and hasattr(torch_policy, "forward_eval")
    observations = jax.tree.map(np.asarray, observations)
    obs_shape = getattr(torch_policy, "obs_shape", None)
    if state_names and obs_shape is not None and np.ndim(observations) == len(obs_shape) + 1:
        observations = observations[:, None]
    if state is not None:
        state = {name: np.asarray(state[name]) for name in state_names}
    done = None if done is None else np.asarray(done, bool)
    return Inputs(observations, state, done, state_names, evaluate, seed)


@contextmanager
def _saying(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def _differing_weights(torch_policy: TorchModule, jax_policy: nnx.Module) -> Iterator[str]:
    ours = state_dict(jax_policy)
    # Of torch's buffers only those count that ours has, too, a BatchNorm's statistics say.
    buffers = {name: buffer for name, buffer in torch_policy.named_buffers() if name in ours}
    for name, tensor in (dict(torch_policy.named_parameters()) | buffers).items():
        array = tensor.detach().cpu().double().numpy()
        if name not in ours:
            yield f"{name} (missing in JAX)"
        elif array.shape != ours[name].shape:
            yield f"{name} ({array.shape} in torch, {ours[name].shape} in JAX)"
        elif not np.array_equal(array, ours[name].astype(np.float64), equal_nan=True):
            yield name
    # Torch lists tied parameters once; ours may be tied where torch has no second name.
    known = dict(torch_policy.named_parameters(remove_duplicate=False)) | buffers
    known |= torch_aliases(jax_policy)
    yield from (f"{name} (missing in torch)" for name in ours if name not in known)


def _calls(run: Run) -> dict[str, Call]:
    return {
        f"{name} (call {i + 1})" if i else name: call
        for name, calls in run.layers.items()
        for i, call in enumerate(calls)
    }


def _layers(run: Run) -> Arrays:
    return {name: call.output for name, call in _calls(run).items()}


def _hint(rows: Sequence[Row], theirs: dict[str, Call], ours: dict[str, Call]) -> str:
    """Where to look if the first layer that differs was already given something else."""
    bar = BARS["layer"]["float64"]
    earlier: Arrays = {}
    for row in rows:
        if row.kind != "layer":
            continue
        there, here = theirs[row.name], ours[row.name]
        if row.float64.relative <= bar:
            earlier[row.name] = there.output
            continue
        if there.input is None or here.input is None:
            return ""
        views = [view for (view,) in _layer_views([here.input], there.input.shape)]
        errors = [
            _errors(view, there.input, np.dtype(np.float64)).relative
            for view in views
            if view.shape == there.input.shape
        ]
        if min(errors, default=math.inf) <= bar:
            return ""
        after = f"between {list(earlier)[-1]} and {row.name}" if earlier else f"before {row.name}"
        inputs = [np.asarray(call.input, np.float64) for call in (there, here)]
        said = explain(inputs[0], inputs[1], earlier)
        return f"its input differs already: look {after}" + (f" ({said})" if said else "")
    return ""


def _rows(
    kind: Kind, theirs: list[Arrays], ours: list[Arrays], equal_nan: bool = True
) -> Iterator[Row]:
    for name in theirs[0] | ours[0]:
        there = [arrays[name] for arrays in theirs if name in arrays]
        here = [arrays[name] for arrays in ours if name in arrays]
        if there and here and (problem := _incomparable(there[0], equal_nan)):
            yield _failed(name, kind, there[0].shape, problem)
        elif there and here:
            views = _layer_views(here, there[0].shape) if kind == "layer" else [here]
            rows = [_row(name, kind, there, view) for view in views]
            yield min(rows, key=lambda row: row.float64.relative)
        elif kind == "output":
            problem = f"missing in {'JAX' if there else 'torch'}"
            yield _failed(name, kind, (there or here)[0].shape, problem)


def _incomparable(exact: np.ndarray, equal_nan: bool) -> str:
    """Why agreeing with `exact` would prove nothing, or an empty text."""
    if equal_nan:
        return ""
    if not exact.size:
        return f"nothing to compare: torch's array is empty, {exact.shape}"
    if np.isnan(exact).any():
        return "torch's array has a NaN; equal_nan=True lets ours have it, too"
    return "" if np.isfinite(exact).any() else "nothing to compare: all of torch's are infinite"


def _layer_views(here: list[np.ndarray], shape: tuple[int, ...]) -> Iterator[list[np.ndarray]]:
    """The arrays as they are, with torch's channels first, and with time folded into the batch."""
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
        _errors(ours[1], exact, np.dtype(np.float32)),
        _mean_square(theirs[1], exact),
        _mean_square(ours[1], exact),
    )


def _failed(name: str, kind: Kind, shape: tuple[int, ...], problem: str) -> Row:
    infinite = Errors(math.inf, math.inf, math.inf)
    return Row(name, kind, shape, infinite, infinite, 0.0, math.inf, problem)


def _difference(array: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, float]:
    """The elementwise one, infinite if only one side is a number; and the reference's magnitude."""
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
