"""PufferLib's PPO update as pure functions of arrays.

Arrays are (segments, time). As in the reference, `rewards[:, t]` and `terminals[:, t]` are what
came *with* observation t: the outcome of action t - 1. Schulman et al. 2017 (PPO) with the
advantage of `puff_advantage` and segments drawn by priority.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from puffer_jax import optim
from puffer_jax.config import PuffeRLConfig, Sizes
from puffer_jax.kernels.recurrence import recurrence
from puffer_jax.nn import random
from puffer_jax.nn.params import merge, split
from puffer_jax.nn.sampling import sample_logits
from puffer_jax.nn.torch_layout import torch_layout

Params = dict[str, Any]

Hypers = Mapping[str, Any]


class Last(NamedTuple):
    """What followed the last action of each segment; arrays (segments,)."""

    rewards: Array
    terminals: Array
    values: Array
    final_values: Array | None


class Experience(NamedTuple):
    """What a rollout leaves for the update; arrays (segments, time, ...).

    Attributes:
        observations: an array or a tree of them.
        actions: as `sample_logits` gives them.
        logprobs: of the actions.
        values: of the observations.
        rewards: that came with the observations.
        terminals: 1.0 where the episode had ended when the observation came, else 0.0.
        starts: whether the observation is the first of an episode; None: states are not reset.
        mask: whether the step was played; None: all were.
        final_values: the value of the last observation of an episode that was truncated when this
            one came, else 0; None: truncation is ignored.
        state: the recurrent state before each segment, (segments, hidden); None: zeros.
        last: None: the last step of a segment has advantage 0.
    """

    observations: Any
    actions: Array
    logprobs: Array
    values: Array
    rewards: Array
    terminals: Array
    starts: Array | None = None
    mask: Array | None = None
    final_values: Array | None = None
    state: dict[str, Array] | None = None
    last: Last | None = None


class TrainState(NamedTuple):
    """What an update changes.

    Attributes:
        params: as `puffer_jax.split` gives them.
        opt_state: the optimizer's.
        epoch: int32, updates of the whole batch so far.
        nonfinite: int32, minibatches whose loss or gradient was not finite.
        culprit: int32, index into `Learner.names` of the first array that was not; -1: none.
    """

    params: Params
    opt_state: Any
    epoch: Array
    nonfinite: Array
    culprit: Array


class Details(NamedTuple):
    """The arrays of an update, for whoever wants to look: after its last minibatch."""

    advantages: Float[Array, "segments time"]
    ratio: Float[Array, "segments time"]
    values: Float[Array, "segments time"]
    priorities: Float[Array, " segments"]
    indices: Int[Array, "minibatches rows"] | None


def puff_advantage(
    values: Float[ArrayLike, "segments time"],
    rewards: Float[ArrayLike, "segments time"],
    terminals: Float[ArrayLike, "segments time"],
    ratio: Float[ArrayLike, "segments time"],
    *,
    gamma: Any,
    gae_lambda: Any,
    vtrace_rho_clip: Any,
    vtrace_c_clip: Any,
    mask: Bool[ArrayLike, "segments time"] | None = None,
) -> Float[Array, "segments time"]:
    """Generalised advantages with V-trace's clipped ratios (reference: `compute_puff_advantage`).

        delta_t = min(ratio_t, rho) (r_{t+1} + gamma (1 - d_{t+1}) v_{t+1} - v_t)
        A_t = delta_t + gamma lambda min(ratio_t, c) (1 - d_{t+1}) A_{t+1}

    Quirk kept: the last step has no successor, and its advantage is 0. With ratio 1 this is GAE
    (Schulman et al. 2016); with lambda 1, V-trace (Espeholt et al. 2018).

    Args:
        values: of the observations.
        rewards: that came with the observations.
        terminals: 1.0 where the episode had ended when the observation came.
        ratio: of the current policy to the one that acted.
        gamma: discount.
        gae_lambda: decay of the trace.
        vtrace_rho_clip: rho.
        vtrace_c_clip: c.
        mask: where False the step was not played: its advantage is 0.
    """
    values, rewards, terminals, ratio = map(jnp.asarray, (values, rewards, terminals, ratio))
    alive = 1 - terminals[:, 1:]
    before = values[:, :-1]
    rho = jnp.minimum(ratio[:, :-1], vtrace_rho_clip)
    c = jnp.minimum(ratio[:, :-1], vtrace_c_clip)
    delta = rho * (rewards[:, 1:] + gamma * values[:, 1:] * alive - before)
    decay = gamma * gae_lambda * c * alive
    if mask is not None:
        played = jnp.asarray(mask)[:, :-1]
        delta, decay = delta * played, decay * played

    return jnp.pad(recurrence(delta, decay), ((0, 0), (0, 1)))


def priorities(
    advantages: Float[Array, "segments time"], prio_alpha: Any
) -> Float[Array, " segments"]:
    """Weights of the segments to draw, (sum |A|) ** alpha, which sum to 1 up to 1e-6."""
    weights = jnp.abs(advantages).sum(axis=1) ** prio_alpha
    weights = jnp.where(jnp.isfinite(weights), weights, 0)
    return (weights + 1e-6) / (weights.sum() + 1e-6)


def is_recurrent(policy: Any) -> bool:
    """Whether the policy carries a state from step to step (`LSTMWrapper` and its like)."""
    return hasattr(policy, "initial_state")


def evaluate_segments(
    policy: Any, experience: Experience
) -> tuple[Any, Float[Array, "segments time"]]:
    """Logits, flat (segments * time, ...), and values (segments, time) of stored segments."""
    shape = experience.logprobs.shape
    if is_recurrent(policy):
        starts = {} if experience.starts is None else {"done": experience.starts}
        logits, values, _ = policy.forward(experience.observations, experience.state, **starts)
    else:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), experience.observations)
        logits, values = policy.forward(flat)
    return logits, values.reshape(shape)


def _clamp(x: Array, low: Any, high: Any) -> Array:
    # As torch's, it passes the gradient at the bounds; jnp.clip halves it.
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def _mean(x: Array, mask: Array | None) -> Array:
    return x.mean() if mask is None else (x * mask).sum() / jnp.maximum(mask.sum(), 1)


def _standardise(x: Array, mask: Array | None) -> Array:
    count = x.size if mask is None else mask.sum()
    centred = x - _mean(x, mask)
    squares = centred**2 if mask is None else centred**2 * mask
    return centred / (jnp.sqrt(squares.sum() / (count - 1)) + 1e-8)


def loss(
    policy: Any,
    batch: Experience,
    advantages: Float[Array, "rows time"],
    weights: Float[Array, "rows 1"],
    hypers: Hypers,
    recompute_advantage: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """The clipped PPO loss of a minibatch.

    Args:
        policy: to improve.
        batch: the minibatch's rows; `values` are what the value loss is clipped around.
        advantages: of its steps.
        weights: of its rows, against the bias of drawing by priority.
        hypers: `PuffeRLConfig.hypers()`.
        recompute_advantage: see `PuffeRLConfig`.

    Returns:
        The loss, and the metrics by the reference's names with "ratio" and "values" (rows, time).
    """
    logits, values = evaluate_segments(policy, batch)
    _, logprobs, entropy = sample_logits(logits, action=batch.actions)
    logratio = logprobs.reshape(batch.logprobs.shape) - batch.logprobs
    ratio = jnp.exp(logratio)
    clip, mask = hypers["clip_coef"], batch.mask
    returns = advantages + batch.values
    if recompute_advantage:
        advantages = advantage_of(batch, jax.lax.stop_gradient(ratio), hypers)
    scaled = weights * _standardise(advantages, mask)
    policy_loss = jnp.maximum(-scaled * ratio, -scaled * _clamp(ratio, 1 - clip, 1 + clip))
    bound = hypers["vf_clip_coef"]
    clipped = batch.values + _clamp(values - batch.values, -bound, bound)
    value_loss = jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    entropy = entropy.reshape(ratio.shape)
    metrics = {
        "policy_loss": _mean(policy_loss, mask),
        "value_loss": 0.5 * _mean(value_loss, mask),
        "entropy": _mean(entropy, mask),
        "old_approx_kl": _mean(-logratio, mask),
        "approx_kl": _mean((ratio - 1) - logratio, mask),
        "clipfrac": _mean((jnp.abs(ratio - 1) > clip).astype(ratio.dtype), mask),
        "importance": _mean(ratio, mask),
    }
    total = (
        metrics["policy_loss"]
        + hypers["vf_coef"] * metrics["value_loss"]
        - hypers["ent_coef"] * metrics["entropy"]
    )
    return total, metrics | {"ratio": ratio, "values": values}


def advantage_of(
    experience: Experience, ratio: Float[Array, "segments time"], hypers: Hypers
) -> Float[Array, "segments time"]:
    """`puff_advantage` of stored segments, with what the options of the rollout stored."""
    names = ("gamma", "gae_lambda", "vtrace_rho_clip", "vtrace_c_clip")
    rewards, terminals = experience.rewards, experience.terminals
    values, mask, last = experience.values, experience.mask, experience.last
    if experience.final_values is not None:
        rewards = rewards + hypers["gamma"] * experience.final_values
    if last is not None:
        extra = last.rewards
        if last.final_values is not None:
            extra = extra + hypers["gamma"] * last.final_values
        rewards, terminals, values, ratio = (
            jnp.concatenate([x, y[:, None]], axis=1)
            for x, y in (
                (rewards, extra),
                (terminals, last.terminals),
                (values, last.values),
                (ratio, jnp.ones_like(last.values)),
            )
        )
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, 1)))
    advantages = puff_advantage(
        values, rewards, terminals, ratio, **{name: hypers[name] for name in names}, mask=mask
    )
    return advantages[:, : experience.values.shape[1]]


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
        opt_state = optimizer(optim.make, config.hypers(), config.learning_rate).init(params)
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
            rate = optim.cosine_schedule(rate, sizes.epochs)(epoch)
        step = optimizer(optim.make_step, hypers, rate)
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
