"""One epoch's update."""

import math
import operator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from puffer_jax.kernels.reductions import first_nonfinite
from puffer_jax.nn import random
from puffer_jax.nn.params import GraphDef, merge, split
from puffer_jax.nn.torch_layout import Conversion, torch_layout
from puffer_jax.policies.protocol import is_recurrent
from puffer_jax.ppo import normalization, optimizers
from puffer_jax.ppo.advantage import Importance, advantage_of, priorities, unscaled_priorities
from puffer_jax.ppo.config import PuffeRLConfig, near_options
from puffer_jax.ppo.devices import ALONE, Share
from puffer_jax.ppo.experience import (
    Details,
    Experience,
    Hypers,
    Metrics,
    Number,
    Params,
    TrainState,
)
from puffer_jax.ppo.moments import Normalization, Samples, add, joined
from puffer_jax.ppo.objective import METRICS, loss
from puffer_jax.ppo.sizes import Sizes


@dataclass(frozen=True, eq=False)
class Learner:
    """The update of policies of one structure; see `make_learner`.

    Attributes:
        config: the options of the update.
        sizes: the sizes of the batch and its minibatches.
        graphdef: the static half of the policy.
        normalization: what is known about observations and rewards at the start; None: neither is
            normalised.
        to_torch: converts parameters, or their gradients, to torch's layout and names.
        from_torch: the inverse of `to_torch`.
        names: the names of the arrays that are checked to be finite; see `TrainState.culprit`.
        mixes_steps: whether a shuffled minibatch is of single steps rather than of segments.
        share: `update` is for one device of these, and its segments. Each draws its part of a
            minibatch from its own; priorities, the advantages' mean and deviation, losses, metrics
            and gradients are those of all.
    """

    config: PuffeRLConfig
    sizes: Sizes
    graphdef: GraphDef
    normalization: Normalization | None
    to_torch: Conversion
    from_torch: Conversion
    names: tuple[str, ...]
    mixes_steps: bool
    share: Share = ALONE

    def init(self, params: Params) -> TrainState:
        """The train state before the first update."""
        zero = jnp.zeros((), jnp.int32)
        numbers = _optimizer_numbers(self.config.hypers(), self.config.learning_rate)
        optimizer = optimizers.make(
            self.config.optimizer, self.to_torch, self.from_torch, **numbers
        )
        opt_state = optimizer.init(params)
        none = jnp.zeros((), jnp.float32)
        return TrainState(params, opt_state, zero, zero, zero - 1, self.normalization, none, none)

    def schedule_epoch(self, state: TrainState) -> Array:
        """How far the schedules are: played batches, at most as many as are planned."""
        # Dividing an int32 gives float32, even where everything else is float64.
        epoch = state.epoch.astype(float)
        if state.unplayed is not None:
            epoch = epoch - state.unplayed
        return jnp.clip(epoch, 0, self.sizes.epochs)

    def acting(self, state: TrainState) -> Params:
        """The parameters to act with: those of the policy that takes observations as they come."""
        return normalization.fold(self.graphdef, state.params, state.normalization)

    def update(
        self,
        state: TrainState,
        experience: Experience,
        key: PRNGKeyArray | None = None,
        hypers: Hypers | None = None,
        indices: Int[ArrayLike, "minibatches rows"] | None = None,
    ) -> tuple[TrainState, Metrics, Details]:
        """Learn from a batch.

        Args:
            state: the train state so far.
            experience: the batch.
            key: draws the rows of each minibatch, as `config.sampling` says.
            hypers: numbers or tracers that replace some of `config.hypers()`.
            indices: the rows of each minibatch, in place of `key`.

        Raises:
            ValueError: both `key` and `indices`, or neither; or a hyper-parameter that cannot be
                replaced, or that there is none of.
        """
        if (key is None) == (indices is None):
            raise ValueError("give either a key or the indices of the minibatches")
        share, own = self.share, self.sizes.divided(self.share.count)
        count, accumulate = own.minibatches, own.accumulate
        experience = _finite_where_unplayed(jax.tree.map(jnp.asarray, experience))
        gamma = self.config.gamma if hypers is None else hypers.get("gamma", self.config.gamma)
        experience, known = normalization.normalize_rewards(
            experience, state.normalization, gamma, share
        )
        terms = _terms(self, state, experience, hypers)
        if key is None:
            draws = jnp.asarray(indices)
        elif self.config.sampling == "shuffled":
            terms = _of_steps(terms) if self.mixes_steps else terms
            draws = _shuffled(share.key(key), len(terms.experience.values), own)
        else:
            draws = jax.random.split(share.key(key), count)
        draws = jnp.reshape(draws, (count // accumulate, accumulate, *draws.shape[1:]))

        values = terms.experience.values
        ones = jnp.ones_like(values)
        details = Details(ones, ones, values, ones[:, 0], None)
        (learned, details), (metrics, rows) = jax.lax.scan(
            lambda carry, draws: _optimizer_step(self, terms, *carry, draws),
            (state._replace(culprit=jnp.full_like(state.culprit, -1)), details),
            draws,
        )
        state = _if_finite(self, state, learned)
        shape = experience.values.shape
        details = details._replace(
            advantages=details.advantages.reshape(shape),
            ratio=details.ratio.reshape(shape),
            values=details.values.reshape(shape),
            indices=rows.reshape(count, -1),
        )
        losses = dict(zip(METRICS, metrics.sum(axis=0) / count, strict=True))
        written_back = terms.advantages is None
        losses["explained_variance"] = _explained_variance(
            details.advantages, details.values if written_back else experience.values, share
        )
        # The update itself normalises as the rollout did, or else its ratios would not begin at 1.
        policy = merge(self.graphdef, state.params)
        known = normalization.observed(policy, experience, known, share)
        if state.unplayed is not None and experience.mask is not None:
            played = experience.mask.mean(dtype=state.unplayed.dtype)
            if share.axis is not None:
                played = share.sum(played) / share.count
            unplayed, lost = add(state.unplayed, state.lost, 1 - played)
            state = state._replace(unplayed=unplayed, lost=lost)
        state = state._replace(epoch=state.epoch + 1, normalization=known)
        return state, losses, details


def make_learner(
    config: PuffeRLConfig, sizes: Sizes, policy: nnx.Module, share: Share = ALONE
) -> Learner:
    """The update of `pufferlib.pufferl.PuffeRL.train` for policies like `policy`.

    Quirks kept by default, each with an option in `PuffeRLConfig`: the advantage of a minibatch is
    not recomputed for the current ratio; gradients of accumulated minibatches add up; the
    advantages of the whole batch are recomputed for every minibatch, after the previous ones have
    written back their values and ratios (so a value is clipped around its latest estimate); and
    each minibatch is drawn by itself. Kept without one: advantages are standardised with the
    unbiased deviation and then weighted; the importance exponent anneals to beta0 + (1 - beta0)
    alpha; the learning rate changes once an epoch.
    """
    graphdef, params = split(policy)
    to_torch, from_torch = torch_layout(policy)
    tensors = sorted(jax.eval_shape(to_torch, params))
    names = (
        *("rewards", "advantages", "log-probabilities", "values", "loss"),
        *(f"gradient of {name}" for name in tensors),
        *(f"new {name}" for name in tensors),
    )
    known = normalization.initial(config, policy, sizes.agents)
    original = config.sampling == "shuffled" and config.advantage == "gae"
    mixes_steps = original and not is_recurrent(policy)
    return Learner(config, sizes, graphdef, known, to_torch, from_torch, names, mixes_steps, share)


def _finite_where_unplayed(experience: Experience) -> Experience:
    """The batch with 0 for whatever is not a number in steps that were not played."""
    if (mask := experience.mask) is None:
        return experience

    def finite(x: Array) -> Array:
        return jnp.where(mask | jnp.isfinite(x), x, 0)

    names = ("logprobs", "values", "rewards")
    return experience._replace(**{name: finite(getattr(experience, name)) for name in names})


class Minibatch(NamedTuple):
    """What one minibatch gives.

    Attributes:
        rows: the segments that were drawn.
        priorities: the priorities of all segments.
        advantages: the advantages of the whole batch, with the values and ratios before.
        loss: a scalar.
        metrics: scalars by the reference's names.
        ratio: the ratio of the new policy to the acting one, at the minibatch's steps.
        values: the new policy's values, at the same steps.
        gradients: the gradients of the loss.
        checked: the rewards, the advantages, the ratio and the values, to be checked to be finite;
            on many devices a NaN for each of them that is not on one of these.
    """

    rows: Int[Array, " rows"]
    priorities: Float[Array, " segments"]
    advantages: Float[Array, "segments time"]
    loss: Array
    metrics: Metrics
    ratio: Float[Array, "rows time"]
    values: Float[Array, "rows time"]
    gradients: Params
    checked: tuple[Array, ...]


class _Terms(NamedTuple):
    """What all minibatches of one update share.

    Attributes:
        experience: the batch, with the values from the rollout.
        hypers: the hyper-parameters, with replacements.
        beta: the importance exponent.
        step: the optimizer's step, at this epoch's learning rate.
        advantages: the advantages of the batch; None: each minibatch computes them anew.
    """

    experience: Experience
    hypers: Hypers
    beta: Number
    step: optimizers.OptimizerStep
    advantages: Float[Array, "segments time"] | None


def _terms(
    learner: Learner, state: TrainState, experience: Experience, replaced: Hypers | None
) -> _Terms:
    config, epochs = learner.config, learner.sizes.epochs
    if unknown := [name for name in replaced or {} if name not in config.hypers()]:
        raise ValueError(
            f"hypers may replace {', '.join(config.hypers())}; got "
            + ", ".join(near_options(unknown, config.hypers()))
        )
    # Traced numbers must not widen the arrays; Python numbers do not, and are exact.
    dtype = experience.values.dtype
    traced = {name: jnp.asarray(x, dtype) for name, x in (replaced or {}).items()}
    hypers: Hypers = config.hypers() | traced
    rate, beta0 = hypers["learning_rate"], hypers["prio_beta0"]
    epoch = learner.schedule_epoch(state)
    if config.anneal_lr:
        rate = optimizers.cosine_schedule(rate, epochs, hypers["min_lr_ratio"])(epoch)
    numbers = _optimizer_numbers(hypers, rate)
    step = optimizers.make_step(config.optimizer, learner.to_torch, learner.from_torch, **numbers)
    beta = beta0 + (1 - beta0) * hypers["prio_alpha"] * epoch / epochs
    advantages = None
    if config.advantage == "gae":
        # With ratios of 1 and no bounds on them, V-trace's advantages are GAE's.
        unbounded = hypers | {"vtrace_rho_clip": math.inf, "vtrace_c_clip": math.inf}
        advantages = advantage_of(experience, jnp.ones_like(experience.values), unbounded)
    return _Terms(experience, hypers, beta, step, advantages)


def _optimizer_numbers(hypers: Hypers, learning_rate: Number) -> dict[str, Number]:
    return {
        "learning_rate": learning_rate,
        "max_grad_norm": hypers["max_grad_norm"],
        "beta1": hypers["adam_beta1"],
        "beta2": hypers["adam_beta2"],
        "eps": hypers["adam_eps"],
    }


def _optimizer_step(
    learner: Learner, terms: _Terms, state: TrainState, details: Details, draws: Array
) -> tuple[tuple[TrainState, Details], tuple[Array, Array]]:
    """The minibatches of one optimizer step, and the step itself."""
    before, gradients = details, None
    none = jnp.int32(len(learner.names))
    culprit, metrics, rows = none, [], []
    for draw in draws:
        current = terms.experience
        if terms.advantages is None:
            current = current._replace(values=details.values)
        part = _minibatch(learner, terms, state, current, details.ratio, draw)
        culprit = jnp.minimum(culprit, _nonfinite(learner, part))
        details = details._replace(
            advantages=part.advantages,
            ratio=details.ratio.at[part.rows].set(part.ratio),
            values=details.values.at[part.rows].set(part.values),
            priorities=part.priorities,
        )
        gradients = _sum(gradients, part.gradients)
        # One array: a program writes one into its results, and not each number by itself.
        metrics.append(jnp.stack([part.metrics[name] for name in METRICS]))
        rows.append(part.rows)
    if learner.config.mean_accumulate:
        gradients = jax.tree.map(lambda g: g / len(rows), gradients)
    bad = culprit < none
    skip = bad & (learner.config.on_nonfinite != "ignore")
    params, opt_state = terms.step(state.params, state.opt_state, gradients, skip)
    details = details._replace(
        values=jnp.where(skip, before.values, details.values),
        ratio=jnp.where(skip, before.ratio, details.ratio),
    )
    state = state._replace(
        params=params,
        opt_state=opt_state,
        nonfinite=state.nonfinite + bad,
        culprit=jnp.where((state.culprit < 0) & bad, culprit, state.culprit),
    )
    return (state, details), (reduce(operator.add, metrics), jnp.stack(rows))


def _minibatch(
    learner: Learner,
    terms: _Terms,
    state: TrainState,
    experience: Experience,
    ratio: Float[Array, "segments time"],
    draw: Array,
) -> Minibatch:
    """Loss and gradients of the rows `draw`, or of rows drawn with the key `draw`."""
    hypers, advantages, share = terms.hypers, terms.advantages, learner.share
    count = len(experience.values)
    if advantages is None:
        advantages = advantage_of(experience, ratio, hypers)
    if learner.config.sampling == "shuffled":
        probs = jnp.full(count, 1 / count, advantages.dtype)
    else:
        probs = priorities(advantages, hypers["prio_alpha"])
    if jnp.issubdtype(draw.dtype, jax.dtypes.prng_key):
        drawn = learner.sizes.divided(share.count).minibatch_segments
        rows = _drawn(draw, drawn, probs, learner.config.sampling)
    else:
        rows = draw
    if share.axis is not None and learner.config.sampling != "shuffled":
        own = unscaled_priorities(advantages, hypers["prio_alpha"])
        weights = Importance(own[rows, None], own.sum(), count * share.count, terms.beta)
    else:
        weights = (count * probs[rows, None]) ** -terms.beta
    batch = jax.tree.map(lambda x: x[rows], experience)

    def objective(params: Params) -> tuple[Array, Metrics]:
        policy = merge(learner.graphdef, learner.acting(state._replace(params=params)))
        recompute = learner.config.recompute_advantage
        return loss(policy, batch, advantages[rows], weights, hypers, recompute, share)

    (total, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    new_ratio, values = metrics.pop("ratio"), metrics.pop("values")
    checked = experience.rewards, advantages, new_ratio, values
    if share.axis is not None:
        numbers = [total, *metrics.values(), *(_nan_unless_finite(x) for x in checked)]
        gradients, joint = share.sum((gradients, jnp.stack(numbers)))
        total, *means = joint[: 1 + len(metrics)]
        metrics, checked = dict(zip(metrics, means, strict=True)), tuple(joint[-len(checked) :])
    return Minibatch(rows, probs, advantages, total, metrics, new_ratio, values, gradients, checked)


def _nan_unless_finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x).all(), 0, jnp.nan).astype(x.dtype)


def _nonfinite(learner: Learner, part: Minibatch) -> Int[Array, ""]:
    """The first of `learner.names` whose array is not finite; if all are, a larger number."""
    arrays = jax.tree.leaves((part.checked, part.loss, learner.to_torch(part.gradients)))
    first = first_nonfinite(arrays)
    return jnp.where(first < len(arrays), first, len(learner.names))


def _if_finite(learner: Learner, before: TrainState, after: TrainState) -> TrainState:
    """The state after an update, with the parameters from before it if the new ones are not finite.

    Finite gradients can make such: of a rate that is too high, or with an epsilon of 0.
    """
    arrays = jax.tree.leaves(learner.to_torch(after.params))  # as the names, in their order
    first = first_nonfinite(arrays)
    broken = (first < len(arrays)) & (learner.config.on_nonfinite != "ignore")
    params, opt_state = jax.tree.map(
        lambda old, new: jnp.where(broken, old, new),
        (before.params, before.opt_state),
        (after.params, after.opt_state),
    )
    # All that was not finite in the minibatches after it came of that.
    culprit = jnp.where(broken, len(learner.names) - len(arrays) + first, after.culprit)
    return after._replace(
        params=params,
        opt_state=opt_state,
        nonfinite=after.nonfinite + broken,
        culprit=jnp.where(culprit < 0, before.culprit, culprit).astype(jnp.int32),
    )


def _sum(total: Params | None, gradients: Params) -> Params:
    return gradients if total is None else jax.tree.map(jnp.add, total, gradients)


def _shuffled(key: PRNGKeyArray, rows: int, sizes: Sizes) -> Int[Array, "minibatches rows"]:
    """The rows of each minibatch: those of one random order of all rows after another."""
    shape = sizes.minibatches, rows * sizes.minibatch_segments // sizes.segments
    keys = jax.random.split(key, -(-math.prod(shape) // rows))
    orders = [jax.random.permutation(random.fast(key), rows) for key in keys]
    return jnp.concatenate(orders)[: math.prod(shape)].reshape(shape)


def _of_steps(terms: _Terms) -> _Terms:
    """The same with a row for each step; what only the advantages are computed from is left out."""
    whole = terms.experience._replace(
        starts=None, final_values=None, state=None, last=None, waits=None
    )
    experience, advantages = jax.tree.map(
        lambda x: x.reshape(-1, 1, *x.shape[2:]), (whole, terms.advantages)
    )
    return terms._replace(experience=experience, advantages=advantages)


def _drawn(
    key: PRNGKeyArray, count: int, probs: Float[Array, " segments"], sampling: str
) -> Int[Array, " rows"]:
    """Rows of one minibatch, each in proportion to its priority."""
    again = sampling == "replacement"
    return jax.random.choice(random.fast(key), probs.size, (count,), replace=again, p=probs)


def _explained_variance(advantages: Array, values: Array, share: Share) -> Array:
    returns = advantages + values
    if share.axis is None:
        variance = jnp.var(returns, ddof=1)
        rest = jnp.var(returns - values, ddof=1)
    else:
        both = jnp.stack([returns, returns - values]).reshape(2, -1)
        squares = both.var(axis=1) * both.shape[1]
        own = Samples(jnp.asarray(both.shape[1], both.dtype), both.mean(axis=1), squares)
        (count, _, (variance, rest)), _ = joined(own, share)
        variance, rest = variance / (count - 1), rest / (count - 1)
    explained = 1 - rest / variance
    return jnp.where(variance == 0, jnp.nan, explained)
