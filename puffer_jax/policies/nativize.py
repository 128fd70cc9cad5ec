"""Emulated observations: flat rows of bytes back to named, shaped, typed arrays.

An emulated environment packs a nested observation into one numpy struct per row and hands it out
as a flat array. If all leaves share a dtype the row has that dtype ("elements"), otherwise it is
uint8 ("bytes"). This module reads such rows inside `jax.jit`, as `pufferlib.pytorch.nativize_*`
reads them in torch. Struct layouts are numpy's and byte order is little-endian.

Without `jax_enable_x64` there are no 64-bit arrays, so 64-bit leaves are narrowed as JAX narrows
any array: integers keep their low 32 bits (larger values wrap; policies and the trainer refuse
spaces that have them, see `puffer_jax.nn.widths`), float64 rounds to the nearest float32.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped, UInt8, UInt32

from puffer_jax.base.spaces import Observation as Layout
from puffer_jax.base.spaces import Space, children_of, emulated_dtypes, structured_dtype

Observation: TypeAlias = Shaped[Array | np.ndarray, "..."]

# A leaf (dtype, shape, offset, delta), or a dict of native dtypes.
NativeDtype: TypeAlias = tuple[DTypeLike, tuple[int, ...], int, int] | dict[str, Any]

numpy_to_jax_dtype_dict: dict[np.dtype, DTypeLike] = {
    np.dtype(kind): kind
    for kind in (
        *(jnp.float64, jnp.float32, jnp.float16),
        *(jnp.uint64, jnp.uint32, jnp.uint16, jnp.uint8),
        *(jnp.int64, jnp.int32, jnp.int16, jnp.int8),
        jnp.bool_,
    )
}

_PASS_BYTES = "pass the bytes as they come from the environment (`array.view(numpy.uint8)`)"


def nativize_dtype(emulated: Mapping[str, Any]) -> NativeDtype:
    """Where each leaf of an emulated observation lies (`pufferlib.pytorch.nativize_dtype`).

    Offsets are numpy's. The reference sums leaf sizes instead, forgets the padding inside nested
    structs, and so reads wrong bytes for leaves that follow one.

    Args:
        emulated: "observation_dtype", the dtype of the flat rows, and "emulated_observation_dtype",
            the numpy dtype of one observation (`env.emulated`).

    Returns:
        A leaf is (dtype, shape, offset, delta): a jax.numpy scalar type, the shape without batch
        axis ((1,) for a scalar), and where it starts and how much it takes, in elements of the
        flat rows. A struct is a dict of these in field order.

    Raises:
        ValueError: A leaf has an unsupported dtype, or does not consist of whole elements of the
            flat rows.

    Example:
        >>> import numpy as np, puffer_jax
        >>> dtype = np.dtype([("speed", "f4", (2,)), ("gear", "i4")], align=True)
        >>> emulated = {"observation_dtype": np.uint8, "emulated_observation_dtype": dtype}
        >>> native = puffer_jax.nativize_dtype(emulated)
        >>> native["gear"][1:]  # shape, where it starts, and how many bytes it takes
        ((1,), 8, 4)
    """
    sample = np.dtype(emulated["observation_dtype"]).base
    return _native(np.dtype(emulated["emulated_observation_dtype"]), sample, 0, "observation")


def _native(field: np.dtype, sample: np.dtype, start: int, path: str) -> NativeDtype:
    if field.fields is not None:
        return {
            name: _native(subfield, sample, start + offset, f"{path}.{name}")
            for name, (subfield, offset, *_) in field.fields.items()
        }
    dtype, shape = field.base, field.shape or (1,)
    if dtype not in numpy_to_jax_dtype_dict:
        known = ", ".join(map(str, numpy_to_jax_dtype_dict))
        raise ValueError(f"{path} has dtype {dtype}; supported are {known}")
    if sample.itemsize > 1 and (dtype != sample or start % sample.itemsize):
        raise ValueError(
            f"{path} ({dtype} at byte {start}) is not made of whole elements of the flat "
            f"{sample} observation; {_PASS_BYTES} and say so: observation_dtype=numpy.uint8"
        )
    unit = sample.itemsize
    delta = math.prod(shape) * dtype.itemsize // unit
    return (numpy_to_jax_dtype_dict[dtype], shape, start // unit, delta)


def nativize_tensor(
    observation: Observation, native_dtype: NativeDtype
) -> Shaped[Array, "..."] | dict[str, PyTree]:
    """The leaves of a batch of emulated observations (`pufferlib.pytorch.nativize_tensor`).

    Args:
        observation: (batch, width), uint8 or int8 bytes, or elements of the leaves' common dtype.
        native_dtype: From `nativize_dtype`. Fields may be nested; Tuple spaces have f0, f1, ...

    Returns:
        An array (batch, *shape) of the leaf's dtype, or a dict of these in field order. A jitted
        function returns it sorted by key, like every dict.

    Raises:
        ValueError: `observation` is not two-dimensional or too narrow for `native_dtype`.
        TypeError: `observation` has another dtype, for example because bytes were cast to float.

    Example:
        >>> import numpy as np, puffer_jax
        >>> dtype = np.dtype([("speed", "f4", (2,)), ("gear", "i4")], align=True)
        >>> emulated = {"observation_dtype": np.uint8, "emulated_observation_dtype": dtype}
        >>> native = puffer_jax.nativize_dtype(emulated)
        >>> rows = np.array([([1.0, 2.0], 3)], dtype).view(np.uint8).reshape(1, -1)
        >>> fields = puffer_jax.nativize_tensor(rows, native)
        >>> fields["speed"].shape, int(fields["gear"][0, 0])
        ((1, 2), 3)
    """
    observation = jnp.asarray(observation)
    if observation.ndim != 2:
        raise ValueError(f"observation must be (batch, width), got shape {observation.shape}")
    return _read(observation, native_dtype, "observation")


def _read(
    observation: Shaped[Array, "batch width"], native_dtype: NativeDtype, path: str
) -> Shaped[Array, "batch ..."] | dict[str, PyTree]:
    if isinstance(native_dtype, dict):
        return {k: _read(observation, leaf, f"{path}.{k}") for k, leaf in native_dtype.items()}
    dtype, shape, offset, delta = native_dtype
    dtype, (batch, width) = np.dtype(dtype), observation.shape
    # Elements and bytes differ in delta, except for one-byte leaves, where both readings agree.
    size, actual = math.prod(shape), observation.dtype
    is_elements = delta == size and actual in (dtype, jax.dtypes.canonicalize_dtype(dtype))
    is_bytes = delta == size * dtype.itemsize and actual in (np.uint8, np.int8)
    if not (is_elements or is_bytes):
        expected = f"{dtype} elements" if delta == size else "uint8 bytes"
        is_cast = jnp.issubdtype(actual, jnp.floating)
        cast = "this observation was cast to float; " if is_cast else ""
        raise TypeError(f"{path}: expected {expected}, got {actual}; {cast}{_PASS_BYTES}")
    if offset + delta > width:
        raise ValueError(
            f"{path} takes elements {offset} to {offset + delta} of a row, but the observation has "
            f"shape {observation.shape}"
        )
    taken = lax.slice_in_dim(observation, offset, offset + delta, axis=1)
    if is_elements:
        return taken.reshape(batch, *shape)
    taken = lax.bitcast_convert_type(taken, jnp.uint8)
    return _from_bytes(taken.reshape(batch, *shape, dtype.itemsize), dtype)


def _from_bytes(raw: UInt8[Array, "*shape itemsize"], dtype: np.dtype) -> Shaped[Array, "*shape"]:
    """Little-endian bytes as `dtype`, or as its 32-bit sibling where x64 is off."""
    if dtype == np.bool_:
        return raw[..., 0] != 0
    narrowed = jax.dtypes.canonicalize_dtype(dtype)
    if dtype.itemsize == 1:
        return lax.bitcast_convert_type(raw[..., 0], narrowed)
    if narrowed == dtype:
        return lax.bitcast_convert_type(raw, narrowed)
    words = lax.bitcast_convert_type(raw.reshape(*raw.shape[:-1], 2, 4), jnp.uint32)
    low, high = words[..., 0], words[..., 1]
    if dtype == np.float64:
        return _float32_from_words(low, high)
    return lax.bitcast_convert_type(low, narrowed)


def _float32_from_words(
    low: UInt32[Array, "*shape"], high: UInt32[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The float64 with these two words, rounded to float32 (half to even) in 32-bit integers.

    Every value comes out as from numpy's cast, subnormals included; a NaN becomes the quiet NaN.
    """
    one = jnp.uint32(1)
    exponent, fraction = (high >> 20) & 0x7FF, high & 0xFFFFF
    # 24 significant bits, 5 more, and one that says whether any bit beyond is set.
    beyond = ((low & 0x7FFFFF) != 0).astype(jnp.uint32)
    significand = (one << 29) | (fraction << 9) | (low >> 23) | beyond
    biased = exponent.astype(jnp.int32) - (1023 - 127)
    # Below the normal range bits drop off one by one, until at 31 nothing is left to round up.
    shift = (6 + jnp.clip(1 - biased, 0, 25)).astype(jnp.uint32)
    kept, rest, half = significand >> shift, significand & ((one << shift) - 1), one << (shift - 1)
    kept += ((rest > half) | ((rest == half) & (kept & 1 == 1))).astype(jnp.uint32)
    # `kept` holds the leading bit, worth one exponent step; a carry raises the exponent by itself.
    bits = ((jnp.clip(biased, 1, 255) - 1).astype(jnp.uint32) << 23) + kept
    bits = jnp.minimum(bits, 0x7F800000)
    bits = jnp.where((exponent == 0x7FF) & ((fraction | low) != 0), 0x7FC00000, bits)
    return lax.bitcast_convert_type(bits | (high >> 31 << 31), jnp.float32)


def flattened_tensor_size(native_dtype: NativeDtype) -> int:
    """Number of scalars in one observation (`pufferlib.pytorch.flattened_tensor_size`).

    Example:
        >>> import numpy as np, puffer_jax
        >>> dtype = np.dtype([("speed", "f4", (2,)), ("gear", "i4")], align=True)
        >>> emulated = {"observation_dtype": np.uint8, "emulated_observation_dtype": dtype}
        >>> puffer_jax.flattened_tensor_size(puffer_jax.nativize_dtype(emulated))
        3
    """
    if isinstance(native_dtype, dict):
        return sum(flattened_tensor_size(leaf) for leaf in native_dtype.values())
    return math.prod(native_dtype[1])


def unflatten_observations(flat: Observation, space: Space) -> PyTree:
    """A batch of flat observations in the form of `space`.

    Args:
        flat: (batch, width) as an emulated environment gives it for `space`, or its bytes; for a
            leaf space, also the values themselves, (batch, *shape) or any shape of that size,
            which are reshaped and keep their dtype.
        space: As for `structured_dtype`.

    Returns:
        Nested dict (Dict) and tuple (Tuple) of arrays (batch, *space.shape); Discrete is (batch,).

    Raises:
        ValueError: `flat` does not have the width of `space`; or as in `structured_dtype`.
        TypeError: `flat` has another dtype; or as in `structured_dtype`.

    Example:
        >>> import numpy as np, puffer_jax
        >>> from puffer_jax.spaces import Box, Dict
        >>> space = Dict({"speed": Box(-1, 1, (2,)), "image": Box(0, 255, (4, 4), np.uint8)})
        >>> observations = puffer_jax.unflatten_observations(np.zeros((5, 24), np.uint8), space)
        >>> observations["image"].shape, observations["speed"].dtype.name
        ((5, 4, 4), 'float32')
    """
    sample, dtype = emulated_dtypes(space)
    flat = jnp.asarray(flat)
    if flat.ndim == 0:
        raise ValueError("flat needs a batch axis, got a scalar")
    rows = flat.reshape(flat.shape[0], math.prod(flat.shape[1:]))
    if dtype.names is None and rows.shape[1] == math.prod(dtype.shape):
        return rows.reshape(rows.shape[0], *dtype.shape)
    if flat.dtype.itemsize == 1:
        sample = np.dtype(np.uint8)
    width = dtype.itemsize // sample.itemsize
    if rows.shape[1] != width:
        raise ValueError(
            f"expected {width} elements of {sample} per row for {space}, got {flat.dtype} of shape "
            f"{flat.shape}; {_PASS_BYTES}"
        )
    emulated = {"observation_dtype": sample, "emulated_observation_dtype": dtype}
    return _as_space(nativize_tensor(rows, nativize_dtype(emulated)), space)


def _as_space(leaves: PyTree, space: Space) -> PyTree:
    children = children_of(space)
    if children is None:
        return leaves.reshape(leaves.shape[0], *structured_dtype(space).shape)
    values = {key: _as_space(leaves[key], subspace) for key, subspace in children.items()}
    return values if isinstance(space.spaces, Mapping) else tuple(values.values())


def flatten_observations(
    tree: PyTree, order: Space | np.dtype = None, dtype: DTypeLike = jnp.float32
) -> Shaped[Array, "batch features"]:
    """All leaves of an observation side by side, in one floating dtype.

    The reference's `torch.cat` over the fields of a Dict observation, for any nesting.

    Args:
        tree: Nested dict and tuple of arrays (batch, *shape), from `nativize_tensor`,
            `unflatten_observations` or an environment. A tuple has fields f0, f1, ...; a scalar
            leaf may be (batch,) or (batch, 1).
        order: The space or its `structured_dtype`; fixes fields, shapes and the order of columns.
            Without it dict keys are sorted: JAX sorts them under `jit` anyway, so this is the
            only order that does not depend on where the function is called.
        dtype: The result's dtype.

    Raises:
        ValueError: Keys are missing or unexpected, or leaves have wrong shapes or batch sizes; all
            are listed.

    Example:
        >>> import numpy as np, puffer_jax
        >>> tree = {"speed": np.ones((5, 2), np.float32), "image": np.zeros((5, 4, 4), np.uint8)}
        >>> puffer_jax.flatten_observations(tree).shape
        (5, 18)
    """
    if order is not None and not isinstance(order, np.dtype):
        order = structured_dtype(order)
    leaves: list[Array] = []
    problems: list[str] = []
    _collect(tree, order, "observation", leaves, problems)
    if len({leaf.shape[0] for leaf in leaves}) > 1:
        problems.append(f"batch sizes differ: {[leaf.shape[0] for leaf in leaves]}")
    if problems or not leaves:
        raise ValueError("cannot flatten: " + ("; ".join(problems) or "no leaves"))
    rows = [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in leaves]
    return jnp.concatenate([row.astype(dtype) for row in rows], axis=1)


def _collect(
    tree: PyTree, order: np.dtype | None, path: str, leaves: list[Array], problems: list[str]
) -> None:
    """Append the leaves of `tree` in order, and what is wrong with them."""
    names = () if order is None else order.names
    if isinstance(tree, tuple):
        children = {f"f{i}": child for i, child in enumerate(tree)}
    else:
        children = {key: tree[key] for key in sorted(tree)} if isinstance(tree, Mapping) else None
    if children is not None and names is not None:
        names = names or tuple(children)
        problems += [f"{path}.{name} is missing" for name in names if name not in children]
        problems += [f"{path}.{name} is unexpected" for name in children if name not in names]
        for name in filter(children.__contains__, names):
            field = None if order is None else order[name]
            _collect(children[name], field, f"{path}.{name}", leaves, problems)
    elif children is not None or names:
        wanted, got = (f"fields {list(names)}", "an array") if names else ("an array", "fields")
        problems.append(f"{path} should be {wanted}, got {got}")
    else:
        leaf = jnp.asarray(tree)
        expected = leaf.shape[1:] if order is None else order.shape
        if leaf.ndim > 0 and leaf.shape[1:] in (expected, expected or (1,)):
            leaves.append(leaf)
        else:
            wanted = ", ".join(["batch", *map(str, expected)])
            problems.append(f"{path} should be ({wanted}), got {leaf.shape}")


def is_flat(observations: PyTree, layout: Layout) -> bool:
    """Whether these are concatenated leaves, not the bytes of an emulated environment."""
    if layout.sample_dtype is None:
        return True
    fits = np.shape(observations)[-1:] == (layout.features,)
    return fits and jnp.issubdtype(observations.dtype, jnp.floating)
