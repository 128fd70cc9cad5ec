"""Many training runs at once: `make_train` under `vmap`, spread over devices."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.training import make_train

# One for all members, or one for each.
Numbers = ArrayLike | Sequence[float]


def train_population(
    config: PuffeRLConfig,
    env: Any,
    policy: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    keys: Array,
    hypers: Mapping[str, Numbers] | None = None,
    mesh: Mesh | None = None,
    *,
    at_once: int | None = None,
) -> tuple[PyTree, dict[str, np.ndarray]]:
    """Train a run for each key, all in one program, spread over the devices of a mesh.

    A member is what `make_train(config, env, policy)(key, hypers)` trains alone, to rounding: its
    sums may be taken in another order. Members know nothing of each other: what is not finite in
    one stays in it. Nothing is compiled twice for a last turn that is not full.

    Args:
        config: see `make_train`.
        env: see `make_train`.
        policy: see `make_train`.
        keys: the members' keys, (members,), typed (`jax.random.key`).
        hypers: what replaces some of `config.hypers()`: by name a number for all members, or
            numbers (members,).
        mesh: the devices, any number of axes; None: one device. It may span processes, if each of
            them makes the same call; each gets all results.
        at_once: how many members fit into the memory of all devices together; more run in turns,
            of at least a member a device. None: all fit.

    Returns:
        (params, metrics) as of `make_train`, as NumPy arrays (members, ...).

    Raises:
        ValueError: `keys` are not an array (members,) of typed keys; `hypers` have another number
            of members, or names that there are none of; `at_once` is not positive.

    Example:
        >>> import jax, puffer_jax
        >>> env = puffer_jax.environments.make("cartpole")
        >>> config = puffer_jax.PuffeRLConfig(num_envs=4, bptt_horizon=8, total_timesteps=64)
        >>> make_policy = lambda rngs: puffer_jax.Default(env, 8, rngs=rngs)
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params, metrics = puffer_jax.train_population(
        ...     config, env, make_policy, keys, {"learning_rate": [1e-3, 3e-3, 1e-2]}
        ... )
        >>> metrics["episode_return"].shape  # two epochs each
        (3, 2)
    """
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.ndim != 1 or not keys.size:
        raise ValueError(
            f"keys must be an array (members,) of typed keys, as jax.random.split(key, members) "
            f"gives it; got {keys.dtype}{keys.shape}"
        )
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once must be at least 1; got {at_once}")
    members, implementation = keys.size, jax.random.key_impl(keys)
    numbers = _by_member(hypers or {}, members)
    train = make_train(config, env, policy)

    def member(key_data: Array, hypers: dict[str, Array]) -> tuple[PyTree, PyTree]:
        return train(jax.random.wrap_key_data(key_data, impl=implementation), hypers)

    program = jax.vmap(member)
    if mesh is not None:
        # By hand, since a partitioner would give each device all members of an opaque CPU kernel.
        spec = PartitionSpec(mesh.axis_names)
        program = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    program = jax.jit(program)
    data = np.asarray(jax.random.key_data(keys)), numbers
    results = []
    for rows in _turns(members, 1 if mesh is None else mesh.size, at_once):
        turn = jax.tree.map(lambda x, rows=rows: _placed(x[rows], mesh), data)
        results.append(jax.tree.map(_gathered, program(*turn)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:members], *results)


def _by_member(hypers: Mapping[str, Numbers], members: int) -> dict[str, np.ndarray]:
    numbers = {name: np.asarray(jnp.asarray(x, float)) for name, x in hypers.items()}
    if wrong := [f"{n} {x.shape}" for n, x in numbers.items() if x.shape not in ((), (members,))]:
        raise ValueError(
            f"hypers are a number for all members, or ({members},), one for each key; got "
            + ", ".join(wrong)
        )
    return {name: np.broadcast_to(x, members) for name, x in numbers.items()}


def _turns(members: int, devices: int, at_once: int | None) -> Iterator[np.ndarray]:
    """The members of each turn: all turns are equal, and what is missing is the last member."""
    capacity = members if at_once is None else max(devices, at_once // devices * devices)
    turns = -(-members // capacity)
    size = devices * -(-members // (turns * devices))
    for start in range(0, members, size):
        yield np.minimum(np.arange(start, start + size), members - 1)


def _placed(x: np.ndarray, mesh: Mesh | None) -> Array:
    if mesh is None:
        return jnp.asarray(x)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _gathered(x: Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
