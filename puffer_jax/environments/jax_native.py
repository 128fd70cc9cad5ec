"""JAX-native environments: the protocol of a single one, adapters to it, and resets.

An environment is a pair of pure functions of arrays, so that a rollout of many compiles into
one program: `jax.vmap` makes the batch, `jax.lax.scan` the time. Those of other packages are
adapted in `puffer_jax.environments.adapters`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base.spaces import (
    Continuous,
    Env,
    MultiDiscrete,
    Space,
    children_of,
    env_spec,
    kind_of,
    structured_dtype,
)
from puffer_jax.base.text import hint
from puffer_jax.environments.adapters import (
    Adapted,
    Tree,
    brax,
    casts,
    gymnax,
    jaxmarl,
    jumanji,
    navix,
    pgx,
    split_end,
)
from puffer_jax.environments.agents import counted, counted_playing
from puffer_jax.nn import random
from puffer_jax.nn.widths import check_widths

_PROTOCOL = (
    "a JAX-native environment has `observation_space`, `action_space`, `reset(key) -> (obs, state)`"
    " and `step(key, state, action) -> (obs, state, reward, terminated, truncated, info)`; those of"
    " gymnax, Craftax, brax, MuJoCo Playground, pgx, jumanji, navix and JaxMARL are adapted"
)

_ADAPTERS = (brax, pgx, jumanji, navix, jaxmarl)
"""Besides gymnax, whose environments may have parameters."""

Transition = tuple[Array, Tree, Array, Array, Array, dict[str, Tree]]
"""What a step gives: obs, state, reward, terminated, truncated, info."""


@runtime_checkable
class JaxEnv(Protocol):
    """One environment, not a batch. Both functions are pure and can be traced.

    It has several agents if it also has the attribute `num_agents`, an int. Then the spaces are one
    agent's, and obs, action, reward, terminated and truncated have a first axis of that size. An
    agent that is terminated or truncated is absent until all are, which ends the episode. A method
    `playing(state)`, if there is one, returns (num_agents,) bool: whose actions count in `state`.
    The rewards that an agent gets while its actions do not count belong to its last one that did.

    Attributes:
        observation_space: any space that `puffer_jax.spaces.env_spec` understands.
        action_space: the same.
    """

    @property
    def observation_space(self) -> Space: ...  # noqa: D102

    @property
    def action_space(self) -> Space: ...  # noqa: D102

    def reset(self, key: PRNGKeyArray, /) -> tuple[Tree, Tree]:
        """`(obs, state)` of a new episode; obs is an array, or a dict or tuple of arrays."""
        ...

    def step(self, key: PRNGKeyArray, state: Tree, action: Tree, /) -> Transition:
        """`(obs, state, reward, terminated, truncated, info)`; never resets.

        reward, terminated and truncated are scalars; both of the latter may be set at once, as
        in gymnasium; then the episode counts as terminated. info is a dict of arrays.
        """
        ...


class Step(NamedTuple):
    """What a step with automatic reset gives.

    Attributes:
        obs: the observation; that of the new episode if one begins.
        state: the state, likewise.
        reward: the reward of the action taken, float32.
        terminated: whether the episode ended, so that there is no future to bootstrap from.
        truncated: whether the episode was cut; unless terminated, bootstrap from `final_obs`.
        final_obs: the observation that the action led to, before any reset, at every step.
        info: what the environment reported, before any reset.
        start: whether `obs` is the first of an episode.
        playing: (num_agents,), whose actions on `obs` count; None: there is one agent.
    """

    obs: Tree
    state: Tree
    reward: Array
    terminated: Array
    truncated: Array
    final_obs: Tree
    info: dict[str, Tree]
    start: Array
    playing: Array | None = None


class TimeLimited(NamedTuple):
    """State of an environment with `max_steps`: its own state and the steps taken so far."""

    state: Tree
    steps: Array


@dataclass(frozen=True, eq=False)
class AdaptedEnv:
    """A `JaxEnv` whose dtypes are checked and fixed, made by `as_jax_env`.

    Attributes:
        observation_space: see `JaxEnv`.
        action_space: see `JaxEnv`.
        reset: see `JaxEnv`. The observation has the dtype its space declares.
        step: see `JaxEnv`. reward is float32, terminated and truncated are bool, and the state
            has the dtypes it had at reset, so that it can be carried through `jax.lax.scan`. Each
            agent's end is told once, and its rewards are 0 after that.
        unwrapped: the environment that was adapted.
        num_agents: how many agents there are, see `JaxEnv`; None: one, without an axis.
        playing: who plays in a state; None: the one agent does.
    """

    observation_space: Space
    action_space: Space
    reset: Callable[..., Tree]
    step: Callable[..., Tree]
    unwrapped: Env
    num_agents: int | None = None
    playing: Callable[[Tree], Array] | None = None


def as_jax_env(
    env: Env,
    env_params: Tree = None,
    max_steps: int | None = None,
    observation: str | None = None,
) -> AdaptedEnv:
    """Adapt an environment to `JaxEnv`, checking it once without running it.

    Args:
        env: one of

            - a `JaxEnv`: the page `puffer_jax/environments/README.md` has its contract, and one of
              15 lines. Its `step` may also return five values, (obs, state, reward, done, info).
              Then `info["truncation"]` or `info["truncated"]`, if there is one, says whether
              done is a truncation.
            - a gymnax environment, or the pair (env, params) of `gymnax.make`. Since gymnax 1.0
              its time limit sets truncated. Before that, `done` did not tell a limit from an end:
              done at `state.time >= params.max_steps_in_episode` counts as truncated.
            - a brax environment (or MuJoCo Playground's), not wrapped with automatic resets.
              `state.info["truncation"]` sets truncated; info is `state.metrics`.
            - a Craftax environment, with or without automatic resets, or its pair with parameters.
            - a game of pgx, as self-play: each player is an agent, and plays where it is its turn.
              `puffer_jax.environments.make("pgx:...", opponent="random")` has one agent.
            - an environment of jumanji, not wrapped with automatic resets, or of navix.
            - an environment of JaxMARL whose agents have the same spaces.
        env_params: gymnax's parameters; `env.default_params` if None.
        max_steps: truncate episodes after this many steps, besides the environment's own limits.
            Brax environments have none: for them, None means 1000, as in brax's own training, or
            what Playground's config says (unless `state.info` has "truncation": then something
            else already counts).
        observation: the part of its Dict observations that is handed out, such as "state", where
            "privileged_state" is for nobody's eyes; None: all of them.

    Returns:
        The adapted environment; `env` itself if it is adapted already and nothing is to be added.

    Raises:
        TypeError: `env` is none of these; a space is None or a method.
        ValueError: the observation does not fit its space; the state changes structure or
            shape in a step; the reward or an end is not a scalar; `step` returns too few values;
            the environment resets itself; an argument does not suit the environment.

    Example:
        >>> import jax, puffer_jax
        >>> env = puffer_jax.as_jax_env(puffer_jax.environments.make("cartpole"))
        >>> obs, state = env.reset(jax.random.key(0))
        >>> obs, state, reward, terminated, truncated, info = env.step(jax.random.key(1), state, 0)
        >>> obs.shape
        (4,)
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1; got {max_steps}")
    if isinstance(env, tuple) and len(env) == 2:
        if env_params is not None:
            raise ValueError("env is a pair (env, params) already; got env_params as well")
        env, env_params = env
    if isinstance(env, AdaptedEnv) and env_params is max_steps is observation is None:
        return env
    name = type(env).__name__
    adapter = next((adapter for adapter in _ADAPTERS if adapter.recognises(env)), None)
    if gymnax.recognises(env):
        inner = gymnax.adapt(env, env_params)
    elif env_params is not None:
        raise ValueError(f"env_params are gymnax's; {name} is not a gymnax environment")
    elif adapter is not None:
        inner = adapter.adapt(env)
        max_steps = inner.max_steps if max_steps is None else max_steps
    else:
        _check_protocol(env)
        inner = env
    if observation is not None:
        inner = _showing(name, inner, observation)
    return _fix(env, name, inner, max_steps)


def autoreset(env: Any) -> Callable[[PRNGKeyArray, Tree, Tree], Step]:
    """The step of an environment that begins the next episode where one ends.

    The reset is computed in every step, as both sides of a condition are under `vmap`, with a
    key of its own.

    Args:
        env: as in `as_jax_env`.

    Returns:
        `step(key, state, action) -> Step`, pure and for one environment.

    Raises:
        TypeError: as in `as_jax_env`.
        ValueError: as in `as_jax_env`.
    """
    env = as_jax_env(env)

    def step(key: PRNGKeyArray, state: Tree, action: Tree) -> Step:
        step_key, reset_key = random.split(key)
        final_obs, state, reward, terminated, truncated, info = env.step(step_key, state, action)
        done = terminated | truncated if env.num_agents is None else state.over.all()
        obs, state = jax.tree.map(
            lambda new, old: jnp.where(done, new, old), env.reset(reset_key), (final_obs, state)
        )
        playing = None if env.playing is None else env.playing(state)
        return Step(obs, state, reward, terminated, truncated, final_obs, info, done, playing)

    return step


def _showing(name: str, inner: Env, part: str) -> Env:
    if kind_of(inner.observation_space) != "dict":
        raise ValueError(
            f"observation names a part of Dict observations; those of {name} are "
            f"{inner.observation_space}"
        )
    parts = children_of(inner.observation_space) or {}
    if part not in parts:
        raise ValueError(
            f"observation must be one of {', '.join(parts)}; got {part!r}{hint(part, parts)}"
        )

    def reset(key: PRNGKeyArray) -> tuple[Tree, Tree]:
        obs, state = inner.reset(key)
        return obs[part], state

    def step(*arguments: Tree) -> tuple[Tree, ...]:
        obs, *others = inner.step(*arguments)
        return obs[part], *others

    agents = {name: getattr(inner, name, None) for name in ("num_agents", "playing")}
    return Adapted(parts[part], inner.action_space, reset, step, **agents)


def _check_protocol(env: Env) -> None:
    if isinstance(env, str):
        raise TypeError(f"got the name {env!r}; make it: puffer_jax.environments.make({env!r})")
    if isinstance(env, type):
        raise TypeError(f"got the class {env.__name__}; pass an instance of it")
    name = type(env).__name__
    names = ("reset", "step", "observation_space", "action_space")
    missing = [attribute for attribute in names if not hasattr(env, attribute)]
    if missing:
        raise TypeError(f"{name} lacks {', '.join(missing)}: {_PROTOCOL}")
    if not _takes(env.step, 3) or not _takes(env.reset, 1):
        raise TypeError(
            f"{name} has reset{_signature(env.reset)} and step{_signature(env.step)}, like an "
            "environment that runs in Python (gymnasium, PufferLib): vectorise that, say with "
            f"gymnasium.make_vec, and give the trainer the vector environment. Here, {_PROTOCOL}"
        )


def _takes(function: Callable[..., Tree], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a builtin has no signature
        return True
    return True


def _signature(function: Callable[..., Tree]) -> str:
    names = inspect.signature(function).parameters
    return f"({', '.join(names)})"


def _fix(env: Env, name: str, inner: Env, max_steps: int | None) -> AdaptedEnv:
    check_widths(inner)
    agents, playing = getattr(inner, "num_agents", None), getattr(inner, "playing", None)
    axis = () if agents is None else (int(agents),)
    action, declared = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(axis + spec.shape, spec.dtype),
        (_action_spec(inner), _observation_spec(inner.observation_space)),
    )
    reset, step = inner.reset, _six_values(name, inner.step)
    if max_steps is not None:
        reset, step = _with_limit(reset, step, max_steps)
        playing = playing and (lambda state, inner=playing: inner(state.state))
    key = jax.random.key(0)
    obs, state = jax.eval_shape(reset, key)
    _check_observation(name, "reset", declared, obs)
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    for _ in range(4):
        obs, state, *scalars, _ = jax.eval_shape(step, key, specs, action)
        _check_observation(name, "step", declared, obs)
        for what, x in zip(("reward", "terminated", "truncated"), scalars, strict=True):
            if x.shape != axis:
                expected = f"one for each of the {agents} agents" if axis else "a scalar"
                raise ValueError(f"{name}: {what} must be {expected}; got shape {x.shape}")
        # A state may begin as an int and go on as a float: the wider dtype holds both, exactly.
        wider = _join(name, specs, state)
        if jax.tree.leaves(wider) == jax.tree.leaves(specs):
            break
        specs = wider
    else:
        raise ValueError(f"{name}: the dtypes of the state change with every step")

    def fixed_reset(key: PRNGKeyArray) -> tuple[Tree, Tree]:
        obs, state = reset(key)
        return _cast(obs, declared), _cast(state, specs)

    def fixed_step(key: PRNGKeyArray, state: Tree, action: Tree) -> tuple[Tree, ...]:
        obs, state, reward, terminated, truncated, info = step(key, state, action)
        return (
            _cast(obs, declared),
            _cast(state, specs),
            jnp.asarray(reward, jnp.float32),
            jnp.asarray(terminated, bool),
            jnp.asarray(truncated, bool),
            info,
        )

    unwrapped = env.unwrapped if isinstance(env, AdaptedEnv) else env
    spaces = inner.observation_space, inner.action_space
    if agents is None:
        return AdaptedEnv(*spaces, fixed_reset, fixed_step, unwrapped)
    counting = counted(fixed_reset, fixed_step, int(agents))
    return AdaptedEnv(*spaces, *counting, unwrapped, int(agents), counted_playing(playing))


def _six_values(name: str, step: Callable[..., Tree]) -> Callable[..., Tree]:
    def six(key: PRNGKeyArray, state: Tree, action: Tree) -> tuple[Tree, ...]:
        values = step(key, state, action)
        if not isinstance(values, tuple) or len(values) not in (5, 6):
            got = len(values) if isinstance(values, tuple) else type(values).__name__
            raise ValueError(
                f"{name}.step gives {got} where (obs, state, reward, terminated, truncated, info) "
                "or (obs, state, reward, done, info) was expected"
            )
        if not isinstance(values[-1], dict):
            raise ValueError(f"{name}: info must be a dict; got {type(values[-1]).__name__}")
        if len(values) == 6:
            return values
        obs, state, reward, done, info = values
        truncated = info.get("truncation", info.get("truncated", False))
        return obs, state, reward, *split_end(done, truncated), info

    return six


def _with_limit(
    reset: Callable[..., Tree], step: Callable[..., Tree], max_steps: int
) -> tuple[Callable[..., Tree], Callable[..., Tree]]:
    def limited_reset(key: PRNGKeyArray) -> tuple[Tree, TimeLimited]:
        obs, state = reset(key)
        return obs, TimeLimited(state, jnp.int32(0))

    def limited_step(key: PRNGKeyArray, limited: TimeLimited, action: Tree) -> tuple[Tree, ...]:
        obs, state, reward, terminated, truncated, info = step(key, limited.state, action)
        steps = limited.steps + 1
        truncated = jnp.logical_or(truncated, steps >= max_steps)
        return obs, TimeLimited(state, steps), reward, terminated, truncated, info

    return limited_reset, limited_step


def _action_spec(env: Env) -> jax.ShapeDtypeStruct:
    match env_spec(env).single_action_space:
        case Continuous(shape):
            return jax.ShapeDtypeStruct(shape, getattr(env.action_space, "dtype", jnp.float32))
        case MultiDiscrete(nvec):
            return jax.ShapeDtypeStruct((len(nvec),), jnp.int32)
        case _:
            return jax.ShapeDtypeStruct((), jnp.int32)


def _observation_spec(space: Space) -> Tree:
    match kind_of(space):
        case "dict":
            return {key: _observation_spec(sub) for key, sub in space.spaces.items()}
        case "tuple":
            return tuple(_observation_spec(sub) for sub in space.spaces)
        case _:
            dtype = structured_dtype(space)
            return jax.ShapeDtypeStruct(dtype.shape, dtype.base)


def _check_observation(name: str, where: str, declared: Tree, actual: Tree) -> None:
    fits = jax.tree.structure(declared) == jax.tree.structure(actual) and all(
        want.shape == got.shape and casts(got.dtype, want.dtype)
        for want, got in zip(jax.tree.leaves(declared), jax.tree.leaves(actual), strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name}: observation_space says {_text(declared)}, {where} gives {_text(actual)}"
        )


def _text(specs: Tree) -> str:
    if isinstance(specs, jax.ShapeDtypeStruct):
        return f"{specs.dtype} {specs.shape}"
    return str(jax.tree.map(lambda x: f"{x.dtype} {x.shape}", specs)).replace("'", "")


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _join(name: str, before: Tree, after: Tree) -> Tree:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            f"{name}: a step changes the structure of the state from "
            f"{jax.tree.structure(before)} to {jax.tree.structure(after)}"
        )

    def join(path: tuple[object, ...], old: Tree, new: Tree) -> jax.ShapeDtypeStruct:
        keys = _is_key(old.dtype), _is_key(new.dtype)
        if old.shape != new.shape or keys[0] != keys[1]:
            raise ValueError(
                f"{name}: a step changes state{jax.tree_util.keystr(path)} from {_text(old)} "
                f"to {_text(new)}"
            )
        dtype = old.dtype if keys[0] else jnp.promote_types(old.dtype, new.dtype)
        return jax.ShapeDtypeStruct(old.shape, dtype)

    return jax.tree_util.tree_map_with_path(join, before, after)


def _cast(tree: Tree, specs: Tree) -> Tree:
    def cast(spec: jax.ShapeDtypeStruct, x: Tree) -> Tree:
        # A key may be a typed key or an array of the old kind: it stays what it is.
        return x if _is_key(spec.dtype) else jax.lax.convert_element_type(x, spec.dtype)

    return jax.tree.map(cast, specs, tree)
