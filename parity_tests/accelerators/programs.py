"""What is compiled for devices: what a policy does, and what a training does, at sizes of use."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

import puffer_jax
from puffer_jax.base.spaces import Box, Discrete
from puffer_jax.environments.jax_native import as_jax_env
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.devices import ALIKE, DIVIDED, share_of
from puffer_jax.ppo.epoch import compiled, specs_of
from puffer_jax.ppo.experience import Experience
from puffer_jax.ppo.jax_rollout import JaxSource
from puffer_jax.ppo.objective import loss
from puffer_jax.ppo.update import make_learner

ENVS, STEPS, HIDDEN = 4096, 64, 128

# What a dtype of the harness means for matrix products, and for the policy.
PRECISIONS = {
    "float32": ("highest", None),
    "tf32": ("tensorfloat32", None),
    "bfloat16": ("default", jnp.bfloat16),
}


class Built(NamedTuple):
    """A program and its arguments, which may be shapes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def build(name: str, precision: str) -> Built:
    """A program by its name, such as "act-lstm" or "epoch-default"."""
    kind, *rest = name.split("-")
    return KINDS[kind](*rest, dtype=PRECISIONS[precision][1])


def policy_of(net: str, dtype: Any) -> Any:
    shape = {"nature": (4, 84, 84), "resnet": (64, 64, 3)}.get(net, (4,))
    images = len(shape) == 3
    kind = np.uint8 if images else np.float32
    space = Box(0, 255, shape, kind) if images else Box(-np.inf, np.inf, shape, kind)
    env: Any = SimpleNamespace(observation_space=space, action_space=Discrete(6 if images else 2))
    env.single_observation_space, env.single_action_space = space, env.action_space
    more: dict[str, Any] = {"rngs": nnx.Rngs(0), "dtype": dtype}
    if net == "nature":
        return puffer_jax.Convolutional(env, framestack=4, flat_size=3136, **more)
    if net == "resnet":
        return puffer_jax.ProcgenResnet(env, **more)
    if net == "mingru":
        return puffer_jax.v4.Policy.for_env(env, hidden_size=HIDDEN, num_layers=4, **more)
    policy = puffer_jax.Default(env, HIDDEN, **more)
    if net == "lstm":
        return puffer_jax.LSTMWrapper(env, policy, HIDDEN, HIDDEN, **more)
    return policy


def _like(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _observations(net: str, *lead: int) -> jax.ShapeDtypeStruct:
    shape = {"nature": (4, 84, 84), "resnet": (64, 64, 3)}.get(net)
    if shape:
        return _like(*lead, *shape, dtype=jnp.uint8)
    return _like(*lead, 4)


def act(net: str, dtype: Any) -> Built:
    """Observations to actions and the next state, as in a step of a rollout on the host."""
    policy = policy_of(net, dtype)
    graphdef, params = puffer_jax.split(policy)
    batch = 256 if net in ("nature", "resnet") else ENVS

    def function(params: Any, observations: Any, state: Any, key: Any) -> Any:
        logits, values, *rest = puffer_jax.merge(graphdef, params).forward_eval(observations, state)
        return *puffer_jax.sample_logits(logits, key=key), values, rest

    state = policy.initial_state(batch) if net in ("lstm", "mingru") else None
    return Built(function, (params, _observations(net, batch), state, jax.random.key(0)))


def gradient(net: str, dtype: Any) -> Built:
    """The loss of a minibatch and its gradients."""
    graphdef, params = puffer_jax.split(policy_of(net, dtype))
    rows, time = (8, 32) if net in ("nature", "resnet") else (ENVS // 4, STEPS)
    numbers = _like(rows, time)
    batch = Experience(
        observations=_observations(net, rows, time),
        actions=_like(rows, time, dtype=jnp.int32),
        logprobs=numbers,
        values=numbers,
        rewards=numbers,
        terminals=numbers,
    )
    hypers = PuffeRLConfig().hypers()

    def function(params: Any, batch: Experience, advantages: Any, weights: Any) -> Any:
        def objective(params: Any) -> Any:
            policy = puffer_jax.merge(graphdef, params)
            return loss(policy, batch, advantages, weights, hypers)

        return jax.value_and_grad(objective, has_aux=True)(params)

    return Built(function, (params, batch, numbers, _like(rows, 1)))


def whole_policy(net: str, dtype: Any) -> Built:
    """The gradient of a policy over 16 steps alone, given that of logits and values."""
    graphdef, params = puffer_jax.split(policy_of(net, dtype))
    observations = _observations(net, 256, 16)

    def results(params: Any, observations: Any) -> Any:
        return puffer_jax.merge(graphdef, params).forward(observations, None)[:2]

    def function(params: Any, observations: Any, cotangents: Any) -> Any:
        return jax.vjp(lambda params: results(params, observations), params)[1](cotangents)

    return Built(function, (params, observations, jax.eval_shape(results, params, observations)))


def _config(dtype: Any, envs: int = ENVS, **more: Any) -> PuffeRLConfig:
    return PuffeRLConfig(
        num_envs=envs,
        bptt_horizon=STEPS,
        batch_size=STEPS * envs,
        minibatch_size=STEPS * envs // 4,
        max_minibatch_size=STEPS * envs // 4,
        precision="float32" if dtype is None else "bfloat16",
        **{"optimizer": "adam", "total_timesteps": 10**9} | more,
    )


def whole_epoch(
    net: str,
    optimizer: str = "adam",
    *,
    dtype: Any,
    envs: int = ENVS,
    devices: Sequence[Any] = (),
) -> Built:
    """An epoch of the trainer on CartPole: rollout and update in one program.

    On several devices each has so many environments.
    """
    mesh = puffer_jax.mesh(devices) if devices else None
    policy, env = policy_of(net, dtype), as_jax_env(puffer_jax.environments.make("cartpole"))
    config = _config(dtype, envs * max(1, len(devices)), optimizer=optimizer)
    share = share_of(mesh)
    source = JaxSource(config, env, policy, share)
    learner = make_learner(config, source.sizes, policy, share)
    params = puffer_jax.split(policy)[1]

    def start(key: Any) -> Any:
        return learner.init(params), JaxSource(config, env, policy).init(key), (key, key)

    arguments = jax.eval_shape(start, jax.random.key(0))
    specs = specs_of(arguments[0])
    function = compiled(source, learner, specs, mesh)["epoch"]
    if mesh is None:
        return Built(function, arguments)

    def placed(x: Any, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    where = jax.tree.broadcast((specs, DIVIDED, ALIKE), arguments)
    return Built(function, jax.tree.map(placed, arguments, where))


def training(net: str, *, dtype: Any, members: int = 0) -> Built:
    """Two epochs by `make_train`; of a population, if it has members."""
    env = puffer_jax.environments.make("cartpole")
    config = _config(dtype, 1024, total_timesteps=2 * STEPS * 1024)
    train = puffer_jax.make_train(config, env, policy_of(net, dtype))
    if not members:
        return Built(train, (jax.random.key(0),))
    rates = {"learning_rate": _like(members)}
    return Built(jax.vmap(train), (jax.random.split(jax.random.key(0), members), rates))


KINDS: dict[str, Callable[..., Built]] = {
    "act": act,
    "policy": whole_policy,
    "gradient": gradient,
    "epoch": whole_epoch,
    "train": training,
    "population": partial(training, members=4),
}
