"""The contestants on JAX: ours, and what users would write without it."""

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray, PyTree

import puffer_jax
from puffer_jax import ppo, v4, vector
from puffer_jax.base.spaces import Box, Discrete
from puffer_jax.bench import rows
from puffer_jax.bench.devices import devices as devices
from puffer_jax.bench.rows import Case
from puffer_jax.kernels.cpu import native
from puffer_jax.ppo.config import PuffeRLConfig


def start(threads: int, device: str, precision: str) -> dict[str, object]:
    """Set the precision; returns what runs here.

    Raises:
        RuntimeError: JAX finds no such device.
    """
    try:
        kind = jax.devices()[0].device_kind
    except (RuntimeError, AssertionError) as error:  # an assertion if there is no plugin for it
        raise RuntimeError(
            f"JAX finds no {device} here; for NVIDIA's GPUs: pip install 'jax[cuda12]'"
        ) from error
    if precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    else:
        jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    kernels = "ours" if native.is_available("float32") else "XLA's"
    return {**versions, "device": kind, "kernels": kernels}


def forget() -> None:
    """Drop compiled programs."""
    jax.clear_caches()


def device_memory() -> int | None:
    """Peak memory on the device in bytes; None if it has no memory of its own."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def matmul(size: int) -> Case:
    """A square float32 matrix product."""
    x, y = (jnp.asarray(rows.observations((size, size), seed)) for seed in (0, 1))
    multiply = jax.jit(jnp.matmul)
    return Case(lambda: multiply(x, y).block_until_ready())


def _policy(net: str, shape: tuple[int, ...], hidden: int, actions: int) -> Any:
    """Our policy, with the weights that all sides use."""
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
        case "mingru":
            policy = v4.Policy.for_env(env, hidden, rows.MINGRU_LAYERS, rngs=rngs)
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
    def act(params: PyTree, obs: Array, state: PyTree, key: PRNGKeyArray) -> PyTree:
        key, sample_key = puffer_jax.random.split(key)
        logits, values, *rest = puffer_jax.merge(graphdef, params).forward_eval(obs, state)
        sampled = puffer_jax.sample_logits(logits, key=sample_key)
        return *sampled, values, rest[0] if rest else None, key

    carried = policy.initial_state(batch) if net == "lstm" else None, jax.random.key(0)

    def call() -> PyTree:
        nonlocal carried
        action, _, entropy, values, *carried = act(params, obs, *carried)
        return np.asarray(action), entropy, values, carried[0]

    def outputs(result: PyTree) -> rows.Arrays:
        state = {} if result[3] is None else {n: result[3][n] for n in ("lstm_h", "lstm_c")}
        arrays = {"entropy": result[1], "values": result[2], **state}
        return {name: np.asarray(x) for name, x in arrays.items()}

    return Case(call, outputs)


def _loss(outputs: dict[str, Array]) -> ArrayLike:
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
    """Logits and values, or a loss of them and its gradients."""
    policy = _policy(net, shape, hidden, 6 if len(shape) == 3 else 2)
    obs = jnp.asarray(rows.observations((*lead, *shape)))
    graphdef, params = puffer_jax.split(policy)
    if plain:
        params, forward = (_rnn if net == "lstm" else _conv)(puffer_jax.state_dict(policy))
    else:
        starts = jnp.asarray(np.random.default_rng(4).random(lead) < 0.05)
        options = {"done": starts} if done else {}

        def forward(params: PyTree, obs: Array) -> PyTree:
            return puffer_jax.merge(graphdef, params).forward(obs, **options)[:2]

    def outputs(params: PyTree, obs: Array) -> dict[str, Array]:
        logits, values = forward(params, obs)
        return {"logits": logits, "values": values.reshape(lead)}

    def arrays(result: PyTree) -> rows.Arrays:
        if not backward:
            return {name: np.asarray(x) for name, x in result.items()}
        loss, grads = result
        # A plain policy's gradients have other names and layouts.
        named = {} if plain else puffer_jax.state_dict(puffer_jax.merge(graphdef, grads))
        named = {f"d {name}": x for name, x in named.items() if not name.startswith("cell.")}
        return {"loss": np.asarray(loss), **named}

    objective = jax.value_and_grad(lambda params, obs: _loss(outputs(params, obs)))
    run = jax.jit(objective if backward else outputs)
    # With `done` it is another function, which the reference lacks.
    return Case(lambda: jax.block_until_ready(run(params, obs)), None if done else arrays)


# --- what users would write without ours --------------------------------------------------------


def _dense(weights: rows.Arrays, name: str) -> rows.Arrays:
    return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}


def _apply(layer: dict[str, Array], x: Array) -> Array:
    return x @ layer["kernel"] + layer["bias"]


def _cell(weights: rows.Arrays, hidden: int) -> tuple[nnx.GraphDef, dict[str, rows.Arrays]]:
    """An `nnx.OptimizedLSTMCell` with these weights, split."""
    graphdef, state = nnx.split(nnx.OptimizedLSTMCell(hidden, hidden, rngs=nnx.Rngs(0)))
    bias = weights["lstm.bias_ih_l0"] + weights["lstm.bias_hh_l0"]
    params = {
        "dense_h": {"kernel": weights["lstm.weight_hh_l0"].T, "bias": bias},
        "dense_i": {"kernel": weights["lstm.weight_ih_l0"].T},
    }
    assert jax.tree.map(np.shape, nnx.to_pure_dict(state)) == jax.tree.map(np.shape, params)
    return graphdef, params


def _heads(weights: rows.Arrays, prefix: str = "policy.") -> dict[str, PyTree]:
    return {
        "encoder": _dense(weights, f"{prefix}encoder.0"),
        "decoder": _dense(weights, f"{prefix}decoder"),
        "value": _dense(weights, f"{prefix}value"),
    }


def _rnn(weights: rows.Arrays) -> tuple[PyTree, Callable[..., PyTree]]:
    """The LSTM policy with `nnx.RNN(nnx.OptimizedLSTMCell)`."""
    graphdef, cell = _cell(weights, weights["lstm.weight_hh_l0"].shape[1])
    params = jax.tree.map(jnp.asarray, _heads(weights) | {"cell": cell})

    def forward(params: PyTree, obs: Array) -> tuple[Array, Array]:
        x = nnx.gelu(_apply(params["encoder"], obs), approximate=False)
        x: Any = nnx.RNN(nnx.merge(graphdef, params["cell"]))(x)
        x = x.reshape(-1, x.shape[-1])
        return _apply(params["decoder"], x), _apply(params["value"], x)

    return params, forward


def _conv(weights: rows.Arrays) -> tuple[PyTree, Callable[..., PyTree]]:
    """NatureCNN with `jax.lax.conv_general_dilated`, channels last."""
    params: dict[str, PyTree] = {
        name: _dense(weights, torch_name)
        for name, torch_name in (("hidden", "network.7"), ("actor", "actor"), ("value", "value_fn"))
    }
    for i in (0, 2, 4):
        kernel = weights[f"network.{i}.weight"].transpose(2, 3, 1, 0)
        params[f"conv{i}"] = {"kernel": kernel, "bias": weights[f"network.{i}.bias"]}
    params = jax.tree.map(jnp.asarray, params)

    def forward(params: PyTree, obs: Array) -> tuple[Array, Array]:
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


# --- learning -----------------------------------------------------------------------------------


def advantage(segments: int, horizon: int) -> Case:
    """`puff_advantage` on arrays that are on the device."""
    stored = rows.experience(segments, horizon)
    names = ("values", "rewards", "terminals")
    arrays = [jnp.asarray(stored[name]) for name in names]
    arrays.append(jnp.asarray(np.exp(stored["logprobs"])))
    hypers = ("gamma", "gae_lambda", "vtrace_rho_clip", "vtrace_c_clip")
    numbers = {name: rows.CONFIG[name] for name in hypers}
    compute = jax.jit(lambda *arrays: ppo.puff_advantage(*arrays, **numbers))
    return Case(
        lambda: compute(*arrays).block_until_ready(), lambda x: {"advantage": np.asarray(x)}
    )


def update(net: str, envs: int) -> Case:
    """One PPO update with a full batch."""
    policy = _policy(net, (4,), 128, 2)
    graphdef, params = puffer_jax.split(policy)
    config = PuffeRLConfig.from_dict(rows.config_of(envs))
    learner = ppo.make_learner(config, config.sizes(envs), policy)
    experience = ppo.Experience(**jax.tree.map(jnp.asarray, rows.experience(envs, 64)))
    state, key = learner.init(params), jax.random.key(0)
    fixed = jax.jit(lambda s, e, i: learner.update(s, e, indices=i)[0].params)
    learned = fixed(state, experience, rows.minibatches(envs))
    run = jax.jit(lambda s, e, k: learner.update(s, e, k)[:2])

    def call() -> PyTree:
        nonlocal state, key
        key, update_key = jax.random.split(key)
        state, losses = jax.block_until_ready(run(state, experience, update_key))
        return losses

    def outputs(_: object) -> rows.Arrays:
        # The weights after an update with fixed minibatches.
        arrays = puffer_jax.state_dict(puffer_jax.merge(graphdef, learned))
        return {name: x for name, x in arrays.items() if not name.startswith("cell.")}

    return Case(call, outputs)


# One worker per core.
_PROCESSES: rows.Arguments = {"backend": vector.Multiprocessing, "local_worker": True}


def trainer(
    net: str, envs: int, native: bool = False, plain: bool = False, processes: bool = False
) -> Case:
    """Epochs of training on CartPole: one on the host, several in one compiled call."""
    policy = _policy(net, (4,), 128, 2)
    steps = 64 * envs
    if not (native or plain):
        creator = puffer_jax.environments.env_creator("CartPole-v1")
        # One half of the environments steps while this process acts on the other.
        turns = _PROCESSES | {"batch_size": envs // 2}
        vecenv = vector.make(creator, num_envs=envs, **turns if processes else {})
        train = puffer_jax.PuffeRL(rows.config_of(envs), vecenv, policy)

        def epoch() -> None:
            train.evaluate()
            train.train()

        return Case(epoch, units=steps)
    epochs = max(1, 512 // envs)
    env = puffer_jax.environments.make("cartpole")
    if plain:
        run = _purejaxrl(env, puffer_jax.state_dict(policy), envs, epochs)
    else:
        config = rows.config_of(envs, total_timesteps=epochs * steps, num_envs=envs)
        run = puffer_jax.make_train(PuffeRLConfig.from_dict(config), env, policy)
    run, key = jax.jit(run), jax.random.key(0)
    return Case(lambda: jax.block_until_ready(run(key)), units=epochs * steps)


def first_update(**arguments: Any) -> Case:
    """A process of its own, from its start to the end of the first call of `trainer`."""
    return rows.in_a_process(__name__, "trainer", arguments)


def trainer_on_devices(net: str, envs: int, count: int) -> Case:
    """Epochs of training on the first `count` devices, one compiled call each."""
    policy, env = _policy(net, (4,), 128, 2), puffer_jax.environments.make("cartpole")
    config, mesh = rows.config_of(envs, num_envs=envs), puffer_jax.mesh(count)
    train = puffer_jax.PuffeRL(config, env, policy, mesh=None if count == 1 else mesh)
    return Case(train.run_epoch, units=64 * envs)


class _Network(NamedTuple):
    """A network as PureJaxRL's users write it.

    Attributes:
        recurrent: whether it has an LSTM.
        params: its parameters.
        zeros: the zero state of all environments; None if it has no state.
        step: (params, state, (observations, start)) -> (state, (log-probabilities, values)).
    """

    recurrent: bool
    params: PyTree
    zeros: PyTree
    step: Callable[..., PyTree]


def _purejaxrl_network(weights: rows.Arrays, envs: int) -> _Network:
    recurrent = "lstm.weight_hh_l0" in weights
    params = _heads(weights, "policy." if recurrent else "")
    graphdef: Any = None
    zeros = None
    if recurrent:
        graphdef, params["cell"] = _cell(weights, 128)
        zeros = jnp.zeros((envs, 128)), jnp.zeros((envs, 128))

    def step(params: PyTree, state: PyTree, x: PyTree) -> PyTree:
        obs, start = x
        hidden = nnx.gelu(_apply(params["encoder"], obs), approximate=False)
        if recurrent:
            state = puffer_jax.reset_where(start, state)
            state, hidden = nnx.merge(graphdef, params["cell"])(state, hidden)
        logprobs = jax.nn.log_softmax(_apply(params["decoder"], hidden))
        return state, (logprobs, _apply(params["value"], hidden)[..., 0])

    return _Network(recurrent, params, zeros, step)


def _purejaxrl_loss(network: _Network, params: PyTree, batch: PyTree) -> Array:
    obs, start, action, logprob, value, advantage, target = batch
    if network.recurrent:
        zero = jax.tree.map(lambda z: z[: obs.shape[1]], network.zeros)
        _, (logprobs, new) = jax.lax.scan(
            lambda s, x: network.step(params, s, x), zero, (obs, start)
        )
    else:
        _, (logprobs, new) = network.step(params, None, (obs, start))
    taken = jnp.take_along_axis(logprobs, action[..., None], -1)[..., 0]
    ratio = jnp.exp(taken - logprob)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy_loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage).mean()
    clipped = value + jnp.clip(new - value, -0.2, 0.2)
    value_loss = jnp.maximum((new - target) ** 2, (clipped - target) ** 2).mean() / 2
    entropy = -(jnp.exp(logprobs) * logprobs).sum(-1).mean()
    return policy_loss + 2 * value_loss - 0.001 * entropy


def _purejaxrl(
    env: Any, weights: rows.Arrays, envs: int, epochs: int, horizon: int = 64
) -> Callable[..., PyTree]:
    """PureJaxRL's training loop, feed-forward or recurrent, as its users write it.

    Minibatches are made of steps, or of whole environments if there is a state.
    """
    network = _purejaxrl_network(weights, envs)
    recurrent, params, zeros, step = network
    loss = functools.partial(_purejaxrl_loss, network)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(5e-3, eps=1e-5))

    def play(carry: PyTree, key: PRNGKeyArray) -> PyTree:
        params, env_state, obs, start, state = carry
        action_key, reset_key = jax.random.split(key)
        state, (logprobs, value) = step(params, state, (obs, start))
        action = jax.random.categorical(action_key, logprobs)
        keys = jax.random.split(reset_key, envs)
        new, new_state, reward, ended, cut, _ = jax.vmap(env.step)(keys, env_state, action)
        fresh, fresh_state = jax.vmap(env.reset)(keys)
        done = ended | cut
        choose = lambda a, b: jnp.where(done.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
        new, new_state = jax.tree.map(choose, (fresh, fresh_state), (new, new_state))
        logprob = jnp.take_along_axis(logprobs, action[:, None], 1)[:, 0]
        stored = obs, start, action, logprob, value, reward, done
        return (params, new_state, new, done, state), stored

    def minibatch(carry: PyTree, batch: PyTree) -> PyTree:
        params, opt_state = carry
        total, grads = jax.value_and_grad(loss)(params, batch)
        change, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, change), opt_state), total

    def epoch(carry: PyTree, key: PRNGKeyArray) -> PyTree:
        params, opt_state, env_state, obs, start = carry
        play_key, shuffle_key = jax.random.split(key)
        played = (params, env_state, obs, start, zeros)
        played, stored = jax.lax.scan(play, played, jax.random.split(play_key, horizon))
        _, env_state, obs, start, state = played
        value, reward, done = stored[4:]
        last = step(params, state, (obs, start))[1][1]

        def backward(carry: PyTree, x: PyTree) -> PyTree:
            advantage, after = carry
            value, reward, done = x
            delta = reward + 0.99 * after * (1 - done) - value
            advantage = delta + 0.99 * 0.95 * (1 - done) * advantage
            return (advantage, value), advantage

        zero = jnp.zeros_like(last)
        _, advantage = jax.lax.scan(backward, (zero, last), (value, reward, done), reverse=True)
        batch = *stored[:5], advantage, advantage + value
        axis = 1 if recurrent else 0
        if not recurrent:
            batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)

        def shuffled(x: Array, order: Array) -> Array:
            x = jnp.take(x, order, axis).reshape(*x.shape[:axis], 4, -1, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        def sweep(carry: PyTree, key: PRNGKeyArray) -> PyTree:
            order = jax.random.permutation(key, batch[0].shape[axis])
            parts = jax.tree.map(lambda x: shuffled(x, order), batch)
            return jax.lax.scan(minibatch, carry, parts)

        keys = jax.random.split(shuffle_key, 4)
        (params, opt_state), losses = jax.lax.scan(sweep, (params, opt_state), keys)
        return (params, opt_state, env_state, obs, start), losses.mean()

    def train(key: PRNGKeyArray) -> PyTree:
        reset_key, key = jax.random.split(key)
        obs, env_state = jax.vmap(env.reset)(jax.random.split(reset_key, envs))
        first = jax.tree.map(jnp.asarray, params)
        carry = first, optimizer.init(first), env_state, obs, jnp.ones(envs, bool)
        return jax.lax.scan(epoch, carry, jax.random.split(key, epochs))

    return train


# --- environments -------------------------------------------------------------------------------


def vecenv(kind: str, backend: str, plain: bool = False) -> Case:
    """Steps per second of `puffer_jax.vector`, or of `gymnasium.vector`."""
    import gymnasium

    from puffer_jax.bench import envs as bench_envs

    creator = functools.partial(bench_envs.make, kind)

    def call() -> float:
        if not plain:
            options = _PROCESSES if backend == "Multiprocessing" else {}
            made = vector.make(creator, num_envs=8, **options)
        elif backend == "Serial":
            made = gymnasium.vector.SyncVectorEnv([creator] * 8)
        else:
            # Forking a process in which JAX runs can deadlock.
            made = gymnasium.vector.AsyncVectorEnv([creator] * 8, context="forkserver")
        with contextlib.closing(made):
            return vector.measure(made, rows.SECONDS)

    return Case(call, rate=True)


def emulation(kind: str) -> Case:
    """Steps of our GymnasiumPufferEnv."""
    from puffer_jax.bench import envs as bench_envs

    env = puffer_jax.emulation.GymnasiumPufferEnv(bench_envs.make(kind))
    return rows.stepping(env)
