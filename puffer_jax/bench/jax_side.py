"""The contestants on JAX: ours, and what a user would write without us."""

import importlib.metadata
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import puffer_jax
from puffer_jax.bench import rows
from puffer_jax.bench.rows import Case
from puffer_jax.jaxenv import Box
from puffer_jax.spaces import Discrete


def start(threads: int, device: str, precision: str) -> dict[str, Any]:
    """Settle the precision; returns what runs here."""
    if precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    else:
        jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return {**versions, "device": jax.devices()[0].device_kind}


def forget() -> None:
    """Drop compiled programs."""
    jax.clear_caches()


def device_memory() -> int | None:
    """Bytes at the peak on the device; None: it has no memory of its own."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def matmul(size: int) -> Case:
    """A square float32 matrix product."""
    x, y = (jnp.asarray(rows.observations((size, size), seed)) for seed in (0, 1))
    multiply = jax.jit(jnp.matmul)
    return Case(lambda: multiply(x, y).block_until_ready())


def _policy(net: str, shape: tuple[int, ...], hidden: int, actions: int) -> Any:
    """Ours, with the weights that every side has."""
    dtype = np.uint8 if len(shape) == 3 else np.float32
    space = Box(0, 255, shape, dtype) if len(shape) == 3 else Box(-np.inf, np.inf, shape, dtype)
    env = SimpleNamespace(observation_space=space, action_space=Discrete(actions))
    env.single_observation_space, env.single_action_space = space, env.action_space
    rngs = nnx.Rngs(0)
    match net:
        case "default":
            policy = puffer_jax.Default(env, hidden, rngs=rngs)
        case "lstm":
            policy = puffer_jax.Default(env, hidden, rngs=rngs)
            policy = puffer_jax.LSTMWrapper(env, policy, hidden, hidden, rngs=rngs)
        case "naturecnn":
            policy = puffer_jax.Convolutional(env, framestack=4, flat_size=3136, rngs=rngs)
        case _:
            policy = puffer_jax.ProcgenResnet(env, rngs=rngs)
    shapes = {name: array.shape for name, array in puffer_jax.state_dict(policy).items()}
    puffer_jax.load_state_dict(policy, rows.generic(shapes))
    return policy


def evaluate(net: str, batch: int) -> Case:
    """`forward_eval` and `sample_logits`, from a host array to a host action."""
    policy = _policy(net, (4,), 128, 2)
    graphdef, params = puffer_jax.split(policy)
    obs = rows.observations((batch, 4))

    @jax.jit
    def act(params: Any, obs: Any, state: Any, key: Any) -> Any:
        key, sample_key = jax.random.split(key)
        logits, values, *rest = puffer_jax.merge(graphdef, params).forward_eval(obs, state)
        sampled = puffer_jax.sample_logits(logits, key=sample_key)
        return *sampled, values, rest[0] if rest else None, key

    carried = policy.initial_state(batch) if net == "lstm" else None, jax.random.key(0)

    def call() -> Any:
        nonlocal carried
        action, _, entropy, values, *carried = act(params, obs, *carried)
        return np.asarray(action), entropy, values, carried[0]

    def outputs(result: Any) -> rows.Arrays:
        state = {} if result[3] is None else {n: result[3][n] for n in ("lstm_h", "lstm_c")}
        arrays = {"entropy": result[1], "values": result[2], **state}
        return {name: np.asarray(x) for name, x in arrays.items()}

    return Case(call, outputs)


def _loss(outputs: dict[str, Any]) -> Any:
    return sum((x**2).mean() for x in outputs.values())


def train(
    net: str,
    lead: tuple[int, ...],
    shape: tuple[int, ...],
    hidden: int,
    backward: bool,
    done: bool = False,
    plain: bool = False,
) -> Case:
    """Logits and values; or a loss of them and its gradients."""
    policy = _policy(net, shape, hidden, 6 if len(shape) == 3 else 2)
    obs = jnp.asarray(rows.observations((*lead, *shape)))
    to_torch = None
    if plain:
        weights = puffer_jax.state_dict(policy)
        params, forward = (_rnn if net == "lstm" else _conv)(weights)
    else:
        graphdef, params = puffer_jax.split(policy)
        starts = jnp.asarray(np.random.default_rng(4).random(lead) < 0.05)
        options = {"done": starts} if done else {}

        def forward(params: Any, obs: Any) -> Any:
            return puffer_jax.merge(graphdef, params).forward(obs, **options)[:2]

        def to_torch(grads: Any) -> rows.Arrays:
            arrays = puffer_jax.state_dict(puffer_jax.merge(graphdef, grads))
            return {f"d {n}": x for n, x in arrays.items() if not n.startswith("cell.")}

    def outputs(params: Any, obs: Any) -> dict[str, Any]:
        logits, values = forward(params, obs)
        return {"logits": logits, "values": values.reshape(lead)}

    if not backward:
        run = jax.jit(outputs)
        arrays = lambda result: {n: np.asarray(x) for n, x in result.items()}  # noqa: E731
    else:
        run = jax.jit(jax.value_and_grad(lambda params, obs: _loss(outputs(params, obs))))

        def arrays(result: Any) -> rows.Arrays:
            found = {"loss": np.asarray(result[0])}
            return found | (to_torch(result[1]) if to_torch else {})

    # With `done` it is another function, which the reference does not have.
    return Case(lambda: jax.block_until_ready(run(params, obs)), None if done else arrays)


# --- what a user would write without us ---------------------------------------------------------


def _dense(weights: rows.Arrays, name: str) -> dict[str, Any]:
    return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}


def _apply(layer: dict[str, Any], x: Any) -> Any:
    return x @ layer["kernel"] + layer["bias"]


def _cell(weights: rows.Arrays, hidden: int) -> tuple[Any, Any]:
    """An `nnx.OptimizedLSTMCell` with these weights, split."""
    graphdef, state = nnx.split(nnx.OptimizedLSTMCell(hidden, hidden, rngs=nnx.Rngs(0)))
    bias = weights["lstm.bias_ih_l0"] + weights["lstm.bias_hh_l0"]
    given = {
        "dense_h": {"kernel": weights["lstm.weight_hh_l0"].T, "bias": bias},
        "dense_i": {"kernel": weights["lstm.weight_ih_l0"].T},
    }
    assert jax.tree.map(np.shape, nnx.to_pure_dict(state)) == jax.tree.map(np.shape, given)
    return graphdef, given


def _heads(weights: rows.Arrays, prefix: str = "policy.") -> dict[str, Any]:
    return {
        "encoder": _dense(weights, f"{prefix}encoder.0"),
        "decoder": _dense(weights, f"{prefix}decoder"),
        "value": _dense(weights, f"{prefix}value"),
    }


def _rnn(weights: rows.Arrays) -> tuple[Any, Callable[..., Any]]:
    """The LSTM policy with `nnx.RNN(nnx.OptimizedLSTMCell)`."""
    graphdef, cell = _cell(weights, weights["lstm.weight_hh_l0"].shape[1])
    params = jax.tree.map(jnp.asarray, _heads(weights) | {"cell": cell})

    def forward(params: Any, obs: Any) -> Any:
        x = nnx.gelu(_apply(params["encoder"], obs), approximate=False)
        x = nnx.RNN(nnx.merge(graphdef, params["cell"]))(x)
        x = x.reshape(-1, x.shape[-1])
        return _apply(params["decoder"], x), _apply(params["value"], x)

    return params, forward


def _conv(weights: rows.Arrays) -> tuple[Any, Callable[..., Any]]:
    """NatureCNN with `jax.lax.conv_general_dilated`, channels last."""
    params: dict[str, Any] = {
        name: _dense(weights, torch_name)
        for name, torch_name in (("hidden", "network.7"), ("actor", "actor"), ("value", "value_fn"))
    }
    for i in (0, 2, 4):
        kernel = weights[f"network.{i}.weight"].transpose(2, 3, 1, 0)
        params[f"conv{i}"] = {"kernel": kernel, "bias": weights[f"network.{i}.bias"]}
    params = jax.tree.map(jnp.asarray, params)

    def forward(params: Any, obs: Any) -> Any:
        x = obs.transpose(0, 2, 3, 1).astype(jnp.float32) / 255
        for i, stride in ((0, 4), (2, 2), (4, 1)):
            layer = params[f"conv{i}"]
            x = jax.lax.conv_general_dilated(
                x,
                layer["kernel"],
                (stride, stride),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = nnx.relu(x + layer["bias"])
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        x = nnx.relu(_apply(params["hidden"], x))
        return _apply(params["actor"], x), _apply(params["value"], x)

    return params, forward
