"""A whole training run as one pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from puffer_jax.environments.jax_native import as_jax_env
from puffer_jax.nn.params import split
from puffer_jax.ppo import jax_rollout
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.objective import is_recurrent
from puffer_jax.ppo.update import make_learner


def _check_policy(config: PuffeRLConfig, policy: Any) -> None:
    recurrent = is_recurrent(policy)
    if config.use_rnn is not None and config.use_rnn != recurrent:
        raise ValueError(
            f"use_rnn is {config.use_rnn}, but {type(policy).__name__} has "
            f"{'an' if recurrent else 'no'} initial_state"
        )
    inner = getattr(policy, "policy", policy)
    compute = getattr(inner, "dtype", None)
    is_bfloat16 = compute is not None and jnp.dtype(compute) == jnp.bfloat16
    if (config.precision == "bfloat16") != is_bfloat16:
        raise ValueError(
            f"precision is {config.precision}, but the policy was built with dtype={compute}; "
            "build it with dtype=jnp.bfloat16 for precision='bfloat16', without dtype for float32"
        )


def make_train(
    config: PuffeRLConfig,
    env: Any,
    policy: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """A whole training run as one pure function, to be jitted, and vmapped over seeds and hypers.

    Args:
        config: `total_timesteps` says how many epochs.
        env: JAX-native, see `puffer_jax.as_jax_env`.
        policy: to start from, or a function of `nnx.Rngs` that makes one for each key.

    Returns:
        (key, hypers=None) -> (params, metrics): the trained parameters as `puffer_jax.split` gives
        them; metrics are arrays (epochs,): the losses, "episode_return" and "episode_length" (NaN
        where no episode ended), "episodes" and "nonfinite", the count of minibatches that were left
        out so far. `hypers` replaces some of `config.hypers()`.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> config = puffer_jax.PuffeRLConfig(num_envs=4, bptt_horizon=8, total_timesteps=64)
        >>> make_policy = lambda rngs: puffer_jax.Default(env, rngs=rngs)
        >>> train = puffer_jax.make_train(config, env, make_policy)
        >>> keys = jax.random.split(jax.random.key(0), 3)  # three seeds in one program
        >>> params, metrics = jax.jit(jax.vmap(train))(keys)
        >>> metrics["episode_return"].shape  # two epochs each
        (3, 2)
    """
    if isinstance(policy, nnx.Module):
        template = policy
    else:
        make_policy = policy
        template = nnx.eval_shape(lambda: make_policy(nnx.Rngs(0)))
    _check_policy(config, template)
    sizes = config.sizes(None)
    learner = make_learner(config, sizes, template)
    collector = jax_rollout.make_collector(config, sizes, as_jax_env(env), template)

    def train(key: PRNGKeyArray, hypers: Any = None) -> tuple[Any, dict[str, Array]]:
        init_key, reset_key, key = jax.random.split(key, 3)
        if isinstance(policy, nnx.Module):
            params = split(policy)[1]
        else:
            params = split(policy(nnx.Rngs(init_key)))[1]

        def epoch(carry: Any, key: PRNGKeyArray) -> tuple[Any, dict[str, Array]]:
            state, stream = carry
            collect_key, update_key = jax.random.split(key)
            stream, experience, episodes = collector.collect(state.params, stream, collect_key)
            state, losses, _ = learner.update(state, experience, update_key, hypers)
            metrics = losses | episodes.means()
            metrics |= {"episodes": episodes.episodes, "nonfinite": state.nonfinite}
            return (state, stream), metrics

        carry = (learner.init(params), collector.init(reset_key))
        keys = jax.random.split(key, sizes.epochs)
        (state, _), metrics = jax.lax.scan(epoch, carry, keys)
        return state.params, metrics

    return train
