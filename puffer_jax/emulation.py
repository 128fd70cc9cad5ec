"""Any environment behind flat arrays, so that vecenvs and policies see one kind of environment.

What `pufferlib.emulation` does, with its names, layouts and protocol, so that the environments of
either serve in the vecenvs of both. A nested observation becomes a row of numbers, which
`puffer_jax.nativize` reads; a nested action comes from a MultiDiscrete. The way from one to the
other is laid out once, when the environment is made. An episode that ended is begun anew by
whoever calls `reset`: a vecenv does so in the next step.

Every observation must have the shape and the dtype of its space, which NumPy would else broadcast
and cast without a word; that it lies within bounds is checked for the first of each agent only,
and so are the actions.

Neither JAX nor torch is imported here: workers run this.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from puffer_jax.base.spaces import children_of, emulated_dtypes, kind_of

Buffers = Mapping[str, np.ndarray]


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(
            "environments need gymnasium: pip install 'puffer_jax[vector]'"
        ) from error
    return gymnasium


def emulate_observation_space(space: Any) -> tuple[Any, np.dtype]:
    """The Box of the rows that stand for observations of `space`, and the struct in a row.

    Returns:
        (`space` itself if it is a Box, else a flat Box; the dtype of one observation).

    Raises:
        TypeError: a space that is not supported.
        ValueError: a Dict or Tuple without parts or with keys that cannot name a field.
    """
    sample, structured = emulated_dtypes(space)
    if kind_of(space) == "box":
        return space, structured
    if sample.kind == "b":
        low, high = False, True
    else:
        # gymnasium warns of the bounds of float64.
        floats = sample if sample.itemsize < 4 else np.float32
        info = np.iinfo(sample) if sample.kind in "iu" else np.finfo(floats)
        kind = int if sample.kind in "iu" else float
        low, high = kind(info.min), kind(info.max)
    shape = (structured.itemsize // sample.itemsize,)
    return _gymnasium().spaces.Box(low, high, shape, sample), structured


def emulate_action_space(space: Any) -> tuple[Any, Callable[[list[int]], Any] | None]:
    """The flat space of actions that stand for those of `space`, and how to build the latter.

    Unlike the reference, parts may be MultiDiscrete and MultiBinary, and a Discrete or
    MultiDiscrete may start elsewhere than at 0: the flat actions always do start there.

    Returns:
        (`space` itself, None) for a Box, and for what a policy acts in as it is; else a Discrete
        or MultiDiscrete, and a function of the list of its components.

    Raises:
        TypeError: a space that is not supported.
        ValueError: a Box within a Dict or Tuple; and as `emulate_observation_space`.
    """
    kind = kind_of(space)
    starts_at_0 = not np.any(getattr(space, "start", 0))
    flat = kind == "discrete" or (kind == "multidiscrete" and np.ndim(space.nvec) == 1)
    if kind == "box" or (flat and starts_at_0):
        return space, None
    sizes: list[int] = []
    build = _builder(space, sizes)
    spaces = _gymnasium().spaces
    return spaces.Discrete(sizes[0]) if kind == "discrete" else spaces.MultiDiscrete(sizes), build


def _builder(space: Any, sizes: list[int]) -> Callable[[list[int]], Any]:
    """How to build an action of `space` from components, whose sizes are appended to `sizes`."""
    children = children_of(space)
    if children is not None:
        parts = [(key, _builder(child, sizes)) for key, child in children.items()]
        if isinstance(space.spaces, Mapping):
            return lambda flat: {key: part(flat) for key, part in parts}
        return lambda flat: tuple([part(flat) for _, part in parts])
    first, start = len(sizes), getattr(space, "start", 0)
    match kind_of(space):
        case "discrete":
            sizes.append(int(space.n))
            start = int(start)
            return lambda flat: start + flat[first]
        case "multidiscrete":
            nvec = np.asarray(space.nvec)
        case "multibinary":
            nvec = np.full(space.shape, 2)
        case _:
            raise ValueError(f"a nested action space cannot hold {space}, only discrete ones")
    sizes.extend(nvec.ravel().tolist())
    last, shape, dtype = len(sizes), nvec.shape, space.dtype
    return lambda flat: np.array(flat[first:last], dtype).reshape(shape) + start


def joint_space(space: Any, n: int) -> Any:
    """The space of `n` agents side by side (`pufferlib.spaces.joint_space`).

    Raises:
        ValueError: `space` is not Discrete, MultiDiscrete or Box.
    """
    spaces = _gymnasium().spaces
    match kind_of(space):
        case "discrete":
            return spaces.MultiDiscrete([space.n] * n)
        case "multidiscrete":
            low, high = np.zeros_like(space.nvec), space.nvec - 1
        case "box":
            low, high = space.low, space.high
        case _:
            raise ValueError(f"agents act and observe in Discrete, MultiDiscrete or Box: {space}")
    low, high = (np.repeat(bound[None], n, axis=0) for bound in (low, high))
    return spaces.Box(low, high, dtype=space.dtype)


def set_buffers(env: Any, buf: Buffers | None = None) -> None:
    """Give `env` the arrays that it and its vecenv share (`pufferlib.set_buffers`).

    Args:
        env: has `single_observation_space`, `single_action_space`, `num_agents`; gets
            `observations` (agents, *shape), `rewards` float32, `terminals`, `truncations`, `masks`
            bool (agents,), `actions` and `teacher_actions` (agents, *shape), int32 unless a Box.
        buf: these by name, "teacher_actions" optional; None: new ones, zeros, all masks True.
    """
    agents, space = env.num_agents, env.single_action_space
    if buf is None:
        observation = env.single_observation_space
        dtype = space.dtype if kind_of(space) == "box" else np.int32
        buf = {
            "observations": np.zeros((agents, *observation.shape), observation.dtype),
            "rewards": np.zeros(agents, np.float32),
            "terminals": np.zeros(agents, bool),
            "truncations": np.zeros(agents, bool),
            "masks": np.ones(agents, bool),
            "actions": np.zeros((agents, *space.shape), dtype),
        }
    for name in ("observations", "rewards", "terminals", "truncations", "masks", "actions"):
        setattr(env, name, buf[name])
    teacher = buf.get("teacher_actions")
    env.teacher_actions = np.zeros_like(env.actions) if teacher is None else teacher


class _Leaf:
    """A space without parts, and whether NumPy can store a value there as it is."""

    def __init__(self, space: Any):
        self.space = space
        self.dtype = np.dtype(getattr(space, "dtype", None) or np.int32)
        self._start, self._size = getattr(space, "start", 0), None
        match kind_of(space):
            case "discrete":
                self._size, self.shape = int(space.n), ()
            case "multidiscrete":
                self._size, self.shape = np.asarray(space.nvec), np.shape(space.nvec)
            case "multibinary":
                self._size, self.shape = 2, tuple(space.shape)
            case _:
                self.shape = tuple(space.shape)
        if self._size is not None and np.any(self._start + self._size > 2**31):
            raise ValueError(f"{space} does not fit in int32, as which it is stored")

    def takes(self, value: Any, first: bool) -> bool:
        """Whether `value` has the shape and a dtype of the space and, if discrete, its range.

        Args:
            value: also a number or a list.
            first: look at the bounds of a Box as well.
        """
        if self._size is not None and not self.shape and isinstance(value, int | np.integer):
            return bool(0 <= value - self._start < self._size)
        array = np.asarray(value)
        if array.shape != self.shape:
            return False
        if self._size is not None:
            offset = array - self._start
            return array.dtype.kind in "biu" and bool(np.all((offset >= 0) & (offset < self._size)))
        casting = "safe" if hasattr(value, "dtype") else "same_kind"
        if not np.can_cast(array.dtype, self.dtype, casting):
            return False
        within = not first or (array >= self.space.low) & (array <= self.space.high)
        return bool(np.all(within))


class _Writer:
    """Writes observations into the rows of a buffer.

    An observation is taken apart by two flat lists: of its containers, each found by its key in
    one that was found before, and of its leaves, each with the part of a row that it is copied to.
    The outermost container is a tuple around the observation, so that a leaf is found as any other.
    """

    def __init__(self, env: Any, space: Any, observations: np.ndarray, structured: np.dtype):
        self._env, self._space = env, space
        self._containers: list[tuple[int, Any, int]] = []
        self._unseen = set(range(len(observations)))  # rows that nothing was written to
        found: list[tuple[int, Any, np.ndarray, _Leaf]] = []
        if kind_of(space) == "box":
            rows = observations
        else:
            rows = observations.view([("f0", structured)])["f0"][:, 0]
        self._find(space, 0, 0, rows, found)
        self._leaves = [
            [
                (p, key, leaf.dtype, leaf.shape, field[row, ...], leaf)
                for p, key, field, leaf in found
            ]
            for row in range(len(observations))
        ]
        # Of an observation without parts: dtype, shape, and where each row lies.
        self._only = [leaves[0][2:5] for leaves in self._leaves] if not self._containers else []

    def _find(self, space: Any, parent: int, key: Any, field: np.ndarray, found: list) -> None:
        children = children_of(space)
        if children is None:
            found.append((parent, key, field, _Leaf(space)))
            return
        self._containers.append((parent, key, len(children)))
        here, is_dict = len(self._containers), isinstance(space.spaces, Mapping)
        for i, (name, child) in enumerate(children.items()):
            self._find(child, here, name if is_dict else i, field[name], found)

    def write(self, row: int, observation: Any) -> None:
        """Copy the observation to its row.

        Raises:
            ValueError: it is not in its space.
        """
        array = np.ndarray
        if self._only and not self._unseen:
            dtype, shape, place = self._only[row]
            if (
                type(observation) is array
                and observation.dtype is dtype
                and observation.shape == shape
            ):
                place[()] = observation
                return
        parts: list[Any] = [(observation,)]
        first = bool(self._unseen) and row in self._unseen
        try:
            for parent, key, size in self._containers:
                part = parts[parent][key]
                if len(part) != size:
                    raise ValueError(f"{len(part)} parts instead of {size}")
                parts.append(part)
            for parent, key, dtype, shape, place, leaf in self._leaves[row]:
                value = parts[parent][key]
                exact = type(value) is array and value.dtype == dtype and value.shape == shape
                if (first or not exact) and not leaf.takes(value, first):
                    raise ValueError(f"{_form(value)} instead of {leaf.space}")
                place[()] = value
        except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{self._env}: an observation is not in {self._space} ({error}): "
                + _describe(observation)
            ) from error
        if first:
            self._unseen.remove(row)


class _Reader:
    """Makes the environment's own actions out of flat ones.

    Unlike in the reference, which reads nested int64 actions as pairs of int32, flattens a Box of
    two dimensions, and hands out views of a buffer that the vecenv writes to again.
    """

    def __init__(self, env: Any, flat: Any, build: Callable[[list[int]], Any] | None):
        self._env, self._space, self._kind = env, flat, kind_of(flat)
        self._shape = shape = tuple(flat.shape)
        self._shapes = ((1, *shape), shape)
        self._dtype = dtype = np.dtype(flat.dtype if self._kind == "box" else np.int32)
        self._checked = False
        # An array found in order: vecenvs hand out the same one again and again.
        self._known, self._is_one = np.empty(0), False
        self._scalar = self._kind == "discrete" and build is None
        self._own: Callable[[Any], Any]  # of an array that is in order
        if build is not None:
            self._own = lambda array: build(array.ravel().tolist())
        elif self._scalar:
            self._own = lambda array: array[0] if array.ndim else array[()]
        else:
            self._own = lambda array: array.reshape(shape).astype(dtype)

    def read(self, action: Any) -> Any:
        """The action of one agent, which is the environment's to keep.

        Args:
            action: an array or what becomes one, also with a leading axis of 1.

        Raises:
            ValueError: it has another shape or a dtype that needs rounding; or it is the first one
                and out of bounds.
        """
        if action is self._known:
            return action[0] if self._is_one else self._own(action)
        array = np.asarray(action)
        if array.shape not in self._shapes:
            raise self._outside(action)
        if not self._checked or array.dtype != self._dtype:
            self._check(array, action)
        if array is action:
            self._known, self._is_one = array, self._scalar and array.ndim == 1
        return self._own(array)

    def read_all(self, actions: np.ndarray) -> list[Any]:
        """The same of several agents, (agents, *shape)."""
        if actions.shape[1:] != self._shape:
            raise self._outside(actions)
        if not self._checked or actions.dtype != self._dtype:
            self._check(actions, actions)
        return list(actions) if self._scalar else [self._own(action) for action in actions]

    def _check(self, array: np.ndarray, action: Any) -> None:
        if not np.can_cast(array.dtype, self._dtype, "same_kind"):
            raise self._outside(action)
        if not self._checked:
            match self._kind:
                case "discrete":
                    low, high = 0, self._space.n - 1
                case "multidiscrete":
                    low, high = 0, self._space.nvec - 1
                case _:
                    low, high = self._space.low, self._space.high
            if not np.all((low <= array) & (array <= high)):
                raise self._outside(action)
            self._checked = True

    def _outside(self, action: Any) -> ValueError:
        return ValueError(f"{self._env}: an action is not in {self._space}: {_describe(action)}")


def _form(value: Any) -> str:
    """The shapes and dtypes in a value."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_form(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_form, value)) + ")"
    if hasattr(value, "dtype"):
        return f"{value.dtype} of shape {value.shape}"
    return type(value).__name__


def _describe(value: Any) -> str:
    """Its form, and its beginning."""
    return f"{_form(value)}, {value!r:.200}"


class _Emulated:
    """What the environments of one and of several agents have in common."""

    single_observation_space: Any
    single_action_space: Any
    observations: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray
    truncations: np.ndarray
    masks: np.ndarray
    actions: np.ndarray
    teacher_actions: np.ndarray

    def __init__(
        self, env: Any, spaces: tuple[Any, Any], agents: int, buf: Buffers | None, seed: int | None
    ):
        self.env = env
        self.num_agents = agents
        self.agent_ids = np.arange(agents)
        self.initialized = False
        self._seed = seed
        try:
            self.single_observation_space, structured = emulate_observation_space(spaces[0])
            self.single_action_space, build = emulate_action_space(spaces[1])
            self.emulated = {
                "observation_dtype": self.single_observation_space.dtype,
                "emulated_observation_dtype": structured,
            }
            set_buffers(self, buf)
            self._write = _Writer(env, spaces[0], self.observations, structured).write
        except (TypeError, ValueError) as error:
            raise type(error)(f"{env}: {error}") from error
        self._reader = _Reader(env, self.single_action_space, build)
        self.is_obs_emulated = self.single_observation_space is not spaces[0]
        self.is_atn_emulated = build is not None

    @property
    def render_mode(self) -> Any:
        """That of the environment."""
        return self.env.render_mode

    @property
    def metadata(self) -> Mapping[str, Any]:
        """That of the environment."""
        return getattr(self.env, "metadata", None) or {"render_modes": []}

    def seed(self, seed: int | None) -> None:
        """Seed of the next reset, if that gets none."""
        self._seed = seed

    def render(self) -> Any:
        """What the environment draws."""
        return self.env.render()

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _reset(self, seed: int | None, options: Any) -> tuple[Any, Any]:
        seed, self._seed = self._seed if seed is None else seed, None
        given = {"seed": seed, "options": options}
        self.initialized = True
        # Environments may tell a seed of None from none at all.
        return self.env.reset(**{name: v for name, v in given.items() if v is not None})

    def _check_running(self, done: bool) -> None:
        if not self.initialized:
            raise RuntimeError(f"{self.env}: step() before reset()")
        if done:
            raise RuntimeError(f"{self.env}: step() after the episode's end; call reset()")


class GymnasiumPufferEnv(_Emulated):
    """A gymnasium environment behind flat arrays: one agent.

    Attributes:
        env: the environment.
        observation_space: `single_observation_space`, the Box of a row of `observations`.
        action_space: `single_action_space`, what `step` takes.
        emulated: what `puffer_jax.nativize_dtype` reads.
        done: whether `reset` is due.
        observations, rewards, terminals, truncations, masks, actions, teacher_actions: see
            `set_buffers`; written in place.
    """

    def __init__(
        self,
        env: Any = None,
        env_creator: Any = None,
        env_args: Sequence[Any] | None = (),
        env_kwargs: Mapping[str, Any] | None = None,
        buf: Buffers | None = None,
        seed: int | None = 0,
    ):
        """Make the environment, if it is not made, and lay out the way to the buffers.

        Args:
            env: an environment, or an id for `gymnasium.make`.
            env_creator: or a function of `env_args` and `env_kwargs` that gives one, or an id.
            env_args: see there.
            env_kwargs: see there.
            buf: the buffers, see `set_buffers`.
            seed: of the first reset, if that gets none. (The reference ignores it.)

        Raises:
            TypeError: `env_creator` is not callable, `env` is; or an unsupported space.
            ValueError: both or neither of `env` and `env_creator`; or a space that cannot be laid
                out.
        """
        if isinstance(env, str):
            env, env_creator = None, env if env_creator is None else env_creator
        if isinstance(env_creator, str):
            env_creator = partial(_gymnasium().make, env_creator)
        env = _make(env, env_creator, env_args, env_kwargs)
        super().__init__(env, (env.observation_space, env.action_space), 1, buf, seed)
        self.observation_space = self.single_observation_space
        self.action_space = self.single_action_space
        self.done = True

    @property
    def unwrapped(self) -> Any:
        """This; below it the spaces are others."""
        return self

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, Any]:
        """Begin an episode.

        Returns:
            (`observations` (1, *shape), info).

        Raises:
            ValueError: the observation is not in its space.
        """
        observation, info = self._reset(seed, options)
        self._write(0, observation)
        self.done = False
        self.rewards[0], self.terminals[0], self.truncations[0] = 0, False, False
        self.masks[0] = True
        return self.observations, info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Any]:
        """Act.

        Args:
            action: of `action_space`, also with a leading axis of 1.

        Returns:
            (`observations`, reward, terminated, truncated, info). Rewards of several agents are
            added up, and the episode ends when it does for any of them.

        Raises:
            RuntimeError: there is no running episode.
            ValueError: the action or the observation is not in its space.
        """
        if self.done:
            self._check_running(True)
        observation, reward, terminated, truncated, info = self.env.step(self._reader.read(action))
        if type(reward) is not float:
            reward = float(np.sum(reward) if isinstance(reward, _MANY) else reward)
        if type(terminated) is not bool:
            terminated = bool(np.any(terminated))
        if type(truncated) is not bool:
            truncated = bool(np.any(truncated))
        self._write(0, observation)
        self.rewards[0] = reward
        if terminated or truncated:  # both are False since the reset
            self.terminals[0], self.truncations[0], self.done = terminated, truncated, True
        return self.observations, reward, terminated, truncated, info


class PettingZooPufferEnv(_Emulated):
    """A PettingZoo environment behind flat arrays: a row for each possible agent.

    An agent that is not there has a row of zeros, which is masked; unlike the reference's, also
    after a reset.

    Attributes:
        env: the parallel environment.
        emulated: what `puffer_jax.nativize_dtype` reads.
        mask: agent -> whether it is there.
        observations, rewards, terminals, truncations, masks, actions, teacher_actions: see
            `set_buffers`; written in place.
    """

    def __init__(
        self,
        env: Any = None,
        env_creator: Any = None,
        env_args: Sequence[Any] | None = (),
        env_kwargs: Mapping[str, Any] | None = None,
        buf: Buffers | None = None,
        seed: int | None = 0,
    ):
        """Make the environment, if it is not made, and lay out the way to the buffers.

        Args:
            env: a parallel environment; one in which agents take turns (AEC) goes through
                PettingZoo's own converter.
            env_creator: or a function of `env_args` and `env_kwargs` that gives one.
            env_args: see there.
            env_kwargs: see there.
            buf: the buffers, see `set_buffers`.
            seed: of the first reset, if that gets none. (The reference ignores it.)

        Raises:
            TypeError: `env_creator` is not callable, `env` is; or an unsupported space.
            ValueError: both or neither of `env` and `env_creator`; a space that cannot be laid
                out, or that is not the same for all agents.
        """
        env = _parallel(_make(env, env_creator, env_args, env_kwargs))
        agents = list(env.possible_agents)
        spaces = env.observation_space(agents[0]), env.action_space(agents[0])
        for agent in agents[1:]:
            for first, own in zip(
                spaces, (env.observation_space(agent), env.action_space(agent)), strict=True
            ):
                if own != first:
                    raise ValueError(
                        f"{env}: all agents must have the same spaces; {agents[0]!r} has {first}, "
                        f"{agent!r} {own}"
                    )
        super().__init__(env, spaces, len(agents), buf, seed)
        self.possible_agents = agents
        self.mask = dict.fromkeys(agents, False)
        self._rows = {agent: self.observations[i] for i, agent in enumerate(agents)}
        self._over = True

    @property
    def agents(self) -> list[Any]:
        """Those that are there."""
        return self.env.agents

    @property
    def done(self) -> bool:
        """Whether `reset` is due."""
        return self._over or not self.env.agents

    def observation_space(self, agent: Any) -> Any:
        """`single_observation_space`; raises ValueError if there is no such agent."""
        self._check_agents((agent,))
        return self.single_observation_space

    def action_space(self, agent: Any) -> Any:
        """`single_action_space`; raises ValueError if there is no such agent."""
        self._check_agents((agent,))
        return self.single_action_space

    def reset(
        self, seed: int | None = None, options: Any = None
    ) -> tuple[dict[Any, np.ndarray], Any]:
        """Begin an episode.

        Returns:
            (agent -> its row of `observations`, infos).

        Raises:
            ValueError: an observation is not in its space, or of an agent there is none of.
        """
        observations, infos = self._reset(seed, options)
        no = dict.fromkeys(observations, False)
        self._receive(observations, no, no, no)
        self.terminals[:] = False
        self._over = False
        return self._rows, infos

    def step(self, actions: Mapping[Any, Any] | np.ndarray) -> tuple[Mapping[Any, Any], ...]:
        """Act.

        Args:
            actions: (agents, ...) in the order of `possible_agents`, or by agent. Those of agents
                that are not there are left out.

        Returns:
            (observations, rewards, terminated, truncated, infos), dicts by agent; the first four
            have all possible agents.

        Raises:
            RuntimeError: there is no running episode.
            ValueError: an action or observation is not in its space, or of an agent there is none
                of.
        """
        self._check_running(self.done)
        here = set(self.env.agents)
        if not isinstance(actions, np.ndarray):
            self._check_agents(actions)
            own = {a: self._reader.read(action) for a, action in actions.items() if a in here}
        elif len(actions) == self.num_agents:
            read = self._reader.read_all(actions)
            own = {a: x for a, x in zip(self.possible_agents, read, strict=True) if a in here}
        else:
            raise ValueError(f"{self.env}: {len(actions)} actions for {self.num_agents} agents")
        observations, rewards, terminated, truncated, infos = self.env.step(own)
        self._receive(observations, rewards, terminated, truncated)
        self._over = all(terminated.values()) or all(truncated.values())
        padded = self._pad(rewards, 0), self._pad(terminated, True), self._pad(truncated, False)
        return self._rows, *padded, infos

    def _pad(self, values: Mapping[Any, Any], absent: Any) -> Mapping[Any, Any]:
        if values.keys() == self.mask.keys():
            return values
        return {agent: values.get(agent, absent) for agent in self.possible_agents}

    def _receive(
        self,
        observations: Mapping[Any, Any],
        rewards: Mapping[Any, Any],
        terminated: Mapping[Any, Any],
        truncated: Mapping[Any, Any],
    ) -> None:
        """Write the rows of the agents that are observed, and zeros for those that are not."""
        count, mask, write = 0, self.mask, self._write
        for i, agent in enumerate(self.possible_agents):
            here = agent in observations
            mask[agent] = self.masks[i] = here
            if here:
                count += 1
                write(i, observations[agent])
                self.rewards[i] = rewards[agent]
                self.terminals[i] = terminated[agent]
                self.truncations[i] = truncated[agent]
            else:
                self.observations[i] = 0
                self.rewards[i], self.terminals[i], self.truncations[i] = 0, True, False
        if count != len(observations):
            self._check_agents(observations)

    def _check_agents(self, agents: Any) -> None:
        unknown = [agent for agent in agents if agent not in self.mask]
        if unknown:
            raise ValueError(f"{self.env}: no agents {unknown}; there are {self.possible_agents}")


_MANY = (np.ndarray, list, tuple)


def _make(
    env: Any,
    creator: Any,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> Any:
    if (env is None) == (creator is None):
        raise ValueError(f"give either env or env_creator, got {env!r} and {creator!r}")
    if env is not None:
        if callable(env):
            raise TypeError(f"env must be an environment; give {env!r} as env_creator")
        return env
    if not callable(creator):
        raise TypeError(f"env_creator must be callable, got {creator!r}")
    return creator(*(args or ()), **(kwargs or {}))


def _parallel(env: Any) -> Any:
    """The environment, or what PettingZoo makes of one whose agents take turns."""
    if not hasattr(env, "agent_iter"):
        return env
    from pettingzoo.utils import conversions

    if env.metadata.get("is_parallelizable", False):
        return conversions.aec_to_parallel(env)
    return conversions.turn_based_aec_to_parallel(env)
