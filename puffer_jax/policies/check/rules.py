"""The rules: functions, marked with `_rule`, that raise `_Broken` with what is wrong."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from puffer_jax.base import spaces
from puffer_jax.nn.params import merge, split
from puffer_jax.nn.torch_layout import torch_parameters
from puffer_jax.policies.check.run import (
    _CLOSE,
    _KINDS,
    _RANDOM,
    _SAME,
    _TIME,
    _arrays,
    _Broken,
    _describe,
    _differing,
    _named,
    _near,
    _Outputs,
    _require,
    _Run,
    _step,
    _unusable,
)

_Function = Callable[[_Run], None]


class _Rule(NamedTuple):
    name: str
    needs: tuple[str, ...]
    only: str
    ok: str
    function: _Function


_RULES: list[_Rule] = []


def _rule(ok: str, *needs: str, only: str = "") -> Callable[[_Function], _Function]:
    """Mark a rule: what it means to keep it, the rules it builds on, the policies it is for."""

    def mark(function: _Function) -> _Function:
        _RULES.append(_Rule(function.__name__.removeprefix("_"), needs, only, ok, function))
        return function

    return mark


@_rule("the methods a policy needs are there")
def _methods(run: _Run) -> None:
    names = ("encode_observations", "decode_actions")
    if run.recurrent:
        names = ("initial_state", "forward_eval", "forward")
    missing = [name for name in names if not callable(getattr(run.policy, name, None))]
    _require(not missing, f"define {' and '.join(missing)}")


@_rule("hidden_size and is_continuous are there and fit the env")
def _attributes(run: _Run) -> None:
    size = getattr(run.policy, "hidden_size", "missing")
    _require(
        isinstance(size, int),
        f"hidden_size is {size}; set self.hidden_size to the width that decode_actions reads",
    )
    given = getattr(run.policy, "is_continuous", "missing")
    right = isinstance(run.action, spaces.Continuous)
    _require(
        given is right, f"is_continuous is {given}; set self.is_continuous = {right} for this env"
    )


@_rule("it holds nnx.Param only, so that split and merge work")
def _parameters(run: _Run) -> None:
    split(run.policy)


@_rule("runs on zero, extreme and random observations", "methods")
def _forward(run: _Run) -> None:
    for kind, x in run.observations.items():
        try:
            run.outputs[kind] = run.act(x)
        except Exception as error:
            raise _Broken(f"on {kind} observations: {_describe(error)}") from error


@_rule("encodes to (batch, hidden_size)", "forward", "attributes", only="feed-forward")
def _hidden(run: _Run) -> None:
    shape = run.policy.encode_observations(run.observations["zero"], state=None).shape
    right = (run.batch, run.policy.hidden_size)
    _require(
        shape == right,
        f"encode_observations gives {shape}; it should give (batch, hidden_size) = {right}",
    )


@_rule("logits fit the action space", "forward")
def _logits(run: _Run) -> None:
    match run.action:
        case spaces.Discrete(n):
            form, widths = "an array (batch, n)", {"logits": n}
        case spaces.MultiDiscrete(nvec):
            form = "a tuple with one array (batch, n) for each component"
            widths = {f"logits[{i}]": n for i, n in enumerate(nvec)}
        case spaces.Continuous((size,)):
            form = "a puffer_jax.Normal(loc, scale), both (batch, k)"
            widths = {"loc": size, "scale": size}
    right = {name: (run.batch, n) for name, n in widths.items()}
    given = {name: y.shape for name, y in run.outputs["zero"].items() if name != "values"}
    expected, got = (
        ", ".join(f"{name} {shape}" for name, shape in named.items()) for named in (right, given)
    )
    _require(given == right, f"{run.action} takes {form}: {expected}; decode_actions gives {got}")


@_rule("values are (batch, 1)", "forward")
def _values(run: _Run) -> None:
    shape, right = run.outputs["zero"]["values"].shape, (run.batch, 1)
    _require(
        shape == right,
        f"values are {shape}; they should be (batch, 1) = {right}, as a head of width 1 gives them",
    )


@_rule("outputs are finite on all those observations", "forward")
def _finite(run: _Run) -> None:
    bad: dict[str, list[str]] = {}
    for kind in _KINDS:
        for name in _unusable(run.outputs[kind]):
            bad.setdefault(name, []).append(kind)
    found = "; ".join(f"{name} on {', '.join(kinds)} observations" for name, kinds in bad.items())
    _require(
        not bad,
        f"NaN, infinity or a scale <= 0 in {found}; scale or clip the observations "
        "and keep exp, log, sqrt and division inside their domain",
    )


@_rule("the same observations give the same outputs, and change nothing", "forward", "parameters")
def _pure(run: _Run) -> None:
    before = split(run.policy)[0]
    again = _differing(run.act(run.observations["random"]), run.outputs["random"], _SAME)
    _require(
        not again, f"the same observations gave other {again}; keep randomness and counters outside"
    )
    _require(
        split(run.policy)[0] == before,
        "a call changes the policy's attributes, so a jitted function would be traced at every "
        "call; return what changes, or keep it outside",
    )


@_rule("forward_eval and __call__ do what encode and decode do", "pure", only="feed-forward")
def _agreement(run: _Run) -> None:
    x = run.observations["random"]
    calls: dict[str, Callable[[], tuple[object, object]]] = {}
    if hasattr(run.policy, "forward_eval"):
        calls["forward_eval(x, state)"] = lambda: run.policy.forward_eval(x, None)
    if callable(run.policy):
        calls["policy(x)"] = lambda: run.policy(x)
    for name, call in calls.items():
        logits, values = call()
        other = _differing(_named(logits, values), run.outputs["random"], _CLOSE)
        _require(
            not other, f"{name} gives other {other} than decode_actions(encode_observations(x))"
        )


@_rule("logits and values depend on the observation", "pure")
def _observation(run: _Run) -> None:
    # Some spaces, a bandit's, hold a single observation.
    if not any(_varies(leaf) for leaf in jax.tree.leaves(run.observations["random"])):
        return
    varies = {name: _varies(y) for name, y in run.outputs["random"].items() if name != "scale"}
    values = varies.pop("values")
    same = ["logits"] * (not any(varies.values())) + ["values"] * (not values)
    _require(
        not same,
        f"{' and '.join(same)} do not depend on the observation; does the encoder read it, and is "
        "no layer dead?",
    )


def _varies(rows: Array | np.ndarray) -> bool:
    return not _near(np.broadcast_to(np.asarray(rows[:1]), rows.shape), rows, _SAME)


@_rule("the state keeps its structure, shapes and dtypes", "pure", only="recurrent")
def _carry(run: _Run) -> None:
    state = run.policy.initial_state(run.batch)
    _, new = _step(run.policy, run.observations["random"], state)
    before, after = (
        ", ".join(
            f"state{jax.tree_util.keystr(path)} {jnp.shape(leaf)} {jnp.result_type(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        )
        for tree in (state, new)
    )
    _require(
        before == after,
        f"initial_state gives {before}; forward_eval gives {after}; they must be the same",
    )
    _require(
        all(jnp.shape(leaf)[:1] == (run.batch,) for leaf in jax.tree.leaves(state)),
        f"the batch comes first in every array of the state; initial_state gives {before}",
    )


@_rule("one trace under jax.jit, with the same outputs", "pure", "carry")
def _jit(run: _Run) -> None:
    outputs, state = run.compiled(run.observations["random"], run.fresh(run.batch))
    other = _differing(outputs, run.outputs["random"], _CLOSE)
    _require(not other, f"{other} under jax.jit differ from the same without it")
    run.compiled(run.observations["random 2"], state)
    _require(
        run.traces == 1,
        "a second call of the same shapes was traced again; give the arrays of initial_state an "
        "explicit dtype",
    )


@_rule("the rows of a batch do not influence each other", "jit")
def _rows(run: _Run) -> None:
    base = run.outputs["random"]
    x, other = (jax.tree.map(np.asarray, run.observations[kind]) for kind in _RANDOM[:2])

    def act(change: Callable[..., np.ndarray], *trees: PyTree) -> dict[str, np.ndarray]:
        changed = jax.tree.map(change, *trees)
        batch = jax.tree.leaves(changed)[0].shape[0]
        outputs = _arrays(run.compiled(changed, run.fresh(batch))[0])
        return {name: np.atleast_1d(y) for name, y in outputs.items()}

    def same(what: str, outputs: _Outputs, right: _Outputs, tolerance: float) -> None:
        names = _differing(outputs, right, tolerance)
        _require(
            not names,
            f"a row's {names} depends on {what}; do not reduce, normalise, squeeze or reshape "
            "across axis 0",
        )

    def keep_even_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        rows = np.arange(run.batch).reshape(-1, *[1] * (a.ndim - 1))
        return np.where(rows % 2 == 0, a, b)

    unchanged, mixed = act(np.asarray, x), act(keep_even_rows, x, other)
    kept, right = ({k: y[::2] for k, y in out.items()} for out in (mixed, unchanged))
    same("what the other rows hold", kept, right, _SAME)
    backwards = act(lambda leaf: leaf[::-1], x)
    same("its place in the batch", {k: y[::-1] for k, y in backwards.items()}, base, _CLOSE)
    single = [act(lambda leaf, i=i: leaf[i : i + 1], x) for i in range(run.batch)]
    joined = {k: np.concatenate([row[k] for row in single]) for k in base}
    same("the size of the batch", joined, base, _CLOSE)


@_rule("every parameter gets a finite, non-zero gradient", "jit")
def _gradients(run: _Run) -> None:
    graphdef, params = split(run.policy)

    @jax.jit
    @jax.grad
    def gradient(params: PyTree, x: PyTree) -> ArrayLike:
        policy = merge(graphdef, params)
        outputs = _named(*policy.forward(x)[:2]) if run.recurrent else _step(policy, x, None)[0]
        rng = np.random.default_rng(0)
        return sum(
            (rng.standard_normal(y.shape) * jnp.where(jnp.isfinite(y), y, 0)).sum()
            for y in outputs.values()
        )

    largest: dict[str, np.ndarray] = {}
    for kind in _KINDS:
        # Where the outputs are not finite the gradient cannot be.
        if not _unusable(run.outputs[kind]):
            x = run.sequences(kind) if run.recurrent else run.observations[kind]
            named = _by_name(merge(graphdef, gradient(params, x)))
            largest = {k: np.maximum(np.abs(g).max(), largest.get(k, 0)) for k, g in named.items()}
    unused = ", ".join(name for name, g in largest.items() if g == 0)
    bad = ", ".join(name for name, g in largest.items() if not np.isfinite(g))
    _require(largest, "there are no observations with finite outputs")
    _require(not unused, f"no gradient reaches {unused}; use them or remove them")
    _require(not bad, f"the gradient of {bad} is not finite: sqrt, log, a norm or a division at 0?")


def _by_name(policy: nnx.Module) -> dict[str, np.ndarray]:
    try:
        return {parameter.name: parameter.to_torch() for parameter in torch_parameters(policy)}
    except TypeError:  # a layer with no torch counterpart
        flat = traverse_util.flatten_dict(split(policy)[1])
        return {".".join(map(str, path)): np.asarray(g) for path, g in flat.items()}


@_rule("forward over time does what steps of forward_eval do", "carry", only="recurrent")
def _time(run: _Run) -> None:
    other = _against_steps(run, None)
    _require(
        not other,
        f"forward over (batch, time) gives other {other} than steps of forward_eval; its logits "
        "are flat, (batch * time, n), its values (batch, time)",
    )


@_rule("forward starts afresh where done is set", "time", only="recurrent")
def _done(run: _Run) -> None:
    # Each row is done at another step, some never.
    done = np.arange(run.batch)[:, None] % (_TIME + 1) == np.arange(_TIME)
    other = _against_steps(run, done)
    _require(
        not other,
        f"forward(x, state, done=done) gives other {other} than steps of forward_eval; start from "
        "initial_state before each observation that has done set",
    )


def _against_steps(run: _Run, done: np.ndarray | None) -> str:
    """Which results of `forward` differ from those of single steps."""
    x, (batch, time) = run.sequences("random"), (run.batch, _TIME)
    fresh = state = run.policy.initial_state(batch)
    steps = []
    for t in range(time):
        if done is not None:
            start = done[:, t]
            state = jax.tree.map(
                lambda new, old, start=start: jnp.where(
                    start.reshape(-1, *[1] * (old.ndim - 1)), new, old
                ),
                fresh,
                state,
            )
        observation = jax.tree.map(lambda leaf, t=t: leaf[:, t], x)
        outputs, state = _step(run.policy, observation, state)
        steps.append(outputs)
    right = {k: np.stack([y[k] for y in steps], 1) for k in steps[0]}
    right = {k: y.reshape(batch * time, *y.shape[2:]) for k, y in right.items()}
    right["values"] = right["values"].reshape(batch, time)

    keyword = {} if done is None else {"done": jnp.asarray(done)}
    logits, values, last = run.policy.forward(x, fresh, **keyword)
    if other := _differing(_named(logits, values), right, _CLOSE):
        return other
    # The state may hold more than it started with, but must lead to the same next step.
    after, expected = (_step(run.policy, run.observations["random"], s)[0] for s in (last, state))
    return "state" if _differing(after, expected, _CLOSE) else ""


@_rule("every layer has a torch counterpart", "parameters")
def _weights(run: _Run) -> None:
    torch_parameters(run.policy)
