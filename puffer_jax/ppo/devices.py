"""Training on many devices: which they are, and what each of them does."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray, PyTree

from puffer_jax.nn.random import Rows

AXIS = "data"
"""The mesh's axis: agents, and the segments that they play, are divided along it."""

# Of arrays with a row for each agent or segment, and of those that all devices have alike.
DIVIDED, ALIKE = PartitionSpec(AXIS), PartitionSpec()


def mesh(devices: int | Sequence[Any] | None = None) -> Mesh:
    """The devices to train on, for `PuffeRL(..., mesh=mesh())`.

    Args:
        devices: how many of `jax.devices()`, or a sequence of devices; None: all, over all
            processes.

    Raises:
        ValueError: there are not so many devices, or none, or one is named twice.

    Example:
        >>> import puffer_jax
        >>> puffer_jax.mesh(1).size
        1
    """
    found = jax.devices()
    if devices is None:
        chosen = list(found)
    elif isinstance(devices, int):
        if not 1 <= devices <= len(found):
            raise ValueError(f"devices is {devices}; there are 1 to {len(found)} to choose from")
        chosen = list(found[:devices])
    else:
        chosen = list(devices)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"devices must be different ones, and at least one; got {chosen}")
    return Mesh(chosen, (AXIS,))


def checked(mesh: Any) -> Mesh:
    """The mesh itself.

    Raises:
        TypeError: it is no mesh.
        ValueError: it has other axes than `puffer_jax.mesh()`.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be what puffer_jax.mesh() returns; got {mesh!r}")
    if mesh.axis_names != (AXIS,):
        raise ValueError(
            f"mesh must have one axis {AXIS!r}, as puffer_jax.mesh() has; got {mesh.axis_names}"
        )
    return mesh


class Share(NamedTuple):
    """One device's part of the work, and what it knows of the others'.

    Without an axis the device is alone, and what it knows is all there is.

    Attributes:
        axis: the name of the axis within `jax.shard_map`; None: there is one device.
        count: the number of devices.
        before: how many of them come before the first one of the axis, in other processes; then
            nothing can be known of the others.
    """

    axis: str | None = None
    count: int = 1  # type: ignore[reportIncompatibleMethodOverride]
    before: int = 0

    def key(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """A key of the device's own."""
        if self.axis is None:
            return key
        return jax.random.fold_in(key, jax.lax.axis_index(self.axis))

    def rows(self, own: int) -> Rows | None:
        """Which rows its `own` rows are among those of all devices; None: they are all."""
        if self.axis is None:
            return None
        return Rows((self.before + jax.lax.axis_index(self.axis)) * own, self.count * own)

    def sum(self, tree: PyTree) -> PyTree:
        """The sum of each array over all devices, in one all-reduce for arrays of one dtype."""
        return tree if self.axis is None else jax.lax.psum(tree, self.axis)

    def gather(self, tree: PyTree) -> PyTree:
        """Small arrays of all devices, (devices, ...), in one all-gather."""
        if self.axis is None:
            return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)
        flat, unflatten = ravel_pytree(tree)
        return jax.vmap(unflatten)(jax.lax.all_gather(flat, self.axis))


ALONE = Share()


def share_of(mesh: Mesh | None) -> Share:
    """What one device of the mesh does; None: of a single device."""
    return ALONE if mesh is None else Share(AXIS, mesh.devices.size)


def on_each(mesh: Mesh | None, function: Any, takes: PyTree, gives: PyTree) -> Any:
    """A function compiled for all devices at once, each with its share; None: for one.

    By `jax.shard_map`, since a partitioner cannot look into the CPU kernels. It does not check
    what varies over devices, which users' environments do not declare.

    Args:
        mesh: the devices.
        function: what each of them computes.
        takes: `DIVIDED` or `ALIKE` for each argument, or a tree of them.
        gives: the same for the results.
    """
    if mesh is None:
        return jax.jit(function)
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=takes, out_specs=gives, check_vma=False),
        in_shardings=_shardings(mesh, takes),
        out_shardings=_shardings(mesh, gives),
    )


def _shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def place(mesh: Mesh | None, tree: PyTree, specs: PyTree) -> PyTree:
    """Arrays, the same in every process, on the devices.

    Args:
        mesh: the devices; None: the arrays stay where they are.
        tree: arrays, and typed keys.
        specs: a tree like `tree`, or one of them for all of it.
    """
    if mesh is None:
        return tree
    shardings = _shardings(mesh, specs)
    if isinstance(specs, PartitionSpec):
        return jax.tree.map(lambda x: _put(x, shardings), tree)
    return jax.tree.map(_put, tree, shardings)


def _put(x: Array, sharding: NamedSharding) -> Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # JAX puts no key on another process
        data = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.device_put(x, sharding)


def here(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Arrays that all devices have alike, on this process's first one."""
    return tree if mesh is None else jax.tree.map(lambda x: x.addressable_data(0), tree)


class Host(NamedTuple):
    """This process's part of a mesh, for what it does on its own devices alone.

    Attributes:
        whole: the mesh; None: there is one device.
        mesh: this process's devices in it.
        processes: how many processes have devices in it, each as many.
        number: which of them this is.
    """

    whole: Mesh | None = None
    mesh: Mesh | None = None
    processes: int = 1
    number: int = 0

    @classmethod
    def of(cls, mesh: Mesh | None) -> "Host":
        """This process's part.

        Raises:
            ValueError: the processes have different numbers of devices in the mesh, or not one
                after the other, or this one has none.
        """
        if mesh is None:
            return cls()
        owners = [device.process_index for device in mesh.devices.flat]
        order = list(dict.fromkeys(owners))
        each = len(owners) // len(order)
        if owners != [process for process in order for _ in range(each)]:
            raise ValueError(f"every process must have as many devices in a row; got {owners}")
        if jax.process_index() not in order:
            raise ValueError(
                f"process {jax.process_index()} has no device in the mesh, which is of {order}"
            )
        return cls(mesh, mesh.local_mesh, len(order), order.index(jax.process_index()))

    @property
    def devices(self) -> int:
        """How many devices this process has in the mesh."""
        return 1 if self.mesh is None else self.mesh.devices.size

    @property
    def share(self) -> Share:
        """What one of this process's devices does of the whole."""
        if self.mesh is None:
            return ALONE
        return Share(AXIS, self.processes * self.devices, self.number * self.devices)

    def alike(self, tree: PyTree) -> PyTree:
        """Arrays that all devices have alike, as this process's devices have them."""
        if self.mesh is None or self.processes == 1:
            return tree
        sharding = NamedSharding(self.mesh, ALIKE)

        def local(x: Array) -> Array:
            parts = [shard.data for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

        return jax.tree.map(local, tree)

    def divide(self, tree: PyTree, agents: int) -> PyTree:
        """Rows (rounds * agents, ...) of this process's agents, among all devices of the mesh.

        Each device gets those of its agents, (rounds * agents of a device, ...).
        """
        if self.whole is None:
            return tree
        sharding = NamedSharding(self.whole, DIVIDED)

        def put(x: Any) -> Array:
            x = np.asarray(x)
            shape = -1, self.devices, agents // self.devices, *x.shape[1:]
            by_device = x.reshape(shape).swapaxes(0, 1).reshape(x.shape)
            return jax.make_array_from_process_local_data(sharding, by_device)

        return jax.tree.map(put, tree)

    def total(self, number: int) -> int:
        """The sum of a number over all processes."""
        if self.processes == 1:
            return number
        return int(np.sum(multihost_utils.process_allgather(np.asarray(number))))
