"""Environments of JaxMARL, whose agents act at the same time."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.base.spaces import Box, Dict, Discrete, Env, MultiDiscrete, Space, kind_of
from puffer_jax.environments.adapters import Adapted, Tree, unbounded

_ALL = "__all__"


def recognises(env: Env) -> bool:
    """Whether an environment has JaxMARL's interface."""
    return all(hasattr(env, name) for name in ("step_env", "agents", "num_agents"))


def adapt(env: Env) -> Adapted:
    """An environment of JaxMARL with the functions and spaces of a `JaxEnv`.

    Its agents are in the order of `env.agents`; their observations, if they are vectors of several
    lengths, end with zeros. Where it says which actions are available, they are {"observation",
    "action_mask"}. An end at `state.step >= env.max_steps` is a truncation.

    Raises:
        ValueError: its agents' spaces differ otherwise, or it is a wrapper.
    """
    name, agents = type(env).__name__, list(env.agents)
    if not hasattr(type(env), "step_env"):
        raise ValueError(f"{name} is a wrapper of JaxMARL's; pass the environment inside it")
    shown = jax.eval_shape(env.reset, jax.random.key(0))[0]
    if not isinstance(shown, Mapping) or not all(agent in shown for agent in agents):
        raise ValueError(f"{name}: its observations are not those of {agents} by name")
    longest = _longest([shown[agent] for agent in agents])
    space = _same(name, "observations", {a: _observed(longest, shown[a]) for a in agents})
    actions = _same(name, "actions", {a: _acted(env.action_space(a)) for a in agents})
    masked = _says_what_is_available(env, agents, actions)

    def rows(of: dict[str, Tree]) -> Tree:
        return jax.tree.map(lambda *x: jnp.stack(x), *(of[agent] for agent in agents))

    def seen(obs: dict[str, Tree], state: Tree) -> Tree:
        padded = {agent: _pad(longest, obs[agent]) for agent in agents}
        if not masked:
            return rows(padded)
        mask = rows(env.get_avail_actions(state)).astype(bool)
        return {"observation": rows(padded), "action_mask": mask}

    def reset(key: PRNGKeyArray) -> tuple[Tree, Tree]:
        obs, state = env.reset(key)
        return seen(obs, state), state

    def step(key: PRNGKeyArray, state: Tree, action: Tree) -> tuple[Tree, ...]:
        acts = {agent: action[i] for i, agent in enumerate(agents)}
        obs, state, reward, done, info = env.step_env(key, state, acts)
        over = done["__all__"]
        truncated = jnp.broadcast_to(over & _at_limit(env, state), (len(agents),))
        terminated = (rows(done) | over) & ~truncated
        return seen(obs, state), state, rows(reward), terminated, truncated, dict(info)

    if masked:
        space = Dict({"observation": space, "action_mask": unbounded((actions.n,), bool)})
    return Adapted(space, actions, reset, step, num_agents=len(agents))


def _same(name: str, what: str, spaces: Mapping[str, Space]) -> Space:
    first, *others = spaces.values()
    if any(other != first for other in others):
        raise ValueError(
            f"{name}: one policy acts for all agents, so they need the same {what}; got "
            + ", ".join(f"{agent}: {space}" for agent, space in spaces.items())
        )
    return first


def _longest(observations: Sequence[Tree]) -> int | None:
    """The length of the longest observation, if all are vectors."""
    if any(getattr(obs, "ndim", 0) != 1 for obs in observations):
        return None
    return max(obs.shape[0] for obs in observations)


def _pad(longest: int | None, obs: Tree) -> Tree:
    return obs if longest is None else jnp.pad(obs, (0, longest - obs.shape[0]))


def _observed(longest: int | None, obs: Tree) -> Space:
    if isinstance(obs, Mapping):
        return Dict({name: _observed(None, part) for name, part in obs.items()})
    return unbounded(obs.shape if longest is None else (longest,), obs.dtype)


def _acted(space: Any) -> Space:
    if hasattr(space, "num_categories"):
        return MultiDiscrete(tuple(np.asarray(space.num_categories).tolist()))
    if kind_of(space) == "discrete":
        return Discrete(int(space.n))
    if kind_of(space) == "box":
        # Numbers, so that the spaces of two agents compare.
        low, high = (
            tuple(np.broadcast_to(np.asarray(bound), space.shape).tolist())
            for bound in (space.low, space.high)
        )
        return Box(low, high, tuple(space.shape), np.dtype(space.dtype))
    return space


def _says_what_is_available(env: Env, agents: Sequence[str], actions: Space) -> bool:
    if kind_of(actions) != "discrete" or not hasattr(env, "get_avail_actions"):
        return False
    try:
        masks = jax.eval_shape(
            lambda key: env.get_avail_actions(env.reset(key)[1]), jax.random.key(0)
        )
    except NotImplementedError:
        return False
    return all(masks[agent].shape == (actions.n,) for agent in agents)


def _at_limit(env: Env, state: Tree) -> Array | bool:
    inner = getattr(state, "state", state)  # of those that play the enemy's part themselves
    limit = getattr(env, "max_steps", None)
    return False if limit is None or not hasattr(inner, "step") else inner.step >= limit
