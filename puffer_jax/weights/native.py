"""The policy of a `.bin` file of PufferLib 4's native trainer, which names nothing."""

from pathlib import Path

from flax import nnx

from puffer_jax.base.spaces import Env, env_spec
from puffer_jax.policies.base import Dtypes
from puffer_jax.policies.v4.decoder import nvec_of
from puffer_jax.policies.v4.native import PADDING, native_sizes
from puffer_jax.policies.v4.policy import Policy


def native_policy(path: Path, env: Env, padding: int | None, dtypes: Dtypes) -> Policy:
    """A policy of the width and number of layers that the length of the file tells.

    Raises:
        ValueError: none fits, or several do.
    """
    spec, padding = env_spec(env), PADDING if padding is None else padding
    numbers, rest = divmod(path.stat().st_size, 4)
    observation, nvec = spec.single_observation_space.features, nvec_of(spec.single_action_space)
    found = [] if rest else [*native_sizes(numbers, observation, nvec, padding)]
    whose = f"a MinGRU of PufferLib 4's native trainer for {observation} numbers and nvec={nvec}"
    if len(found) != 1:
        fits = ", ".join(f"hidden_size={h} with num_layers={n}" for h, n in found) or "none"
        raise ValueError(
            f"no sidecar, and {numbers} float32 numbers as {whose}, padding={padding}: {fits}; "
            "build the policy yourself (puffer_jax.v4.Policy.for_env, say) and use load_weights"
        )
    ((hidden_size, num_layers),) = found
    parts = {"encoder": "NativeEncoder", "decoder": "NativeDecoder"}
    return Policy.for_env(env, hidden_size, num_layers, **parts, rngs=nnx.Rngs(0), **dtypes)
