"""One epoch's update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PRNGKeyArray

from puffer_jax.nn import random
from puffer_jax.nn.params import merge, split
from puffer_jax.nn.torch_layout import torch_layout
from puffer_jax.ppo import optimizers
from puffer_jax.ppo.advantage import advantage_of, priorities
from puffer_jax.ppo.config import PuffeRLConfig, Sizes
from puffer_jax.ppo.experience import Details, Experience, Hypers, Params, TrainState
from puffer_jax.ppo.objective import loss


class Learner(NamedTuple):
    """One epoch's update for a policy of one structure; see `make_learner`.

    Attributes:
        init: params -> TrainState.
        update: (state, experience, key, hypers=None, indices=None) -> (state, losses, details).
        names: of the arrays that are checked to be finite.
    """

    init: Callable[[Params], TrainState]
    update: Callable[..., tuple[TrainState, dict[str, Array], Details]]
    names: tuple[str, ...]


def make_learner(config: PuffeRLConfig, sizes: Sizes, policy: nnx.Module) -> Learner:
    """The update of `pufferlib.pufferl.PuffeRL.train` for policies like `policy`.

    Quirks kept by default, each with an option in `PuffeRLConfig`: the advantage of a minibatch is
    not recomputed for the ratio at hand, gradients of accumulated minibatches add up. Kept without
    one: the advantages of the whole batch are computed anew for every minibatch, after the
    values and ratios of the ones before have been written back (so a value is clipped around its
    latest estimate); advantages are standardised with the unbiased deviation and then weighted;
    the importance exponent anneals to beta0 + (1 - beta0) alpha; the learning rate steps by epochs.

    `update` draws the rows of each minibatch with `key` (none twice in one, as
    `torch.multinomial`), or takes them from `indices` (minibatches, rows). `hypers` replaces
    some of `config.hypers()`, by numbers or tracers.
    """
    graphdef, structure = split(policy)
    to_torch, from_torch = torch_layout(policy)
    names = (
        *("rewards", "advantages", "log-probabilities", "values", "loss"),
        *(f"gradient of {name}" for name in jax.eval_shape(to_torch, structure)),
    )
    count, accumulate = sizes.minibatches, sizes.accumulate

    def optimizer(make: Callable[..., Any], hypers: Hypers, learning_rate: Any) -> Any:
        return make(
            config.optimizer,
            to_torch,
            from_torch,
            learning_rate=learning_rate,
            max_grad_norm=hypers["max_grad_norm"],
            beta1=hypers["adam_beta1"],
            beta2=hypers["adam_beta2"],
            eps=hypers["adam_eps"],
        )

    def init(params: Params) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        opt_state = optimizer(optimizers.make, config.hypers(), config.learning_rate).init(params)
        return TrainState(params, opt_state, zero, zero, zero - 1)

    def gradient(
        params: Params, experience: Experience, ratio: Array, rows: Any, beta: Any, hypers: Hypers
    ) -> tuple[Any, ...]:
        """Of one minibatch: its rows, priorities, advantages, loss, metrics and gradients."""
        advantages = advantage_of(experience, ratio, hypers)
        probs = priorities(advantages, hypers["prio_alpha"])
        if jnp.issubdtype(rows.dtype, jax.dtypes.prng_key):
            key, shape = random.fast(rows), (sizes.minibatch_segments,)
            rows = jax.random.choice(key, sizes.segments, shape, replace=False, p=probs)
        weights = (sizes.segments * probs[rows, None]) ** -beta
        batch = jax.tree.map(lambda x: x[rows], experience)

        def objective(params: Params) -> tuple[Array, dict[str, Array]]:
            return loss(
                merge(graphdef, params),
                batch,
                advantages[rows],
                weights,
                hypers,
                config.recompute_advantage,
            )

        (total, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return rows, probs, advantages, total, metrics, grads

    def checked(experience: Experience, parts: tuple[Any, ...]) -> Array:
        """Which of `names` hold a number that is not finite."""
        _, _, advantages, total, metrics, grads = parts
        ratio, values = metrics["ratio"], metrics["values"]
        arrays = (experience.rewards, advantages, ratio, values, total, *to_torch(grads).values())
        return jnp.stack([~jnp.isfinite(x).all() for x in arrays])

    def update(
        state: TrainState,
        experience: Experience,
        key: PRNGKeyArray | None = None,
        hypers: Hypers | None = None,
        indices: Int[ArrayLike, "minibatches rows"] | None = None,
    ) -> tuple[TrainState, dict[str, Array], Details]:
        if (key is None) == (indices is None):
            raise ValueError("give a key or the indices of the minibatches, and not both")
        experience = jax.tree.map(jnp.asarray, experience)
        values = experience.values
        # Traced numbers must not widen the arrays; Python's do not, and are exact.
        given = {name: jnp.asarray(x, values.dtype) for name, x in (hypers or {}).items()}
        hypers = config.hypers() | given
        rate, beta0 = hypers["learning_rate"], hypers["prio_beta0"]
        # An int32 divided is float32, even where everything else is float64.
        epoch = state.epoch.astype(float)
        if config.anneal_lr:
            rate = optimizers.cosine_schedule(rate, sizes.epochs)(epoch)
        step = optimizer(optimizers.make_step, hypers, rate)
        beta = beta0 + (1 - beta0) * hypers["prio_alpha"] * epoch / sizes.epochs
        rows = jnp.asarray(indices) if key is None else jax.random.split(key, count)
        rows = jnp.reshape(rows, (count // accumulate, accumulate, *rows.shape[1:]))

        def group(carry: tuple[Any, ...], rows: Any) -> tuple[tuple[Any, ...], Any]:
            """The minibatches of one optimizer step."""
            state, details = carry
            values, ratio = details.values, details.ratio
            grads, bad, outputs, drawn = None, jnp.zeros(len(names), bool), [], []
            for row in rows:
                current = experience._replace(values=values)
                parts = gradient(state.params, current, ratio, row, beta, hypers)
                index, probs, advantages, _, metrics, new = parts
                bad = bad | checked(current, parts)
                ratio = ratio.at[index].set(metrics.pop("ratio"))
                values = values.at[index].set(metrics.pop("values"))
                details = details._replace(advantages=advantages, priorities=probs)
                grads = new if grads is None else jax.tree.map(jnp.add, grads, new)
                outputs.append(metrics)
                drawn.append(index)
            if config.mean_accumulate:
                grads = jax.tree.map(lambda g: g / accumulate, grads)
            skip = bad.any() & (config.on_nonfinite != "ignore")
            params, opt_state = step(state.params, state.opt_state, grads, skip)
            before = carry[1].values, carry[1].ratio
            values, ratio = (
                jnp.where(skip, old, new) for new, old in zip((values, ratio), before, strict=True)
            )
            first = jnp.where((state.culprit < 0) & bad.any(), bad.argmax(), state.culprit)
            state = TrainState(
                params=params,
                opt_state=opt_state,
                epoch=state.epoch,
                nonfinite=state.nonfinite + bad.any(),
                culprit=first.astype(jnp.int32),
            )
            metrics = jax.tree.map(lambda *x: sum(x), *outputs)
            details = details._replace(values=values, ratio=ratio)
            return (state, details), (metrics, jnp.stack(drawn))

        ones = jnp.ones_like(values)
        details = Details(ones, ones, values, ones[:, 0], None)
        (state, details), (metrics, drawn) = jax.lax.scan(group, (state, details), rows)
        details = details._replace(indices=drawn.reshape(count, -1))
        losses = {name: metrics[name].sum() / count for name in metrics}
        advantages, values = details.advantages, details.values
        returns = advantages + values
        variance = jnp.var(returns, ddof=1)
        explained = 1 - jnp.var(returns - values, ddof=1) / variance
        losses["explained_variance"] = jnp.where(variance == 0, jnp.nan, explained)
        return state._replace(epoch=state.epoch + 1), losses, details

    return Learner(init, update, names)
