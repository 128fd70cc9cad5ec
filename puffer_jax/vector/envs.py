"""Some of a vecenv's environments: built, and stepped one after another."""

import contextlib
import inspect
import math
import mmap
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from puffer_jax.base.spaces import Space, structured_dtype

Info = Mapping[Any, Any]
"""What an environment says besides, by name or by agent."""

Env = Any
"""An environment as PufferLib sees it, emulated or its own, recognised by its attributes."""

Creator = Callable[..., Any] | str
"""What makes an environment, or the name of one."""

WRITTEN = ("observations", "rewards", "terminals", "truncations", "masks")
"""The buffers that environments write to."""


class Order:
    """What a worker is told to do, in one byte; START, RESET and APPLY are followed by an argument.

    Two more bytes say with which of its shares of the environments.
    """

    START, READY, RESET, STEP, RESTART, NOTIFY, CLOSE = (bytes((c,)) for c in b"IQRSTNC")
    RENEW, APPLY = b"E", b"A"


class Told(NamedTuple):
    """What came of an order.

    Attributes:
        infos: what environments say besides; of APPLY, a pair for each environment: whether the
            function returned, and what, or what it raised.
        sources: the number of the environment that said each.
    """

    infos: list[Any]
    sources: list[int]


class Maker(NamedTuple):
    """How an environment is made: `creator(*args, **kwargs)`, or the name of one."""

    creator: Creator
    args: Sequence[object] = ()
    kwargs: dict[str, object] = {}  # noqa: RUF012

    def __call__(self, buf: dict[str, np.ndarray] | None = None, seed: int | None = None) -> Env:
        """Make the environment, as PufferLib sees it.

        A creator of a PufferLib environment (emulated or native) is called with `buf` and `seed`,
        as in the reference; what any other returns is emulated here.

        Args:
            buf: the arrays its agents read and write (`AgentLayout.buffers`); None: its own.
            seed: seed of the first reset, if that gets none.

        Raises:
            TypeError: the creator is not callable, or returns something other than an environment;
                or it makes one of PufferLib's and takes no `buf`.
        """
        creator = self.creator
        buffers = {"buf": buf, "seed": seed}
        if isinstance(creator, str):
            from puffer_jax.environments import env_creator

            creator = env_creator(creator)
        if not callable(creator):
            raise TypeError(f"an environment's creator must be callable or a name; got {creator!r}")
        parameters = _parameters(creator)
        env: Env
        if buf is not None and "buf" in parameters:
            env = creator(*self.args, **self.kwargs, **buffers)
        else:
            env = creator(*self.args, **self.kwargs)
            if not _is_puffer(env):
                return _emulate(env, creator, buffers)
            if buf is not None:  # only now do we know that it wants buffers
                env.close()
                if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                    raise TypeError(
                        f"{creator} makes a PufferLib environment, {type(env).__name__}, so it "
                        "must take its buffers: `def creator(buf=None, seed=0)`, and pass them on"
                    )
                env = creator(*self.args, **self.kwargs, **buffers)
        if not _is_puffer(env):
            return _emulate(env, creator, buffers)
        if buf is not None and not np.may_share_memory(env.observations, buf["observations"]):
            raise TypeError(
                f"{type(env).__name__}, made by {creator}, does not write into the buffers it was "
                "given; pass `buf` on to its constructor"
            )
        return env


def _parameters(creator: Callable[..., object]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(creator).parameters)
    except ValueError:  # a builtin has no signature
        return {}


def _is_puffer(env: object) -> bool:
    return hasattr(env, "single_observation_space") and hasattr(env, "num_agents")


def _emulate(env: Env, creator: object, buffers: dict[str, Any]) -> Env:
    from puffer_jax.environments import emulation

    if hasattr(env, "possible_agents"):
        return emulation.PettingZooPufferEnv(env=env, **buffers)
    name = type(env).__name__
    if not all(hasattr(env, a) for a in ("reset", "step", "observation_space", "action_space")):
        raise TypeError(
            f"{creator} returned {env!r} ({name}); expected an environment of gymnasium, "
            "PettingZoo (parallel or AEC) or PufferLib"
        )
    if hasattr(env, "single_observation_space"):
        raise TypeError(
            f"{name}, made by {creator}, is a vector of environments; give the trainer that itself"
        )
    if any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in _parameters(env.reset).values()
    ):
        raise TypeError(
            f"{name}, made by {creator}, has a `reset` that needs an argument, as those of "
            "JAX-native environments: use puffer_jax.vector.JaxVecEnv"
        )
    return emulation.GymnasiumPufferEnv(env=env, **buffers)


class AgentLayout(NamedTuple):
    """What one environment needs of the buffers, and how its episodes begin.

    Attributes:
        observation_space: observation space of one agent, a Box.
        action_space: action space of one agent: Discrete, MultiDiscrete or Box.
        num_agents: number of agents in the environment.
        emulated: whether the vecenv resets it, in the step after an episode's end; a native one
            resets itself, in the same step.
    """

    observation_space: Space
    action_space: Space
    num_agents: int
    emulated: bool

    @classmethod
    def of(cls, env: Env) -> "AgentLayout":
        """The layout of a PufferLib environment."""
        return cls(
            env.single_observation_space,
            env.single_action_space,
            int(env.num_agents),
            bool(env.emulated),
        )

    def _arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        # Quirk kept: actions are int32 whatever integer their space declares.
        action = structured_dtype(self.action_space)
        flag = ((), np.dtype(bool))
        return {
            "observations": (self.observation_space.shape, np.dtype(self.observation_space.dtype)),
            "actions": (action.shape, action.base),
            "teacher_actions": (
                action.shape,
                action.base,
            ),  # the reference's environments expect it
            "rewards": ((), np.dtype(np.float32)),
            "terminals": flag,
            "truncations": flag,
            "masks": flag,
        }

    def size(self, agents: int) -> int:
        """Bytes that the buffers of `agents` agents take."""
        return sum(_aligned(agents, *field) for field in self._arrays().values())

    def buffers(
        self, agents: int, memory: np.ndarray | mmap.mmap | None = None
    ) -> dict[str, np.ndarray]:
        """Arrays (agents, ...) by name; in `memory`, of `size(agents)` bytes, or in new memory."""
        memory = np.zeros(self.size(agents), np.uint8) if memory is None else memory
        arrays, offset = {}, 0
        for name, (shape, dtype) in self._arrays().items():
            arrays[name] = np.ndarray((agents, *shape), dtype, memory, offset)
            offset += _aligned(agents, shape, dtype)
        return arrays


def _aligned(agents: int, shape: tuple[int, ...], dtype: np.dtype) -> int:
    return -(-agents * math.prod(shape) * dtype.itemsize // 64) * 64


class Envs:
    """Environments that write into shared buffers, stepped one after another.

    Args:
        makers: how to make each environment.
        layout: what each environment needs of the buffers.
        buf: arrays (agents, ...) of all environments (`AgentLayout.buffers`).
        seed: seed of the first environment; each of the others has the next one.
        first: number of the first environment, for messages.
        restart_failed: rebuild an environment that fails, with another seed, instead of raising its
            error, unless it fails again before it has made a step.
        restarts: how many times all of them have been built before.

    Attributes:
        sources: the number of the environment that said each of the infos returned last.

    Raises:
        TypeError: see `Maker`.
        ValueError: an environment is not as `layout` says.
        Exception: what an environment raises, with a note that says which one it was.
    """

    def __init__(
        self,
        makers: Sequence[Maker],
        layout: AgentLayout,
        buf: dict[str, np.ndarray],
        seed: int,
        first: int = 0,
        restart_failed: bool = False,
        restarts: int = 0,
    ):
        self._makers, self._layout, self.buf = makers, layout, buf
        self._seed, self._first, self._restart_failed = seed, first, restart_failed
        self._restarts = [restarts] * len(makers)
        self._unproven: set[int] = set()  # rebuilt, and no step made since
        self.sources: list[int] = []
        buf["masks"][:] = True
        agents = layout.num_agents
        self._rows = [slice(i * agents, (i + 1) * agents) for i in range(len(makers))]
        self._actions = [buf["actions"][rows] for rows in self._rows]
        self.envs: list[Env] = []
        try:
            for i in range(len(makers)):
                self.envs.append(self._build(i))
        except BaseException:
            self.close()
            raise

    def _build(self, i: int) -> Env:
        buf = {name: array[self._rows[i]] for name, array in self.buf.items()}
        # Far from the seeds of the other environments.
        seed = self._seed + i + 1_000_003 * self._restarts[i]
        with self._noting(i, "making"):
            env = self._makers[i](buf, seed)
            layout = AgentLayout.of(env)
            if layout != self._layout:
                env.close()
                raise ValueError(f"environments differ: expected {self._layout}, got {layout}")
        return env

    @contextlib.contextmanager
    def _noting(self, i: int, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            error.add_note(f"({what} environment {self._first + i})")
            raise

    def reset(self, seed: int | None) -> list[Info]:
        """Start all episodes; environment i with `seed + i`, or without a seed if that is None."""
        infos: list[Info] = []
        self.sources = []
        for i in range(len(self.envs)):
            self._begin(infos, i, **({} if seed is None else {"seed": seed + i}))
        return infos

    def renew(self) -> list[Info]:
        """Start the next episode where one is over, which the next step would do otherwise."""
        infos: list[Info] = []
        self.sources = []
        for i in range(len(self.envs)):
            if self._layout.emulated and self.envs[i].done:
                self._begin(infos, i)
        return infos

    def _begin(self, infos: list[Info], i: int, **arguments: int) -> None:
        try:
            info = self.envs[i].reset(**arguments)[1]
        except Exception as error:
            self._add(infos, i, self._replace(i, error, "resetting"))
            with self._noting(i, "resetting"):
                info = self.envs[i].reset(**arguments)[1]
        self._add(infos, i, info)

    def step(self) -> list[Info]:
        """Step each with its actions in the buffers, or reset it if its episode is over."""
        infos: list[Info] = []
        self.sources = []
        emulated = self._layout.emulated
        proven = {i for i in self._unproven if not (emulated and self.envs[i].done)}
        for i, env in enumerate(self.envs):
            try:
                if emulated and env.done:
                    info = env.reset()[1]
                else:
                    info = env.step(self._actions[i])[4]
            except Exception as error:
                info = self._replace(i, error, "stepping")
            if type(info) is not dict or info:  # most say nothing
                self._add(infos, i, info)
        self._unproven -= proven
        return infos

    def _add(self, infos: list[Info], i: int, info: Any) -> None:
        _add(infos, info)
        if new := len(infos) - len(self.sources):
            self.sources += [self._first + i] * new

    def _replace(self, i: int, error: Exception, what: str) -> Info:
        with self._noting(i, what):
            if not self._restart_failed or i in self._unproven:
                raise error
        with contextlib.suppress(Exception):
            self.envs[i].close()
        self._restarts[i] += 1
        self._unproven.add(i)
        self.envs[i] = self._build(i)
        self._cut(i)
        return {"restarts": 1}

    def restart(self) -> list[Info]:
        """Stand in for environments that were lost in a step."""
        for i in range(len(self.envs)):
            self._cut(i)
        return []

    def _cut(self, i: int) -> None:
        """Mark the step truncated. An emulated environment keeps the last observation it had."""
        if not self._layout.emulated:
            with self._noting(i, "resetting"):
                self.envs[i].reset()
        for name, value in (("rewards", 0), ("terminals", 0), ("truncations", 1), ("masks", 1)):
            self.buf[name][self._rows[i]] = value

    def apply(
        self, function: Callable[[Env], Any], numbers: Sequence[int]
    ) -> list[tuple[bool, Any]]:
        """Call a function of the environments with these numbers.

        Returns:
            For each, whether the function returned, and what it returned, or what it raised.
        """
        self.sources = list(numbers)
        results: list[tuple[bool, Any]] = []
        for number in numbers:
            try:
                results.append((True, function(self.envs[number - self._first])))
            except Exception as error:
                error.add_note(f"(in environment {number})")
                results.append((False, error))
        return results

    def notify(self) -> None:
        """Call `notify` of the environments that have it."""
        for env in self.envs:
            if hasattr(env, "notify"):
                env.notify()

    def close(self) -> None:
        """Close all of them, even if closing one fails."""
        with contextlib.ExitStack() as stack:
            for env in self.envs:
                stack.callback(env.close)

    def obey(self, order: bytes, argument: Any = None) -> Told:
        """Carry out an order; RESET's argument is the seed, APPLY's its own ones, pickled."""
        infos: list[Any] = []
        self.sources = []
        match order:
            case Order.STEP:
                infos = self.step()
            case Order.RESET:
                infos = self.reset(argument)
            case Order.RENEW:
                infos = self.renew()
            case Order.RESTART:
                infos = self.restart()
            case Order.APPLY:
                infos = self.apply(*pickle.loads(argument))
            case Order.NOTIFY:
                self.notify()
            case Order.CLOSE:
                self.close()
        return Told(infos, self.sources)


def _add(infos: list[Info], info: Any) -> None:
    """Add a step's or a reset's info, but not the empty dicts that most agents and resets give."""
    if isinstance(info, list):
        infos.extend(each for each in info if isinstance(each, Mapping))
    elif isinstance(info, Mapping) and any(
        not isinstance(value, dict) or value for value in info.values()
    ):
        infos.append(info)
