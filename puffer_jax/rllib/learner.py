"""A Learner of RLlib that learns by our PPO, in JAX."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.experience import TrainState
from puffer_jax.ppo.sizes import Sizes
from puffer_jax.ppo.update import Learner as OurLearner
from puffer_jax.ppo.update import make_learner
from puffer_jax.rllib.episodes import ends_of, experience_of
from puffer_jax.rllib.module import PolicyModule

UNLIMITED = 1e30
"""A norm that no gradient reaches, where RLlib's config has no `grad_clip`."""


def ppo_config(config: Any) -> PuffeRLConfig:
    """RLlib's options of PPO as ours.

    The objective is ours: the values are clipped around those of the rollout by `vf_clip_param`
    (RLlib clips the squared error there), and the value loss is half the squared error.

    Raises:
        ValueError: an option asks for what our objective has not.
    """
    wrong = []
    if config.use_kl_loss:
        wrong.append("use_kl_loss=True (there is no KL term; say use_kl_loss=False)")
    for name in ("lr", "entropy_coeff"):
        if not isinstance(getattr(config, name), int | float):
            wrong.append(f"{name}={getattr(config, name)!r} (a schedule; give a number)")
    if config.grad_clip is not None and config.grad_clip_by != "global_norm":
        wrong.append(f"grad_clip_by={config.grad_clip_by!r} (only 'global_norm')")
    if not config.use_gae or not config.use_critic:
        wrong.append("use_gae=False or use_critic=False (advantages are GAE's, of a critic)")
    if wrong:
        raise ValueError("puffer_jax.rllib.PPOLearner cannot do " + "; ".join(wrong))
    return PuffeRLConfig.recommended(
        learning_rate=config.lr,
        anneal_lr=False,
        optimizer="adam",
        adam_beta1=0.9,
        adam_eps=1e-8,
        max_grad_norm=config.grad_clip or UNLIMITED,
        gamma=config.gamma,
        gae_lambda=config.lambda_,
        clip_coef=config.clip_param,
        vf_coef=config.vf_loss_coeff,
        vf_clip_coef=config.vf_clip_param,
        ent_coef=config.entropy_coeff,
        normalize_observations=False,
        normalize_rewards=False,
    )


def _unused(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("a PPOLearner computes its update in JAX, as a whole")


class PPOLearner(Learner):
    """PPO of a `PolicyModule` in RLlib's algorithm `PPO`; `configure` puts it into a config.

    The update is `puffer_jax.ppo`'s, compiled by JAX: GAE, then `num_epochs` passes over the batch
    in shuffled minibatches of `minibatch_size`: of steps or, where the policy has a state, of rows
    of `max_seq_len` steps (see `spec`) that begin with the state they were sampled with. Advantages
    do not reach beyond their row, which without a state has `minibatch_size` steps: there the value
    takes over.

    It runs in the algorithm's process (`num_learners=0`): RLlib starts others only for torch. Of
    the config's schedules and of KL it knows nothing, and says so (`ppo_config`).

    Raises:
        ValueError: the config asks for what there is not; there are several modules, or one that is
            no `PolicyModule`, or whose episodes start from another state than zeros; or the data
            are no episodes of its own.
        FloatingPointError: what was learned from or learned is not finite; it is named.
    """

    framework = None  # type: ignore[reportAssignmentType]

    def build(self) -> None:
        """Make the module and the optimizer; called by RLlib."""
        if self.config.num_learners:
            raise ValueError(
                f"num_learners is {self.config.num_learners}; RLlib starts learners in other "
                "processes only for torch, so it must be 0"
            )
        self._options = ppo_config(self.config)
        self._updates: dict[Sizes, tuple[OurLearner, Callable[..., Any]]] = {}
        super().build()

    @property
    def policy_module(self) -> PolicyModule:
        """The one module."""
        return self.module[DEFAULT_MODULE_ID]  # type: ignore[return-value]

    def configure_optimizers(self) -> None:
        """Adam's state; called by RLlib."""
        modules = dict(self.module.items())
        if [*modules] != [DEFAULT_MODULE_ID] or not isinstance(
            modules[DEFAULT_MODULE_ID], PolicyModule
        ):
            kinds = ", ".join(f"{name}: {type(m).__name__}" for name, m in modules.items())
            raise ValueError(
                f"a PPOLearner has one PolicyModule, {DEFAULT_MODULE_ID!r}; got {kinds}"
            )
        module = self.policy_module
        wrong = [name for name, x in module.get_initial_state().items() if x.any()]
        if wrong:
            raise ValueError(
                f"{type(module.policy).__name__}.initial_state is not zero in {', '.join(wrong)}; "
                "where an episode starts within a row, the state that is learned from is zero"
            )
        one = make_learner(self._options, Sizes(1, 1, 1, 1, 1, 1, 1), module.policy)
        self._train: TrainState = one.init(module.params)

    def update(
        self,
        *_: Any,
        training_data: TrainingData | None = None,
        episodes: list[Any] | None = None,
        timesteps: dict[str, Any] | None = None,
        num_epochs: int = 1,
        minibatch_size: int | None = None,
        **__: Any,
    ) -> Any:
        """Learn from episodes; called by RLlib.

        Returns:
            The metrics: the losses by the names of `puffer_jax.ppo`, and RLlib's counts of steps.
        """
        self._check_is_built()
        self.before_gradient_based_update(timesteps=timesteps or {})
        data = training_data or TrainingData(episodes=episodes)
        data.validate()
        data.solve_refs()
        if not data.episodes:
            raise ValueError("a PPOLearner learns from the episodes of env runners, and got none")
        self._weights_seq_no += 1
        module = self.policy_module
        experience, sizes = self._experience(data.episodes, num_epochs, minibatch_size)
        if sizes not in self._updates:
            learner = make_learner(self._options, sizes, module.policy)
            self._updates[sizes] = learner, jax.jit(learner.update)
        learner, update = self._updates[sizes]
        key = jax.random.fold_in(jax.random.key(self.config.seed or 0), self._weights_seq_no)
        # The module's parameters may have been set since the last update.
        before = self._train._replace(params=module.params)
        self._train, losses, _details = update(before, experience, key)
        if self._train.nonfinite > before.nonfinite:
            name = learner.names[int(self._train.culprit)]
            raise FloatingPointError(f"update {self._weights_seq_no}: {name} is not finite")
        module.params = self._train.params
        self._log(losses, experience)
        self.after_gradient_based_update(timesteps=timesteps or {})
        return self.metrics.reduce()

    def _experience(
        self, episodes: list[Any], epochs: int, minibatch: int | None
    ) -> tuple[Any, Sizes]:
        """The batch, and the sizes of its update."""
        module, count = self.policy_module, sum(map(len, episodes))
        zeros = module.get_initial_state()
        minibatch = min(minibatch or count, count)
        horizon, unit = minibatch, 1
        if zeros:
            horizon = min(module.max_seq_len, minibatch)
            unit = minibatch // horizon
        experience = experience_of(
            episodes,
            self._final_values(episodes, zeros),
            horizon=horizon,
            unit=unit,
            start=module.start,
            zeros=zeros,
        )
        rows = len(experience.values)
        return experience, Sizes(rows, rows, horizon, unit, epochs * rows // unit, 1, 1)

    def _final_values(self, episodes: list[Any], zeros: dict[str, np.ndarray]) -> np.ndarray:
        ends = ends_of(episodes, zeros)
        size = 1 << (len(episodes) - 1).bit_length()  # few sizes, since each is compiled for
        repeated = jax.tree.map(lambda x: np.resize(x, (size, *x.shape[1:])), ends)
        batch = {Columns.OBS: repeated.observations}
        if zeros:
            batch = {
                Columns.OBS: jax.tree.map(lambda x: x[:, None], repeated.observations),
                Columns.STATE_IN: repeated.state,
            }
        values = self.policy_module.act(batch)[Columns.VF_PREDS]
        return values.reshape(-1)[: len(episodes)]

    def _log(self, losses: dict[str, Any], experience: Any) -> None:
        for name, value in losses.items():
            self.metrics.log_value((DEFAULT_MODULE_ID, name), float(value), window=1)
        played = experience.values[experience.mask]
        steps = {DEFAULT_MODULE_ID: SampleBatch({Columns.VF_PREDS: played})}
        batch = MultiAgentBatch(steps, env_steps=len(played))
        self._log_metrics(batch=batch)
        self._log_steps_trained_metrics(batch)

    def _get_optimizer_state(self) -> dict[str, PyTree]:
        leaves = jax.tree.leaves(self._train._replace(params={}))
        return {"leaves": [np.asarray(leaf) for leaf in leaves]}

    def _set_optimizer_state(self, state: dict[str, PyTree]) -> None:
        structure = jax.tree.structure(self._train._replace(params={}))
        restored = jax.tree.unflatten(structure, state["leaves"])
        self._train = restored._replace(params=self._train.params)

    # What RLlib asks of a learner that is made of torch's parts.
    configure_optimizers_for_module = compute_gradients = apply_gradients = _unused
    compute_loss_for_module = get_parameters = get_param_ref = _update = _unused
    _convert_batch_type = _get_tensor_variable = _unused
    _get_optimizer_lr = _set_optimizer_lr = staticmethod(_unused)
    _get_clip_function = _get_global_norm_function = staticmethod(_unused)
