"""JAX-native environments behind the protocol."""

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from puffer_jax.base.spaces import kind_of
from puffer_jax.environments.emulation.spaces import (
    emulate_observation_space,
    gymnasium_space,
)
from puffer_jax.vector.envs import WRITTEN, AgentLayout, Env, Info
from puffer_jax.vector.protocol import AgentBatch, VecEnv

# A JAX array or a tree of them; nothing here may import JAX for the sake of a type.
Tree = Any


class JaxVecEnv(VecEnv):
    """Copies of a JAX-native environment behind the protocol; a step is one dispatch.

    For loops that are not compiled as a whole: `puffer_jax.PuffeRL` compiles rollout and update
    together if it gets the environment itself. Like an emulated environment, it ends an episode
    with its last observation, and packs structured ones.

    Args:
        env: as for `puffer_jax.as_jax_env`.
        num_envs: number of copies.
        seed: seed of the first copy, as for `make`.
        reset_ratio: see `PuffeRLConfig`.

    Example:
        >>> import puffer_jax
        >>> env = puffer_jax.environments.make("cartpole")
        >>> with puffer_jax.vector.JaxVecEnv(env, num_envs=4) as vecenv:
        ...     obs, infos = vecenv.reset(seed=0)
        >>> obs.shape
        (4, 4)
    """

    def __init__(self, env: Any, num_envs: int, seed: int = 0, reset_ratio: int | None = None):
        import jax
        import jax.numpy as jnp

        from puffer_jax.environments.jax_native import as_jax_env
        from puffer_jax.environments.resets import begin_where, resets_of

        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1; got {num_envs}")
        count = resets_of(num_envs, 1 if reset_ratio is None else reset_ratio)
        env = as_jax_env(env)
        if env.num_agents is not None:
            raise ValueError(
                f"JaxVecEnv is for one agent, and {type(env.unwrapped).__name__} has several: give "
                "puffer_jax.PuffeRL the environment itself"
            )
        space, structured = emulate_observation_space(gymnasium_space(env.observation_space))
        emulated = {"observation_dtype": space.dtype, "emulated_observation_dtype": structured}
        layout = AgentLayout(space, gymnasium_space(env.action_space), 1, emulated=True)
        driver = SimpleNamespace(
            single_observation_space=layout.observation_space,
            single_action_space=layout.action_space,
            num_agents=1,
            emulated=emulated,
            env=env,
        )
        super().__init__(driver, layout, num_envs, num_envs)
        self._buffers = layout.buffers(num_envs)
        self._buffers["masks"][:] = True
        flat = self._buffers["observations"]
        is_box = kind_of(env.observation_space) == "box"
        self._fields = flat if is_box else flat.view([("f0", structured)])["f0"][:, 0]
        self._infos: list[Info] = []
        # The environment's own actions may start elsewhere; those of a vecenv start at 0.
        self._first_action = np.asarray(getattr(env.action_space, "start", 0), self._action.base)

        @jax.jit
        def begin(keys: Tree) -> tuple[Tree, Tree, Tree]:
            keys = jax.vmap(jax.random.split)(keys)
            obs, state = jax.vmap(env.reset)(keys[:, 1])
            return keys[:, 0], state, obs

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(keys: Tree, state: Tree, over: Tree, action: Tree) -> tuple[Tree, ...]:
            keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
            obs, new, reward, terminated, truncated, info = jax.vmap(env.step)(
                keys[:, 1], state, action
            )
            obs, new = begin_where(over, env.reset, keys[:, 2], (obs, new), count)
            ends = (terminated & ~over, truncated & ~over)
            return keys[:, 0], new, obs, jnp.where(over, 0, reward), *ends, info

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def renew(keys: Tree, state: Tree, obs: Tree, over: Tree) -> tuple[Tree, Tree, Tree]:
            keys = jax.vmap(jax.random.split)(keys)
            obs, state = begin_where(over, env.reset, keys[:, 1], (obs, state), count)
            return keys[:, 0], state, obs

        self._begin, self._step, self._restart = begin, step, renew
        self._seeded = jax.jit(jax.vmap(jax.random.key))
        self._keys, self._env_state = self._seeded(np.arange(seed, seed + num_envs)), None
        self._obs: Tree = None

    def _reset(self, seed: int | None) -> None:
        if seed is not None:
            self._keys = self._seeded(np.arange(seed, seed + self.num_agents))
        self._keys, self._env_state, obs = self._begin(self._keys)
        self._keep(obs, 0, False, False, {})

    def _send(self, actions: np.ndarray) -> None:
        over = self._buffers["terminals"] | self._buffers["truncations"]
        actions = self._first_action + actions.astype(self._action.base, copy=False)
        self._keys, self._env_state, *kept = self._step(self._keys, self._env_state, over, actions)
        self._keep(*kept)

    def _keep(
        self, obs: Tree, reward: Tree, terminated: Tree, truncated: Tree, info: dict[str, Tree]
    ) -> None:
        self._obs = obs
        _fill(self._fields, obs)
        for name, value in zip(WRITTEN[1:4], (reward, terminated, truncated), strict=True):
            self._buffers[name][:] = value
        self._infos = [{name: np.asarray(value) for name, value in info.items()}] if info else []

    def _recv(self) -> AgentBatch:
        obs, rewards, terminals, truncations, masks = (self._buffers[n] for n in WRITTEN)
        return obs, rewards, terminals, truncations, self._infos, self.agent_ids, masks

    def _renew(self) -> AgentBatch:
        over = self._buffers["terminals"] | self._buffers["truncations"]
        if over.any():
            begun = self._restart(self._keys, self._env_state, self._obs, over)
            self._keys, self._env_state, obs = begun
            rewards = np.where(over, 0, self._buffers["rewards"])
            # None of the environments has a flag now: those that had one have begun again.
            self._keep(obs, rewards, False, False, {})
        self._infos = []
        return self._recv()

    def _apply(
        self, function: Callable[[Env], Any], numbers: Sequence[int]
    ) -> list[tuple[bool, Any]]:
        raise TypeError(
            "the environments of a JaxVecEnv are no objects but one pure function, "
            "`driver_env.env`: there is nothing to apply to each"
        )

    def _notify(self) -> None:
        """Do nothing: pure functions have no use for it."""

    def _close(self) -> None:
        """Do nothing: pure functions hold no resources."""


def _fill(fields: np.ndarray, tree: Tree) -> None:
    """Copy a tree of arrays into those of a structured dtype."""
    if isinstance(tree, dict | tuple):
        named = tree if isinstance(tree, dict) else {f"f{i}": x for i, x in enumerate(tree)}
        for name, value in named.items():
            _fill(fields[name], value)
    else:
        fields[...] = tree
