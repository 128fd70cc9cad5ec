"""PufferLib's twin of a policy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from flax import nnx

from puffer_jax import policies
from puffer_jax.base import spaces

_INSTALL_REFERENCE = (
    "pip install torch==2.13.0 psutil && pip install --no-deps pufferlib-core==3.0.23"
)


def reference_policy(jax_policy: nnx.Module) -> Any:
    """PufferLib's own policy of the same class and sizes, with weights of its own.

    Raises:
        ImportError: pufferlib or torch is missing.
        ValueError: a custom class, or a space that PufferLib's policy cannot take.

    Example:
        >>> import numpy as np, puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.Default(env, rngs=nnx.Rngs(0))
        >>> reference = puffer_jax.parity.reference_policy(policy)
        >>> _ = puffer_jax.load_state_dict(policy, reference.state_dict())
        >>> observations = np.ones((3, 4), np.float32)
        >>> report = puffer_jax.parity.compare(reference, policy, observations)
        >>> print(report.first_difference)
        None
    """
    try:
        import pufferlib.models as reference
    except ImportError as error:
        raise ImportError(f"PufferLib's policies need: {_INSTALL_REFERENCE} ({error})") from error

    class ProcgenResnet(reference.ProcgenResnet):
        # PufferLib's lacks what its LSTMWrapper asks of a policy.
        is_continuous = False

        def encode_observations(self, x: Any, state: Any = None) -> Any:
            return super().encode_observations(x)

    def twin(policy: Any, env: Any) -> Any:
        match policy:
            case policies.LSTMWrapper():
                inner = twin(policy.policy, env)
                return reference.LSTMWrapper(env, inner, policy.input_size, policy.hidden_size)
            case policies.Default():
                return reference.Default(env, policy.hidden_size)
            case policies.Convolutional():
                sizes = ("framestack", "flat_size", "hidden_size", "output_size")
                options = (*sizes, "channels_last", "downsample")
                return reference.Convolutional(env, **{n: getattr(policy, n) for n in options})
            case policies.ProcgenResnet():
                return ProcgenResnet(env, policy.cnn_width, policy.mlp_width)
        raise ValueError(f"PufferLib has no policy of the class {type(policy).__name__}")

    return twin(jax_policy, reference_env(jax_policy))


def reference_env(jax_policy: Any) -> SimpleNamespace:
    """What PufferLib's policies read of an environment, with the spaces of `jax_policy`.

    Boxes without bounds stand for what the policy knows only the shape of, so that sampling
    from the spaces gives standard normal numbers, and images of bytes.

    Raises:
        ImportError: gymnasium is missing.
        ValueError: a space that PufferLib's policies cannot take.
    """
    try:
        from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
    except ImportError as error:
        raise ImportError("PufferLib's policies need gymnasium: pip install gymnasium") from error

    def box(dtype: np.dtype, shape: tuple[int, ...]) -> Any:
        if dtype.kind == "f":
            return Box(-np.inf, np.inf, shape, dtype.type)
        return Box(0, 1 if dtype.kind == "b" else 100, shape, dtype.type)

    if not hasattr(jax_policy, "env_spec"):
        raise ValueError(f"PufferLib has no policy of the class {type(jax_policy).__name__}")
    match jax_policy.env_spec.single_action_space:
        case spaces.Discrete(n):
            action = Discrete(n)
        case spaces.MultiDiscrete(nvec):
            action = MultiDiscrete(list(nvec))
        case other:
            action = Box(-1, 1, other.shape)
    layout = jax_policy.env_spec.single_observation_space
    extra = {}
    inner = getattr(jax_policy, "policy", jax_policy)
    if layout.sample_dtype is not None:
        fields = layout.structured
        if any(fields[name].names for name in fields.names):
            raise ValueError("PufferLib's Default takes no nested Dict observations")
        leaves = {name: box(fields[name].base, fields[name].shape) for name in fields.names}
        emulated = {
            "observation_dtype": layout.sample_dtype,
            "emulated_observation_dtype": fields,
        }
        extra = {"env": SimpleNamespace(observation_space=Dict(leaves)), "emulated": emulated}
        observation = box(layout.sample_dtype, layout.shape)
    elif layout.structured is not None:
        observation = box(np.dtype(np.float32), (layout.features,))
    elif not layout.shape:
        raise ValueError(
            f"PufferLib's policies take arrays; the shape of the observations is {layout.shape}"
        )
    elif isinstance(inner, policies.Default):
        observation = box(np.dtype(np.float32), layout.shape)
    else:
        observation = Box(0, 255, layout.shape, np.uint8)
    return SimpleNamespace(
        single_observation_space=observation,
        observation_space=observation,
        single_action_space=action,
        action_space=action,
        **extra,
    )
