"""Does a policy keep the rules that the trainer, `LSTMWrapper` and the weight exchange rely on?

    print(check_policy(policy, env))

A rule is a function, marked with `_rule`, that raises `_Broken` with what is wrong.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from puffer_jax.base import spaces
from puffer_jax.nn.distributions import Normal
from puffer_jax.nn.params import merge, split
from puffer_jax.nn.torch_layout import torch_parameters

# A bound beyond this counts as none: CartPole's are 3e38, where any network overflows.
_LARGE = 1e6

_RANDOM = ("random", "random 2", "random 3")

_KINDS = ("zero", "lowest", "highest", *_RANDOM)

_TIME = 3

# Of the largest magnitude. Batch sizes, jit and eager round differently, in bfloat16 by a percent;
# the same program on the same row does not.
_CLOSE, _SAME = 2e-2, 1e-5


class Check(NamedTuple):
    """One rule: its name, "ok", "FAILED", "warning" or "not run", and why."""

    name: str
    result: str
    reason: str


@dataclass(frozen=True)
class PolicyReport:
    """What `check_policy` found; `str(report)` is for reading.

    Attributes:
        title: the policy and its action space.
        checks: every rule that applies to this kind of policy.
    """

    title: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed; warnings do not count."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.result == "FAILED")

    def __str__(self) -> str:
        verdict = f"{len(self.failures)} FAILED" if self.failures else "ok"
        width = max(len(check.name) for check in self.checks)
        lines = [
            textwrap.fill(
                check.reason,
                100,
                initial_indent=f"  {check.name:{width}}  {check.result:8} ",
                subsequent_indent=" " * (width + 13),
            )
            for check in self.checks
        ]
        return "\n".join([f"{self.title}: {verdict}", *lines])


def check_policy(
    policy: Any,
    env: Any,
    *,
    raise_on_failure: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> PolicyReport:
    """Run a policy on zero, extreme and random observations and report which rules it keeps.

    A policy is recurrent if it has `initial_state`. An exception inside the policy fails the
    check it happened in; a check that needs one that failed is not run. The policy is run, not
    changed, unless its own methods change it.

    Args:
        policy: an `nnx.Module`.
        env: gives the spaces, with their bounds, see `puffer_jax.spaces.env_spec`; bounds beyond
            1e6 count as none. An emulated Dict does not tell its bounds: integers of 32 and 64
            bits, the usual Discrete, are then 0 or 1, others take the range of their dtype.
        raise_on_failure: for tests.
        batch_size: observations in a batch, at least 2; several batches are run.
        seed: of the random observations.

    Returns:
        The report.

    Raises:
        ValueError: a check failed and `raise_on_failure` is set, with the report as its text; a
            `batch_size` below 2; an action space no policy supports.
        TypeError: an attribute of `env` is no space.
        AttributeError: `env` has no spaces.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; checking a batch takes at least 2 rows")
    run = _Run(policy, env, batch_size, seed)
    results: dict[str, Check] = {}
    for rule in _RULES:
        if rule.only not in ("", "recurrent" if run.recurrent else "feed-forward"):
            continue
        broken = [
            name
            for name in rule.needs
            if name in results and results[name].result in ("FAILED", "not run")
        ]
        if broken:
            results[rule.name] = Check(rule.name, "not run", f"it needs: {', '.join(broken)}")
            continue
        try:
            rule.function(run)
            problem = ""
        except Exception as error:
            problem = _describe(error)
        bad = "warning" if rule.name == "weights" else "FAILED"
        results[rule.name] = Check(rule.name, bad if problem else "ok", problem or rule.ok)
    title = f"{type(policy).__name__} acting in {run.action}"
    report = PolicyReport(title, tuple(results.values()))
    if raise_on_failure and not report.ok:
        raise ValueError(str(report))
    return report


class _Broken(Exception):
    """A rule is; says which and what to do."""


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise _Broken(otherwise)


def _describe(error: Exception) -> str:
    if isinstance(error, _Broken):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 300)}"


def _draw(space: Any, kind: str, count: int, rng: np.random.Generator) -> Any:
    """`count` observations of a space, (count, *shape), in the form of the space."""
    match spaces.kind_of(space):
        case "dict":
            return {key: _draw(sub, kind, count, rng) for key, sub in space.spaces.items()}
        case "tuple":
            return tuple(_draw(sub, kind, count, rng) for sub in space.spaces)
        case "discrete" | "multidiscrete":
            low = np.asarray(getattr(space, "start", 0))
            high = low + np.asarray(getattr(space, "nvec", getattr(space, "n", None))) - 1
            shape, dtype = high.shape, np.dtype(np.int32)
        case "multibinary":
            low, high, shape, dtype = 0, 1, tuple(space.shape), np.dtype(space.dtype)
        case "box":
            low, high, shape = space.low, space.high, tuple(space.shape)
            dtype = np.dtype(space.dtype)
    low, high = (np.clip(np.asarray(x, np.float64), -_LARGE, _LARGE) for x in (low, high))
    # Where there is no bound, a window near zero.
    width = np.where(high - low < _LARGE, high - low, 2.0)
    start = np.clip(-1.0, low, high - width)
    steps = not jnp.issubdtype(dtype, jnp.floating)
    random = start + rng.random((count, *shape)) * (width + steps)
    random = np.minimum(np.floor(random), high) if steps else random
    values = {"lowest": low, "highest": high, "zero": np.clip(0.0, low, high)}.get(kind, random)
    return np.broadcast_to(values, (count, *shape)).astype(dtype)


def _unbounded(dtype: np.dtype) -> Any:
    """A structured dtype as a space; what its leaves may hold is guessed."""
    if dtype.names is not None:
        return SimpleNamespace(spaces={name: _unbounded(dtype[name]) for name in dtype.names})
    low, high = -np.inf, np.inf
    if not jnp.issubdtype(dtype.base, jnp.floating):
        small = dtype.base.itemsize < 4 and dtype.base != np.bool_
        low, high = (np.iinfo(dtype.base).min, np.iinfo(dtype.base).max) if small else (0, 1)
    return SimpleNamespace(low=low, high=high, shape=dtype.shape, dtype=dtype.base)


def _fill(struct: np.ndarray, tree: Mapping[str, Any]) -> None:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            _fill(struct[name], value)
        else:
            struct[name] = value


class _Run:
    """A policy under test, its observations, and its outputs on them."""

    def __init__(self, policy: Any, env: Any, batch: int, seed: int):
        spec = spaces.env_spec(env)
        self.layout, self.action = spec.single_observation_space, spec.single_action_space
        self.space = getattr(env, "single_observation_space", None)
        self.space = env.observation_space if self.space is None else self.space
        self.policy, self.batch, self.rng = policy, batch, np.random.default_rng(seed)
        self.recurrent = hasattr(policy, "initial_state")
        self.observations = {kind: self.draw(kind, batch) for kind in _KINDS}
        self.outputs: dict[str, dict[str, np.ndarray]] = {}
        self.traces = 0

    def draw(self, kind: str, count: int) -> Any:
        if self.layout.sample_dtype is None or self.layout.structured is None:
            return jax.tree.map(jnp.asarray, _draw(self.space, kind, count, self.rng))
        packed = np.zeros(count, self.layout.structured)
        _fill(packed, _draw(_unbounded(self.layout.structured), kind, count, self.rng))
        return jnp.asarray(packed.view(self.layout.sample_dtype).reshape(count, -1))

    def sequences(self, kind: str) -> Any:
        """(batch, time, *obs)."""
        fold = lambda x: x.reshape(self.batch, _TIME, *x.shape[1:])  # noqa: E731
        return jax.tree.map(fold, self.draw(kind, self.batch * _TIME))

    def fresh(self, batch: int) -> Any:
        return self.policy.initial_state(batch) if self.recurrent else None

    def act(self, observations: Any) -> dict[str, np.ndarray]:
        """Named outputs, eagerly."""
        return _arrays(_step(self.policy, observations, self.fresh(self.batch))[0])

    @cached_property
    def compiled(self) -> Callable[[Any, Any], Any]:
        """`_step`, jitted, as a function of observations and state."""
        graphdef, params = split(self.policy)

        @jax.jit
        def step(params: Any, observations: Any, state: Any) -> Any:
            self.traces += 1
            return _step(merge(graphdef, params), observations, state)

        return partial(step, params)


def _step(policy: Any, observations: Any, state: Any) -> tuple[dict[str, Any], Any]:
    """Named outputs and the new state; the state of a policy without memory is None."""
    if state is not None:
        logits, values, state = policy.forward_eval(observations, state)
    else:
        # LSTMWrapper passes the state by keyword.
        hidden = policy.encode_observations(observations, state=None)
        logits, values = policy.decode_actions(hidden)
    return _named(logits, values), state


def _arrays(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(y) for name, y in outputs.items()}


def _named(logits: Any, values: Any) -> dict[str, Any]:
    if isinstance(logits, Normal):
        scale = jnp.broadcast_to(logits.scale, jnp.shape(logits.loc))
        named = {"loc": logits.loc, "scale": scale, "values": values}
    elif isinstance(logits, tuple):
        named = {**{f"logits[{i}]": x for i, x in enumerate(logits)}, "values": values}
    else:
        named = {"logits": logits, "values": values}
    for name, y in named.items():
        if not hasattr(y, "shape"):
            raise TypeError(
                f"{name.split('[')[0]} is a {type(y).__name__}; return (logits, values), logits "
                "being an array, a tuple of arrays or a puffer_jax.Normal"
            )
    return named


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], tolerance: float) -> str:
    """Names of the outputs that differ by more than `tolerance` of their largest magnitude."""
    return ", ".join(name for name in b if name not in a or not _near(a[name], b[name], tolerance))


def _near(a: Any, b: Any, tolerance: float) -> bool:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = np.abs(b[np.isfinite(b)]).max(initial=0)
    return a.shape == b.shape and np.allclose(a, b, 0, tolerance * scale, equal_nan=True)


def _unusable(outputs: Mapping[str, np.ndarray]) -> list[str]:
    """Outputs no distribution can be made of; -inf beside finite logits is a mask."""
    bad = []
    for name, y in outputs.items():
        largest = y.max(-1) if name.startswith("logits") and y.ndim > 1 else y
        if not np.isfinite(largest).all() or (name == "scale" and not (y > 0).all()):
            bad.append(name)
    return bad


class _Rule(NamedTuple):
    name: str
    needs: tuple[str, ...]
    only: str
    ok: str
    function: Callable[[_Run], None]


_RULES: list[_Rule] = []


def _rule(ok: str, *needs: str, only: str = "") -> Callable[[Any], Any]:
    """Mark a rule: what it means to keep it, the rules it builds on, the policies it is for."""

    def mark(function: Any) -> Any:
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


@_rule("nnx.Param is all that it holds, so that split and merge work")
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


@_rule("the same observations give the same, and change nothing", "forward", "parameters")
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


@_rule("forward_eval and __call__ do as encode and decode", "pure", only="feed-forward")
def _agreement(run: _Run) -> None:
    x = run.observations["random"]
    calls: dict[str, Callable[[], Any]] = {}
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


def _varies(rows: Any) -> bool:
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

    def act(change: Callable[..., Any], *trees: Any) -> dict[str, np.ndarray]:
        changed = jax.tree.map(change, *trees)
        batch = jax.tree.leaves(changed)[0].shape[0]
        outputs = _arrays(run.compiled(changed, run.fresh(batch))[0])
        return {name: np.atleast_1d(y) for name, y in outputs.items()}

    def same(what: str, given: Any, right: Any, tolerance: float) -> None:
        names = _differing(given, right, tolerance)
        _require(
            not names,
            f"a row's {names} depends on {what}; do not reduce, normalise, squeeze or reshape "
            "across axis 0",
        )

    def keep_even(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        rows = np.arange(run.batch).reshape(-1, *[1] * (a.ndim - 1))
        return np.where(rows % 2 == 0, a, b)

    unchanged, mixed = act(np.asarray, x), act(keep_even, x, other)
    even, right = ({k: y[::2] for k, y in out.items()} for out in (mixed, unchanged))
    same("what the other rows hold", even, right, _SAME)
    backwards = act(lambda leaf: leaf[::-1], x)
    same("its place in the batch", {k: y[::-1] for k, y in backwards.items()}, base, _CLOSE)
    alone = [act(lambda leaf, i=i: leaf[i : i + 1], x) for i in range(run.batch)]
    joined = {k: np.concatenate([row[k] for row in alone]) for k in base}
    same("the size of the batch", joined, base, _CLOSE)


@_rule("every parameter gets a finite, non-zero gradient", "jit")
def _gradients(run: _Run) -> None:
    graphdef, params = split(run.policy)

    @jax.jit
    @jax.grad
    def gradient(params: Any, x: Any) -> Any:
        policy = merge(graphdef, params)
        outputs = _named(*policy.forward(x)[:2]) if run.recurrent else _step(policy, x, None)[0]
        rng = np.random.default_rng(0)
        return sum(
            (rng.standard_normal(y.shape) * jnp.where(jnp.isfinite(y), y, 0)).sum()
            for y in outputs.values()
        )

    largest: dict[str, Any] = {}
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


@_rule("forward over time is steps of forward_eval", "carry", only="recurrent")
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
    """What of `forward` differs from single steps."""
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
    # The state may hold more than it is started with, but must lead to the same next step.
    after, expected = (_step(run.policy, run.observations["random"], s)[0] for s in (last, state))
    return "state" if _differing(after, expected, _CLOSE) else ""


@_rule("every layer has a torch counterpart", "parameters")
def _weights(run: _Run) -> None:
    torch_parameters(run.policy)
