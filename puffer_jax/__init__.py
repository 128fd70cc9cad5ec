"""PufferLib's policies, helpers and checkpoints in JAX/Flax NNX, with proved parity.

Names are imported when first used, so that `import puffer_jax` costs nothing and an
environment worker process never loads JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puffer_jax.distributions import Normal as Normal

_EXPORTS = {
    "distributions": (
        "Normal",
        "TanhNormal",
        "entropy",
        "entropy_probs",
        "log_prob",
        "mask_logits",
        "sample_logits",
    ),
    "layers": ("LSTM", "layer_init", "torch_init"),
    "models": (
        "ConvSequence",
        "Convolutional",
        "Default",
        "LSTMWrapper",
        "ProcgenResnet",
        "ResidualBlock",
    ),
    "modules": ("merge", "split"),
    "nativize": (
        "flatten_observations",
        "flattened_tensor_size",
        "nativize_dtype",
        "nativize_tensor",
        "numpy_to_jax_dtype_dict",
        "unflatten_observations",
    ),
    "weights": (
        "load_state_dict",
        "load_weights",
        "policy_from_checkpoint",
        "save_weights",
        "state_dict",
    ),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted(_HOME)  # noqa: PLE0605
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"puffer_jax.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'puffer_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
