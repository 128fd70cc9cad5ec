"""What a config of RLlib needs so that a policy of ours acts, and learns, in its algorithm."""

import os
from typing import Any

from flax import nnx
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import (
    AddObservationsFromEpisodesToBatch,
    AddStatesFromEpisodesToBatch,
    AddTimeDimToBatchAndZeroPad,
    BatchIndividualItems,
)

from puffer_jax.base import spaces
from puffer_jax.rllib.learner import PPOLearner
from puffer_jax.rllib.module import spec


def configure(
    config: AlgorithmConfig,
    policy: nnx.Module | str | os.PathLike[str],
    env: spaces.Env = None,
    *,
    seed: int | None = None,
    max_seq_len: int = 20,
) -> AlgorithmConfig:
    """Let a policy act in the env runners of a config and, if it is PPO's, learn in JAX.

        config = PPOConfig().environment("CartPole-v1").training(lr=1e-3)
        config = puffer_jax.rllib.configure(config, policy)

    It sets the module, the connectors from environment to module (`env_to_module`), that actions
    are clipped but not normalised, and for PPO the learner, in this process and without a KL term
    (`PPOLearner`). All else is the config's.

    Args:
        config: of a single agent, on RLlib's new API stack. It is changed, and returned.
        policy: see `spec`.
        env: see `spec`.
        seed: see `spec`.
        max_seq_len: see `spec`.

    Raises:
        ValueError: the config is of several agents, or of the old API stack; or as `spec`.
    """
    if config.is_multi_agent:
        raise ValueError("the config is of several agents, and configure is for a single one")
    if not config.enable_rl_module_and_learner:
        raise ValueError("the config is of RLlib's old API stack, which has no RLModule")
    config.rl_module(rl_module_spec=spec(policy, env, seed=seed, max_seq_len=max_seq_len))
    config.env_runners(
        env_to_module_connector=env_to_module,
        add_default_connectors_to_env_to_module_pipeline=False,
    )
    config.environment(normalize_actions=False, clip_actions=True)
    if isinstance(config, PPOConfig):
        config.learners(num_learners=0, learner_class=PPOLearner)
        config.training(use_kl_loss=False)
    return config


def env_to_module(*_: Any) -> list[ConnectorV2]:
    """RLlib's default connectors for a single agent but the last, which makes torch's tensors.

    That one, `NumpyToTensor`, refuses every module whose `framework` is not "torch". Connectors of
    your own go before these.
    """
    return [
        AddObservationsFromEpisodesToBatch(),
        AddTimeDimToBatchAndZeroPad(),
        AddStatesFromEpisodesToBatch(),
        BatchIndividualItems(),
    ]
