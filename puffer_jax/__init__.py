"""PufferLib's policies, helpers, trainer and checkpoints in JAX/Flax NNX, with proved parity.

Names are imported on first use, so that `import puffer_jax` costs nothing and the worker
processes of environments never load JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what _EXPORTS and _SUBMODULES say, for type checkers
    from puffer_jax import cleanrl as cleanrl
    from puffer_jax import distributed as distributed
    from puffer_jax import emulation as emulation
    from puffer_jax import environments as environments
    from puffer_jax import export as export
    from puffer_jax import optim as optim
    from puffer_jax import parity as parity
    from puffer_jax import plot as plot
    from puffer_jax import ppo as ppo
    from puffer_jax import random as random
    from puffer_jax import rllib as rllib
    from puffer_jax import sb3 as sb3
    from puffer_jax import v4 as v4
    from puffer_jax import vector as vector
    from puffer_jax import weights as weights
    from puffer_jax.base.actions import playable as playable
    from puffer_jax.environments.jax_native import as_jax_env as as_jax_env
    from puffer_jax.nn.cores.gru import GRU as GRU
    from puffer_jax.nn.cores.lstm import LSTM as LSTM
    from puffer_jax.nn.cores.mingru import MinGRU as MinGRU
    from puffer_jax.nn.distributions import Normal as Normal
    from puffer_jax.nn.distributions import TanhNormal as TanhNormal
    from puffer_jax.nn.distributions import entropy as entropy
    from puffer_jax.nn.distributions import entropy_probs as entropy_probs
    from puffer_jax.nn.distributions import log_prob as log_prob
    from puffer_jax.nn.distributions import mask_logits as mask_logits
    from puffer_jax.nn.initializers import layer_init as layer_init
    from puffer_jax.nn.initializers import torch_init as torch_init
    from puffer_jax.nn.params import merge as merge
    from puffer_jax.nn.params import split as split
    from puffer_jax.nn.sampling import sample_logits as sample_logits
    from puffer_jax.policies.check import PolicyReport as PolicyReport
    from puffer_jax.policies.check import check_policy as check_policy
    from puffer_jax.policies.convolutional import Convolutional as Convolutional
    from puffer_jax.policies.default import Default as Default
    from puffer_jax.policies.mlp import MLP as MLP
    from puffer_jax.policies.nativize import flatten_observations as flatten_observations
    from puffer_jax.policies.nativize import flattened_tensor_size as flattened_tensor_size
    from puffer_jax.policies.nativize import nativize_dtype as nativize_dtype
    from puffer_jax.policies.nativize import nativize_tensor as nativize_tensor
    from puffer_jax.policies.nativize import numpy_to_jax_dtype_dict as numpy_to_jax_dtype_dict
    from puffer_jax.policies.nativize import unflatten_observations as unflatten_observations
    from puffer_jax.policies.procgen import ConvSequence as ConvSequence
    from puffer_jax.policies.procgen import ProcgenResnet as ProcgenResnet
    from puffer_jax.policies.procgen import ResidualBlock as ResidualBlock
    from puffer_jax.policies.recurrent import LSTMWrapper as LSTMWrapper
    from puffer_jax.policies.recurrent import Recurrent as Recurrent
    from puffer_jax.policies.stateful import reset_where as reset_where
    from puffer_jax.ppo.config import PuffeRLConfig as PuffeRLConfig
    from puffer_jax.ppo.devices import mesh as mesh
    from puffer_jax.ppo.population import train_population as train_population
    from puffer_jax.ppo.training import make_train as make_train
    from puffer_jax.run.loggers import JSONLLogger as JSONLLogger
    from puffer_jax.run.loggers import MultiLogger as MultiLogger
    from puffer_jax.run.loggers import NoLogger as NoLogger
    from puffer_jax.run.loggers import TensorBoardLogger as TensorBoardLogger
    from puffer_jax.run.loggers import WandbLogger as WandbLogger
    from puffer_jax.run.trainer import NonFiniteError as NonFiniteError
    from puffer_jax.run.trainer import PuffeRL as PuffeRL
    from puffer_jax.weights.files import load_weights as load_weights
    from puffer_jax.weights.files import policy_from_checkpoint as policy_from_checkpoint
    from puffer_jax.weights.files import save_weights as save_weights
    from puffer_jax.weights.state_dicts import load_state_dict as load_state_dict
    from puffer_jax.weights.state_dicts import state_dict as state_dict

_EXPORTS = {
    "base.actions": ("playable",),
    "environments.jax_native": ("as_jax_env",),
    "nn.cores.gru": ("GRU",),
    "nn.cores.lstm": ("LSTM",),
    "nn.cores.mingru": ("MinGRU",),
    "nn.distributions": (
        "Normal",
        "TanhNormal",
        "entropy",
        "entropy_probs",
        "log_prob",
        "mask_logits",
    ),
    "nn.initializers": (
        "layer_init",
        "torch_init",
    ),
    "nn.params": (
        "merge",
        "split",
    ),
    "nn.sampling": ("sample_logits",),
    "policies.check": (
        "PolicyReport",
        "check_policy",
    ),
    "policies.convolutional": ("Convolutional",),
    "policies.default": ("Default",),
    "policies.mlp": ("MLP",),
    "policies.nativize": (
        "flatten_observations",
        "flattened_tensor_size",
        "nativize_dtype",
        "nativize_tensor",
        "numpy_to_jax_dtype_dict",
        "unflatten_observations",
    ),
    "policies.procgen": (
        "ConvSequence",
        "ProcgenResnet",
        "ResidualBlock",
    ),
    "policies.recurrent": (
        "LSTMWrapper",
        "Recurrent",
    ),
    "policies.stateful": ("reset_where",),
    "ppo.config": ("PuffeRLConfig",),
    "ppo.devices": ("mesh",),
    "ppo.population": ("train_population",),
    "ppo.training": ("make_train",),
    "run.loggers": (
        "JSONLLogger",
        "MultiLogger",
        "NoLogger",
        "TensorBoardLogger",
        "WandbLogger",
    ),
    "run.trainer": (
        "NonFiniteError",
        "PuffeRL",
    ),
    "weights.files": (
        "load_weights",
        "policy_from_checkpoint",
        "save_weights",
    ),
    "weights.state_dicts": (
        "load_state_dict",
        "state_dict",
    ),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
_SUBMODULES = (
    *("cleanrl", "distributed", "emulation", "environments", "export", "optim", "parity", "plot"),
    *("ppo", "random", "v4", "vector", "weights"),
)
# What needs an extra to be imported at all, and so is not in `from puffer_jax import *`.
_EXTRAS = ("rllib", "sb3")
__all__ = sorted([*_HOME, *_SUBMODULES])  # type: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in (*_SUBMODULES, *_EXTRAS):
        return importlib.import_module(f"puffer_jax.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"puffer_jax.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'puffer_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_SUBMODULES])
