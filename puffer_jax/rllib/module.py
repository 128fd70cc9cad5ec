"""A policy as an RLModule of RLlib's new API stack."""

import io
import os
import sys
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree
from ray import cloudpickle
from ray.cloudpickle.cloudpickle import Pickler
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
from ray.rllib.utils.numpy import convert_to_numpy

from puffer_jax.base import spaces
from puffer_jax.base.actions import check_playable
from puffer_jax.nn.distributions import Normal, TanhNormal, at_least_float32
from puffer_jax.nn.params import GraphDef, merge, split
from puffer_jax.nn.sampling import sample_logits
from puffer_jax.policies.protocol import forward_of, is_recurrent
from puffer_jax.policies.stateful import Stateful
from puffer_jax.weights.files import policy_from_checkpoint


class Packed:
    """A policy as bytes, which any pickle takes, and whose text is short in RLlib's configs."""

    def __init__(self, policy: nnx.Module):
        self.name = type(policy).__name__
        with io.BytesIO() as file:
            _Pickler(file).dump(policy)
            self._bytes = file.getvalue()

    def policy(self) -> Any:
        """The policy, a new one each time."""
        return cloudpickle.loads(self._bytes)

    def __repr__(self) -> str:
        return f"<{self.name}, {len(self._bytes):,} bytes>"


class _Pickler(Pickler):
    """Keeps by name what is found by name, which cloudpickle does with functions and classes only.

    An activation that is a `jax.custom_jvp`, say, would take half of JAX along.
    """

    def reducer_override(self, obj: Any) -> Any:
        name = getattr(obj, "__qualname__", None)
        module = sys.modules.get(getattr(obj, "__module__", None) or "")
        if isinstance(name, str) and name != "<lambda>" and getattr(module, name, None) is obj:
            return name
        return super().reducer_override(obj)


def spec(
    policy: nnx.Module | str | os.PathLike[str],
    env: spaces.Env = None,
    *,
    seed: int | None = None,
    max_seq_len: int = 20,
) -> RLModuleSpec:
    """What RLlib builds a `PolicyModule` from, in every process that acts or learns.

        config.rl_module(rl_module_spec=puffer_jax.rllib.spec("model.pt"))

    `configure` does this and the rest that a config needs.

    Args:
        policy: the policy, which is copied into the spec; or a checkpoint of one, read here and now
            by `puffer_jax.policy_from_checkpoint`.
        env: for a checkpoint, the environment it was trained on, where the file does not tell.
        seed: of the sampled actions. None: one from NumPy's global generator, which RLlib seeds in
            each of its workers with `config.debugging(seed=...)` plus the worker's number. With a
            number all runners draw alike, so it is for one runner.
        max_seq_len: steps in a row that a policy with a state learns from.

    Raises:
        ValueError: `max_seq_len` is below 1; or as `policy_from_checkpoint`.
        TypeError: the policy holds other variables than parameters.
    """
    if not isinstance(policy, nnx.Module):
        policy = policy_from_checkpoint(policy, env)
    assert isinstance(policy, nnx.Module)
    split(policy)
    if max_seq_len < 1:
        raise ValueError(f"max_seq_len is {max_seq_len}; expected a positive number")
    options = {"policy": Packed(policy), "seed": seed, "max_seq_len": max_seq_len}
    return RLModuleSpec(module_class=PolicyModule, model_config=options)


class PolicyModule(RLModule):
    """A policy that acts in RLlib's env runners; built by `spec`.

    It is neither torch's nor TensorFlow's: batches come as NumPy arrays (torch's tensors, which
    RLlib makes for a torch module beside it, will do), and what it returns are NumPy arrays.
    Actions are already drawn, so RLlib needs no distribution: its connector `GetActions` leaves
    them as they are.

    `forward_inference` takes the most likely actions and `forward_exploration` samples. Both
    return, with a time axis (batch, 1, ...) where the policy has a state, as RLlib wants it:

    - "actions": in the environment's numbering; those of a Box are the policy's own, not yet
      clipped, and not normalised (RLlib's `normalize_actions` must be off);
    - "action_logp", "vf_preds": float32 (batch,);
    - "action_dist_inputs": float32, the logits (batch, n), of a MultiDiscrete one after another,
      of a `Normal` loc and log(scale) (batch, 2 k); a `TanhNormal`, which RLlib has not, has none;
    - "state_out": the new state by name, (batch, ...), from "state_in".

    Attributes:
        params: the parameters, as `puffer_jax.split` returns them.
        start: what the environment's actions begin with, 0 but for a Discrete that says otherwise.
        max_seq_len: see `spec`.
        key: what the next sampled actions are drawn with, after `jax.random.split`.

    Raises:
        ValueError: the policy was built for other spaces than the environment's; it was not built
            by `spec`; or a batch has another form.
    """

    framework = None  # type: ignore[reportAssignmentType]
    params: dict[str, PyTree]
    start: np.ndarray
    max_seq_len: int
    key: Array

    def setup(self) -> None:
        """Build the policy; called by RLlib."""
        config: Any = self.model_config or {}
        if not isinstance(config.get("policy"), Packed):
            raise ValueError("a PolicyModule is built from a policy: use puffer_jax.rllib.spec")
        policy = config["policy"].policy()
        _check_spaces(policy, self.observation_space, self.action_space)
        self._graphdef, self.params = split(policy)
        self.start = np.asarray(getattr(self.action_space, "start", 0))
        self._zeros = initial_state(policy)
        self.max_seq_len = config.get("max_seq_len", 20)
        seed = config.get("seed")
        self.key = jax.random.key(np.random.randint(2**31) if seed is None else seed)

    @property
    def policy(self) -> Any:
        """The policy with the parameters of now: a new object, to be kept or saved."""
        return merge(self._graphdef, self.params)

    def get_initial_state(self) -> dict[str, np.ndarray]:
        """The state before an episode, by name, without a batch axis; {} without memory."""
        return dict(self._zeros)

    def act(self, batch: Mapping[str, Any], key: Array | None = None) -> dict[str, Any]:
        """One step: the most likely actions, or with a key sampled ones; see the class.

        Args:
            batch: "obs" (batch, *obs), a tree of arrays for a Dict or Tuple; with a state (batch,
                1, *obs) and "state_in".
            key: to sample with.
        """
        observations = convert_to_numpy(batch[Columns.OBS], reduce_type=False)
        state = None
        if self._zeros:
            observations = jax.tree.map(_without_time, observations)
            found: Any = convert_to_numpy(batch[Columns.STATE_IN], reduce_type=False)
            # RLlib narrows whatever it passes on.
            state = {name: np.asarray(found[name], x.dtype) for name, x in self._zeros.items()}
        step = _step(self._graphdef, self.params, observations, state, key)
        action, logprob, inputs, values, state = jax.tree.map(np.asarray, step)
        out = {
            Columns.ACTIONS: action + self.start if self.start.any() else action,
            Columns.ACTION_LOGP: logprob,
            Columns.VF_PREDS: values,
        }
        if inputs is not None:
            out[Columns.ACTION_DIST_INPUTS] = inputs
        if self._zeros:
            out = {name: x[:, None] for name, x in out.items()}
            out[Columns.STATE_OUT] = state
        return out

    def _forward_inference(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return self.act(batch)

    def _forward_exploration(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.key, key = jax.random.split(self.key)
        return self.act(batch, key)

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        raise NotImplementedError(
            "a PolicyModule learns in JAX, by puffer_jax.rllib.PPOLearner (config.training("
            "learner_class=...), or puffer_jax.rllib.configure), not by RLlib's torch learners"
        )

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, PyTree]:
        """The parameters, a nested dict of NumPy arrays, without the key: no two share one."""
        return jax.tree.map(np.asarray, self.params)

    def set_state(self, state: dict[str, PyTree]) -> None:
        """Replace the parameters.

        Raises:
            ValueError: they do not fit the policy; what is missing, extra or mis-shaped is named.
        """
        merge(self._graphdef, state)
        self.params = jax.tree.map(jnp.asarray, state)

    def to(self, device: Any) -> "PolicyModule":
        """Nothing: what RLlib does with torch's modules. JAX acts where it has its default."""
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: what RLlib does with torch's modules. JAX compiles by itself."""


def initial_state(policy: Any) -> dict[str, np.ndarray]:
    """What a policy carries from step to step before an episode, by name, without a batch axis."""
    if not is_recurrent(policy):
        return {}
    # Not "hidden", which `Stateful` adds for those who look, and nobody reads.
    state = policy.core if isinstance(policy, Stateful) else policy
    return {name: np.asarray(x)[0] for name, x in state.initial_state(1).items()}


@partial(jax.jit, static_argnums=0)
def _step(
    graphdef: GraphDef, params: PyTree, observations: PyTree, state: PyTree, key: Array | None
) -> tuple[Array, Array, Array | None, Array, PyTree]:
    """Actions, their log-probabilities, the distribution as RLlib writes it, values, new state."""
    policy = merge(graphdef, params)
    act = forward_of(policy, "forward_eval")
    if state is None:
        logits, values = act(observations)[:2]
    else:
        logits, values, new = act(observations, state)
        state = {name: new[name] for name in state}
    how: dict[str, Any] = {"deterministic": True} if key is None else {"key": key}
    action, logprob, _ = sample_logits(logits, **how)
    return action, logprob, _inputs(logits), at_least_float32(values).reshape(-1), state


def _inputs(logits: PyTree) -> Array | None:
    if isinstance(logits, TanhNormal):
        return None
    if isinstance(logits, Normal):
        loc, scale = jnp.broadcast_arrays(*map(at_least_float32, (logits.loc, logits.scale)))
        return jnp.concatenate([loc, jnp.log(scale)], axis=-1)
    parts = logits if isinstance(logits, tuple | list) else [logits]
    return jnp.concatenate([at_least_float32(x) for x in parts], axis=-1)


def _without_time(x: np.ndarray) -> np.ndarray:
    if np.ndim(x) < 2 or x.shape[1] != 1:
        raise ValueError(
            f"observations of shape {np.shape(x)}; a policy with a state acts on (batch, 1, *obs), "
            "a single step"
        )
    return x[:, 0]


def _check_spaces(policy: Any, observation_space: Any, action_space: Any) -> None:
    check_playable(action_space)
    env = SimpleNamespace(observation_space=observation_space, action_space=action_space)
    expected, found = getattr(policy, "env_spec", None), spaces.env_spec(env)
    if expected is None:  # a policy of the user's own
        return
    name, wrong = type(policy).__name__, []
    if expected.single_action_space != found.single_action_space:
        wrong.append(f"acts in {expected.single_action_space}, not {found.single_action_space}")
    seen, there = expected.single_observation_space, found.single_observation_space
    if seen.sample_dtype is not None:
        wrong.append(
            f"reads the rows of bytes of an emulated environment, and RLlib's runners give it "
            f"{observation_space} itself: save its weights and load them by "
            "puffer_jax.policy_from_checkpoint(path, env), with RLlib's environment"
        )
    elif _layout(seen) is not None and _layout(seen) != _layout(there):
        wrong.append(f"observes {_layout(seen)}, not {_layout(there)}")
    if wrong:
        raise ValueError(f"this {name} was built for another environment: it {' and '.join(wrong)}")


def _layout(observation: spaces.Observation) -> Any:
    """The shape of an array, or the shapes of the leaves; None: not known."""
    if observation.structured is None:
        return observation.shape
    return spaces.leaf_shapes(observation.structured)
