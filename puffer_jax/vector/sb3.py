"""A vecenv as Stable-Baselines3 takes it."""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from puffer_jax.base.packages import require
from puffer_jax.base.spaces import Space, children_of, kind_of
from puffer_jax.environments.emulation.spaces import gymnasium_space
from puffer_jax.vector import inner, protocol
from puffer_jax.vector.jax_native import JaxVecEnv

require("stable_baselines3", "puffer_jax.sb3", "'puffer_jax[sb3]'")

import gymnasium  # noqa: E402
from stable_baselines3.common import vec_env  # noqa: E402
from stable_baselines3.common.monitor import Monitor  # noqa: E402
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices  # noqa: E402

Observations = np.ndarray | dict[str, np.ndarray]
"""Of all rows: an array (num_envs, ...), or these by name."""


class VecEnv(vec_env.VecEnv):
    """A vecenv of `puffer_jax.vector` behind Stable-Baselines3's interface.

    Every algorithm of Stable-Baselines3, sb3-contrib and SBX takes it as its `env`. A step gives
    what SB3's `DummyVecEnv` of `Monitor`s gives: the next episode's first observation where one
    ended, and in that row's info the "terminal_observation", "TimeLimit.truncated" and "episode",
    with "r", the sum of its float32 rewards, "l", its length, and "t", seconds since this was made.
    What the environment's info says besides is there, too; an "episode" of its own is kept.

    Observations are the environment's own, not emulated bytes: arrays, or for a Dict a dict of
    arrays (`MultiInputPolicy`). SB3 refuses a Tuple and a Dict within another: their parts become
    one flat Dict, named by their path, "camera/left" or "seen/0". Numbers of Discrete spaces that
    start elsewhere start at 0 here, since SB3 ignores `start`. Actions are what the vecenv takes,
    which is SB3's kind, too: a structured action space is a MultiDiscrete; MultiBinary stays.

    Each agent of an environment with several is a row; they must all be present and end together.
    PufferLib's native environments reset themselves and tell no last observation: there is no
    "terminal_observation", and a truncation counts as an end.

    Args:
        vecenv: what `puffer_jax.vector.make` makes, of any backend, or a `JaxVecEnv`, that hands
            out all its environments at once. It belongs to this from now on.

    Attributes:
        vecenv: the vecenv.
        num_envs: rows of a batch: agents.

    Raises:
        ImportError: `stable_baselines3` is missing; when this module is imported.
        TypeError: `vecenv` is another kind of vector environment.
        ValueError: it has several batches (`batch_size`, `num_buffers`); or two parts of a nested
            space have the same path.

    Example:
        >>> import puffer_jax, puffer_jax.sb3
        >>> env = puffer_jax.sb3.VecEnv(puffer_jax.vector.make("CartPole-v1", num_envs=2))
        >>> env.seed(0)
        [0, 1]
        >>> env.reset().shape
        (2, 4)
        >>> observations, rewards, dones, infos = env.step([0, 1])
        >>> rewards.tolist(), dones.tolist(), infos[0]
        ([1.0, 1.0], [False, False], {'TimeLimit.truncated': False})
        >>> env.close()
    """

    def __init__(self, vecenv: Any):
        if not isinstance(vecenv, protocol.VecEnv):
            raise TypeError(
                "puffer_jax.sb3.VecEnv takes what puffer_jax.vector.make makes, or a "
                f"puffer_jax.vector.JaxVecEnv; got {type(vecenv).__module__}."
                f"{type(vecenv).__name__}"
            )
        if vecenv.agents_per_batch != vecenv.num_agents:
            raise ValueError(
                "Stable-Baselines3 steps all environments at once, but this vecenv hands out "
                f"batches of {vecenv.agents_per_batch} of {vecenv.num_agents}: make it without "
                "batch_size and num_buffers"
            )
        self.vecenv: protocol.VecEnv = vecenv
        self._agents = vecenv.num_agents // vecenv.num_environments
        self._names = list(getattr(vecenv.driver_env, "possible_agents", range(self._agents)))
        observation, action = map(self._own_space, ("observation_space", "action_space"))
        self._parts = _parts(observation)
        emulated = vecenv.emulated or {}
        self._structured = emulated.get("emulated_observation_dtype")
        flat = _as_gymnasium(vecenv.single_action_space)
        self._action_dtype = flat.dtype if kind_of(flat) == "box" else np.dtype(np.int32)
        stays = kind_of(action) == "multibinary" and len(action.shape) == 1
        self._began = time.time()
        self._returns = np.zeros(vecenv.num_agents)
        self._lengths = np.zeros(vecenv.num_agents, int)
        super().__init__(
            vecenv.num_agents,
            _joined(observation, self._parts),
            _as_gymnasium(action) if stays else flat,
        )

    def _own_space(self, name: str) -> Space:
        if not self.vecenv.emulated:
            return getattr(self.vecenv, f"single_{name}")
        space = getattr(inner.inner(self.vecenv.driver_env), name)
        # In PettingZoo it is a method.
        return space(self._names[0]) if callable(space) else space

    def reset(self) -> Observations:
        """Start all episodes, with the seeds of `seed` if that was called since the last reset."""
        observations, infos = self.vecenv.reset(self._seeds[0])
        self._reset_seeds()
        self._returns[:], self._lengths[:] = 0, 0
        self.reset_infos = self._by_row(infos)
        return self._read(observations)

    def step_async(self, actions: np.ndarray | Sequence[Any]) -> None:
        """Act, (num_envs, ...), and do not wait for what comes of it."""
        self.vecenv.send(np.asarray(actions).astype(self._action_dtype, copy=False))

    def step_wait(self) -> tuple[Observations, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Wait for what came of the actions.

        Returns:
            (observations, rewards float32, dones bool, infos), each of num_envs.

        Raises:
            ValueError: an agent is absent, or its episode ended before that of the others.
            WorkerError: a worker failed. Everything is closed then.
        """
        obs, rewards, terminals, truncations, told, _, masks = self.vecenv.recv()
        last, rewards, infos = self._read(obs), rewards.copy(), self._by_row(told)
        done, cut = terminals | truncations, truncations & ~terminals
        self._check_agents(done, masks)
        self._returns += rewards
        self._lengths += 1
        first = last
        if not self.vecenv.emulated:
            cut[:] = False  # its last observation is gone, and no value can be taken of the next
        elif done.any():
            first = self._renew(done, cut)
        for info, is_cut in zip(infos, cut.tolist(), strict=True):
            info["TimeLimit.truncated"] = is_cut
        for row in np.flatnonzero(done).tolist():
            if self.vecenv.emulated:
                infos[row]["terminal_observation"] = _row(last, row)
            infos[row].setdefault("episode", self._episode(row))
        return first, rewards, done, infos

    def _renew(self, done: np.ndarray, cut: np.ndarray) -> Observations:
        """The first observations of new episodes; adds what a lost worker cut off to the flags."""
        begun = done.copy()
        while True:
            obs, _, terminals, truncations, told, *_ = self.vecenv.renew()
            for row, info in enumerate(self._by_row(told)):
                if begun[row]:
                    self.reset_infos[row] = info
            begun = terminals | truncations
            if not begun.any():
                return self._read(obs)
            cut |= begun & ~done
            done |= begun

    def _episode(self, row: int) -> dict[str, float]:
        total, length = float(self._returns[row]), int(self._lengths[row])
        self._returns[row], self._lengths[row] = 0, 0
        return {"r": round(total, 6), "l": length, "t": round(time.time() - self._began, 6)}

    def _check_agents(self, done: np.ndarray, masks: np.ndarray) -> None:
        if self._agents == 1:
            return
        present, ended = (x.reshape(-1, self._agents) for x in (masks, done))
        wrong = ~present.all(1)
        if self.vecenv.emulated:
            wrong |= ended.any(1) & ~ended.all(1)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                "Stable-Baselines3 has no rows for absent agents: all agents of an environment "
                f"must be present and end together; in environment {row}, "
                + ", ".join(
                    f"{name} {'has ended' if over else 'goes on' if here else 'is absent'}"
                    for name, over, here in zip(self._names, ended[row], present[row], strict=True)
                )
            )

    def _read(self, rows: np.ndarray) -> Observations:
        """Copies, since the rows will be overwritten."""
        whole = not self._parts[0].path
        if whole and (not self.vecenv.emulated or kind_of(self._parts[0].space) == "box"):
            return rows.copy()
        fields = rows.view([("f0", self._structured)])["f0"][:, 0]
        read = {part.name: part.read(fields) for part in self._parts}
        return read[""] if whole else read

    def _by_row(self, told: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
        """The infos of each row."""
        rows: list[dict[str, Any]] = [{} for _ in range(self.vecenv.num_agents)]
        if isinstance(self.vecenv, JaxVecEnv):
            for info in told:
                for name, values in info.items():
                    if np.ndim(values):
                        for row, value in zip(rows, values, strict=True):
                            row[name] = value
            return rows
        for info, env in zip(told, self.vecenv.info_sources, strict=True):
            own = rows[env * self._agents : (env + 1) * self._agents]
            for name, value in info.items():
                if self._agents > 1 and name in self._names and isinstance(value, Mapping):
                    own[self._names.index(name)].update(value)
                else:
                    own[0][name] = value
        return rows

    def close(self) -> None:
        """Close the vecenv."""
        self.vecenv.close()

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Refuse options for the next reset, which a vecenv does not pass on.

        Raises:
            NotImplementedError: there are any.
        """
        if options and options != [{}] * self.num_envs:
            raise NotImplementedError(
                f"a vecenv of puffer_jax resets without options; got {options}. Give them to the "
                "creator (env_kwargs), or set an attribute (set_attr)"
            )

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the environments, wherever they are; it is pickled on its way.

        Raises:
            AttributeError: there is none of that name; `render_mode` is None then.
            TypeError: it is in another process and cannot be pickled.
        """
        if isinstance(self.vecenv, JaxVecEnv):
            env = self.vecenv.driver_env.env.unwrapped
            value = getattr(env, attr_name, *([None] if attr_name == "render_mode" else []))
            return [value for _ in self._get_indices(indices)]
        return self._apply(partial(inner.get_attribute, name=attr_name), indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the environments.

        Raises:
            NotImplementedError: they are JAX-native.
        """
        self._refuse_functions(f"set_attr({attr_name!r})")
        self._apply(partial(inner.set_attribute, name=attr_name, value=value), indices)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: VecEnvIndices = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        """What a method of the environments returns.

        Raises:
            AttributeError: there is none of that name.
            NotImplementedError: they are JAX-native.
        """
        self._refuse_functions(f"env_method({method_name!r})")
        call = partial(inner.call_method, name=method_name, args=method_args, kwargs=method_kwargs)
        return self._apply(call, indices)

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """Whether the environments are wrapped so; in `Monitor` always, whose part this plays."""
        if wrapper_class is Monitor or isinstance(self.vecenv, JaxVecEnv):
            return [wrapper_class is Monitor for _ in self._get_indices(indices)]
        return self._apply(partial(inner.is_wrapped, wrapper=wrapper_class), indices)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """What the environments draw."""
        return self.env_method("render")

    def _apply(self, function: Any, indices: VecEnvIndices) -> list[Any]:
        return self.vecenv.apply(
            function, [row // self._agents for row in self._get_indices(indices)]
        )

    def _refuse_functions(self, what: str) -> None:
        if isinstance(self.vecenv, JaxVecEnv):
            raise NotImplementedError(
                f"{what}: JAX-native environments are pure functions, compiled once, and have no "
                "methods or attributes of their own"
            )


class _Part(NamedTuple):
    """A part of an observation that has no parts itself.

    Attributes:
        name: its name in a flat Dict; empty if it is the whole observation.
        path: the fields that lead to it in an emulated observation.
        space: gymnasium's space; discrete ones start at 0.
        start: where the environment's own starts.
    """

    name: str
    path: tuple[str, ...]
    space: Any
    start: Any

    def read(self, fields: np.ndarray) -> np.ndarray:
        """A copy of this part of emulated observations."""
        for field in self.path:
            fields = fields[field]
        if np.any(self.start):
            fields = fields - self.start
        return fields.astype(self.space.dtype)


def _parts(space: Space, path: tuple[str, ...] = (), name: str = "") -> list[_Part]:
    children = children_of(space)
    if children is None:
        return [_Part(name, path, _as_gymnasium(space), getattr(space, "start", 0))]
    own = children if kind_of(space) == "dict" else map(str, range(len(children)))
    parts = [
        part
        for label, (field, child) in zip(own, children.items(), strict=True)
        for part in _parts(child, (*path, field), f"{name}/{label}" if name else label)
    ]
    names = [part.name for part in parts]
    if len({*names}) < len(names):
        raise ValueError(f"{space}: several parts have the same path, of {', '.join(names)}")
    return parts


def _joined(space: Space, parts: list[_Part]) -> Any:
    """The space of what is handed out."""
    if children_of(space) is None:
        return parts[0].space
    # gymnasium would sort a plain dict.
    return gymnasium.spaces.Dict(OrderedDict((part.name, part.space) for part in parts))


def _as_gymnasium(space: Space) -> Any:
    """The space itself if it is gymnasium's and starts at 0, otherwise one that is and does."""
    starts_at_0 = not np.any(getattr(space, "start", 0))
    return space if isinstance(space, gymnasium.Space) and starts_at_0 else gymnasium_space(space)


def _row(observations: Observations, row: int) -> Any:
    if isinstance(observations, dict):
        return {name: values[row].copy() for name, values in observations.items()}
    return observations[row].copy()
