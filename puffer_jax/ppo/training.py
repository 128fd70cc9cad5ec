"""A whole training run as one pure function."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from puffer_jax.environments.jax_native import as_jax_env
from puffer_jax.nn.params import split
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.epoch import epoch
from puffer_jax.ppo.experience import Hypers, Metrics, Params, TrainState
from puffer_jax.ppo.jax_rollout import JaxSource, Stream
from puffer_jax.ppo.rollout import check_fits
from puffer_jax.ppo.update import make_learner


@runtime_checkable
class TrainFunction(Protocol):
    """What `make_train` returns."""

    def __call__(self, key: PRNGKeyArray, hypers: Hypers | None = None) -> tuple[Params, Metrics]:
        """Train with a key; `hypers` replaces some of `config.hypers()`."""
        ...


def make_train(
    config: PuffeRLConfig, env: Any, policy: nnx.Module | Callable[[nnx.Rngs], nnx.Module]
) -> TrainFunction:
    """A whole training run as one pure function, to be jitted, and vmapped over seeds and hypers.

    Args:
        config: its `total_timesteps` sets the number of epochs.
        env: a JAX-native environment, see `puffer_jax.as_jax_env`.
        policy: the policy to start from, or a function of `nnx.Rngs` that makes one for each key.

    Returns:
        (key, hypers=None) -> (params, metrics): the trained parameters as `puffer_jax.split`
        returns them; metrics are arrays (epochs,): the losses, "episode_return" and
        "episode_length" (NaN where no episode ended), "episodes", and "nonfinite", see
        `TrainState`. `hypers` replaces some of `config.hypers()`.

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
    check_fits(config, template)
    source = JaxSource(config, as_jax_env(env), template)
    learner = make_learner(config, source.sizes, template)

    def train(key: PRNGKeyArray, hypers: Hypers | None = None) -> tuple[Params, Metrics]:
        init_key, reset_key, key = jax.random.split(key, 3)
        if isinstance(policy, nnx.Module):
            params = split(policy)[1]
        else:
            params = split(policy(nnx.Rngs(init_key)))[1]

        def step(
            carry: tuple[TrainState, Stream], key: PRNGKeyArray
        ) -> tuple[tuple[TrainState, Stream], Metrics]:
            collect_key, update_key = jax.random.split(key)
            keys = collect_key, update_key
            state, stream, losses, episodes = epoch(
                source.collect, learner.update, learner.acting, *carry, keys, hypers
            )
            metrics = losses | episodes.means()
            metrics |= {"episodes": episodes.episodes, "nonfinite": state.nonfinite}
            return (state, stream), metrics

        carry = (learner.init(params), source.init(reset_key))
        keys = jax.random.split(key, source.sizes.epochs)
        (state, _), metrics = jax.lax.scan(step, carry, keys)
        return learner.acting(state), metrics

    return train
