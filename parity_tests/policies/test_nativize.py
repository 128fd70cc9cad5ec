"""Nativize against the real PufferLib: layouts, every dtype, and what the environment sampled."""

import warnings
from collections import OrderedDict
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pufferlib.emulation
import pufferlib.pytorch
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spaces import DTYPES, NESTED, box, containers, leaf_spaces

from puffer_jax.base.spaces import emulated_dtypes, structured_dtype
from puffer_jax.policies.nativize import (
    flatten_observations,
    flattened_tensor_size,
    nativize_dtype,
    nativize_tensor,
    numpy_to_jax_dtype_dict,
    unflatten_observations,
)

pytestmark = pytest.mark.usefixtures("unoptimised")

PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)
BATCH = 3


def sample(space, rng):
    """One observation; Box leaves get arbitrary bytes, so NaNs and extremes as well."""
    if isinstance(space, Dict):
        return {key: sample(subspace, rng) for key, subspace in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(sample(subspace, rng) for subspace in space.spaces)
    if isinstance(space, Discrete):
        return np.int32(rng.integers(space.n))
    if isinstance(space, MultiDiscrete):
        return rng.integers(space.nvec).astype(np.int32)
    if isinstance(space, MultiBinary) or space.dtype == np.bool_:
        return rng.integers(0, 2, space.shape).astype(space.dtype)
    size = int(np.prod(space.shape)) * space.dtype.itemsize
    return rng.integers(0, 256, size, np.uint8).view(space.dtype).reshape(space.shape)


def emulate_batch(space, samples):
    """Rows as `GymnasiumPufferEnv` fills them, with garbage in the padding."""
    dtype = pufferlib.emulation.dtype_from_space(space)
    rows = np.full((len(samples), dtype.itemsize), 0xAB, np.uint8)
    struct = rows.view(dtype if dtype.names else dtype.base)
    for row, observation in zip(struct, samples, strict=True):
        leaf = row if dtype.names else row.reshape(dtype.shape)
        pufferlib.emulation.emulate(leaf, observation)
    return rows


def batch_of(space, seed):
    rng = np.random.default_rng(seed)
    samples = [sample(space, rng) for _ in range(BATCH)]
    return samples, emulate_batch(space, samples)


def stacked(samples):
    """What unflatten_observations must give: the samples, batched leaf by leaf."""
    first = samples[0]
    if isinstance(first, dict):  # jax.tree.map would sort the keys
        return {key: stacked([one[key] for one in samples]) for key in first}
    if isinstance(first, tuple):
        return tuple(stacked(leaves) for leaves in zip(*samples, strict=True))
    return np.stack(samples)


def as_fields(tree):
    """Tuples as dicts f0, f1, ..., scalars as (batch, 1): the form of nativize_tensor."""
    if isinstance(tree, tuple):
        tree = {f"f{i}": child for i, child in enumerate(tree)}
    if isinstance(tree, dict):
        return {key: as_fields(child) for key, child in tree.items()}
    return tree if tree.ndim > 1 else tree[:, None]


def assert_same(actual, expected):
    """Equal structure, key order, shapes, dtypes and bits (NaNs have bits too)."""
    assert type(actual) is type(expected) or isinstance(actual, jax.Array)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        expected, actual = tuple(expected.values()), tuple(actual.values())
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
        return
    actual = np.asarray(actual)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.tobytes() == np.ascontiguousarray(expected).tobytes()


def emulated_bytes(space):
    return {
        "observation_dtype": np.dtype("uint8"),
        "emulated_observation_dtype": structured_dtype(space),
    }


def in_numpy(native):
    """A native dtype of either library with numpy dtypes in it."""
    if isinstance(native, dict):
        return {key: in_numpy(leaf) for key, leaf in native.items()}
    to_numpy = {v: k for k, v in pufferlib.pytorch.numpy_to_torch_dtype_dict.items()}
    dtype, shape, offset, delta = native
    return (to_numpy.get(dtype) or np.dtype(dtype), tuple(shape), offset, delta)


def reference_tensor(flat, emulated):
    """The reference's tensors in numpy."""

    def convert(tree):
        if isinstance(tree, dict):
            return {key: convert(child) for key, child in tree.items()}
        return tree.numpy()

    native = pufferlib.pytorch.nativize_dtype(emulated)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch._check_is_size is on its way out
        return convert(pufferlib.pytorch.nativize_tensor(torch.from_numpy(flat), native))


def environment(space, seed=0):
    """A real emulated environment that plays random observations, and the list of them."""
    played = []
    rng = np.random.default_rng(seed)

    def observe():
        played.append(sample(space, rng))
        return played[-1]

    env = SimpleNamespace(
        observation_space=space,
        action_space=Discrete(2),
        render_mode=None,
        reset=lambda seed=None: (observe(), {}),
        step=lambda action: (observe(), 0.0, False, False, {}),
    )
    emulated = pufferlib.emulation.GymnasiumPufferEnv(env=env)
    emulated.is_observation_checked = True  # arbitrary bytes are not within the Box bounds
    return emulated, played


MISPLACED = Dict(
    img=Box(0, 255, (3, 2), np.uint8),
    n=Discrete(4),
    t=Tuple([Box(-1, 1, (2,), np.float64), MultiBinary(3)]),
    vec=Box(-1, 1, (3,), np.float32),
)


def test_the_dtype_table_is_the_reference_s_with_bool():
    reference = pufferlib.pytorch.numpy_to_torch_dtype_dict
    assert set(numpy_to_jax_dtype_dict) == {*reference, np.dtype(bool)}
    for dtype, ours in numpy_to_jax_dtype_dict.items():
        assert jnp.zeros(1, ours).dtype == dtype


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != np.bool_], ids=str)
@pytest.mark.parametrize("sampled", ["bytes", "elements"])
def test_every_dtype_equals_the_reference(dtype, sampled):
    """Bytes with a leading byte leaf (so there is padding), or all leaves of one dtype."""
    first = box(np.uint8 if sampled == "bytes" else dtype, (1,))
    # A tail of bytes keeps uint8 leaves from being elements by accident.
    last = MultiBinary(3) if sampled == "bytes" else box(dtype, (2, 3))
    space = Dict(first=first, scalar=box(dtype, ()), matrix=box(dtype, (2, 2)), last=last)
    sample_dtype, struct_dtype = emulated_dtypes(space)
    assert sample_dtype == ("uint8" if sampled == "bytes" else dtype)
    emulated = {"observation_dtype": sample_dtype, "emulated_observation_dtype": struct_dtype}
    _, rows = batch_of(space, 0)
    flat = rows.view(sample_dtype)

    native = nativize_dtype(emulated)
    assert in_numpy(native) == in_numpy(pufferlib.pytorch.nativize_dtype(emulated))
    assert list(native) == list(space.spaces)
    expected = reference_tensor(flat, emulated)
    assert_same(nativize_tensor(flat, native), expected)
    jitted = jax.jit(lambda flat: nativize_tensor(flat, native))(flat)
    assert_same({key: jitted[key] for key in native}, expected)
    assert flattened_tensor_size(native) == pufferlib.pytorch.flattened_tensor_size(native)


@pytest.mark.parametrize("sampled", ["uint8", "int8", "bool"])
def test_bool_leaves_which_the_reference_cannot_read(sampled):
    space = Dict(flag=box(bool, ()), flags=box(bool, (2, 3)))
    samples, rows = batch_of(space, 0)
    emulated = {**emulated_bytes(space), "observation_dtype": np.dtype(sampled)}
    with pytest.raises(KeyError, match="bool"):
        pufferlib.pytorch.nativize_dtype(emulated)
    actual = nativize_tensor(rows.view(sampled), nativize_dtype(emulated))
    assert_same(actual, as_fields(stacked(samples)))


def test_leaf_without_a_struct_is_a_tuple():
    emulated = {
        "observation_dtype": np.dtype("float32"),
        "emulated_observation_dtype": np.dtype(("float32", (2, 3))),
    }
    native = nativize_dtype(emulated)
    assert in_numpy(native) == in_numpy(pufferlib.pytorch.nativize_dtype(emulated))
    assert in_numpy(native) == (np.dtype("float32"), (2, 3), 0, 6)
    flat = np.arange(12, dtype=np.float32).reshape(2, 6)
    assert_same(nativize_tensor(flat, native), flat.reshape(2, 2, 3))
    assert flattened_tensor_size(native) == 6


def test_the_reference_misplaces_leaves_after_a_nested_struct():
    emulated = emulated_bytes(MISPLACED)
    samples, rows = batch_of(MISPLACED, 0)
    reference, ours = pufferlib.pytorch.nativize_dtype(emulated), nativize_dtype(emulated)
    assert reference["vec"][2] == 32
    assert ours["vec"][2] == 40 == emulated["emulated_observation_dtype"].fields["vec"][1]
    expected = as_fields(stacked(samples))
    wrong = reference_tensor(rows, emulated)
    assert wrong["vec"].tobytes() != expected["vec"].tobytes()
    assert wrong["t"]["f0"].tobytes() == expected["t"]["f0"].tobytes()
    assert_same(nativize_tensor(rows, ours), expected)


def test_the_environment_s_own_rows():
    env, played = environment(MISPLACED)
    rows = [env.reset()[0].copy()] + [env.step(1)[0].copy() for _ in range(3)]
    flat = np.concatenate(rows)
    assert flat.shape == (4, env.single_observation_space.shape[0])
    assert (env.emulated["observation_dtype"], env.obs_dtype) == emulated_dtypes(MISPLACED)
    expected = stacked(played)
    assert_same(unflatten_observations(flat, MISPLACED), expected)
    assert_same(nativize_tensor(flat, nativize_dtype(env.emulated)), as_fields(expected))


@PROPERTY
@given(space=NESTED, seed=st.integers(0, 2**32 - 1))
def test_any_nesting_gives_back_what_was_sampled(space, seed):
    samples, rows = batch_of(space, seed)
    expected = stacked(samples)
    native = nativize_dtype(emulated_bytes(space))
    assert_same(nativize_tensor(rows, native), as_fields(expected))
    assert_same(unflatten_observations(rows, space), expected)
    sizes = [leaf[0].size for leaf in jax.tree.leaves(expected)]
    assert flattened_tensor_size(native) == sum(sizes)


@PROPERTY
@given(data=st.data(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1))
def test_leaves_of_one_dtype_come_as_elements(data, dtype, seed):
    shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
    leaves = st.builds(box, st.just(dtype), shapes)
    space = data.draw(containers(st.recursive(leaves, containers, max_leaves=4)))
    samples, rows = batch_of(space, seed)
    assert emulated_dtypes(space)[0] == dtype
    expected = stacked(samples)
    assert_same(unflatten_observations(rows.view(dtype), space), expected)
    native = nativize_dtype({**emulated_bytes(space), "observation_dtype": dtype})
    assert_same(nativize_tensor(rows.view(dtype), native), as_fields(expected))


NO_BOOL = leaf_spaces([dtype for dtype in DTYPES if dtype != np.bool_])
FOUR_BYTES = st.builds(box, st.sampled_from([d for d in DTYPES if d.itemsize == 4]))


@PROPERTY
@given(space=containers(NO_BOOL, 4), seed=st.integers(0, 2**32 - 1))
def test_one_level_equals_the_reference(space, seed):
    assert_reference_agrees(space, seed)


@PROPERTY
@given(
    space=containers(
        st.recursive(FOUR_BYTES | st.builds(Discrete, st.integers(2, 9)), containers, max_leaves=5)
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_nesting_without_padding_equals_the_reference(space, seed):
    assert_reference_agrees(space, seed)


def assert_reference_agrees(space, seed):
    emulated = emulated_bytes(space)
    _, rows = batch_of(space, seed)
    native = nativize_dtype(emulated)
    assert in_numpy(native) == in_numpy(pufferlib.pytorch.nativize_dtype(emulated))
    assert_same(nativize_tensor(rows, native), reference_tensor(rows, emulated))


@PROPERTY
@given(space=NESTED | leaf_spaces())
def test_layout_and_sample_dtype_are_emulation_s(space):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gymnasium remarks on float16 bounds
        emulated_space, reference = pufferlib.emulation.emulate_observation_space(space)
    ours = structured_dtype(space)
    assert ours == reference and ours.itemsize == reference.itemsize
    assert ours.isalignedstruct == reference.isalignedstruct
    expected = np.dtype(emulated_space.dtype)
    # Where Discrete leaves say int64 and are stored as int32, the reference's rows are unreadable.
    stored = {leaf.base for leaf in leaf_dtypes(ours)}
    if expected == np.int64 and np.dtype(np.int32) in stored:
        emulated = {"observation_dtype": expected, "emulated_observation_dtype": reference}
        with pytest.raises(AssertionError):
            pufferlib.pytorch.nativize_dtype(emulated)
        expected = np.dtype(np.uint8)
    assert emulated_dtypes(space) == (expected, ours)


def leaf_dtypes(dtype):
    if dtype.names is None:
        return [dtype]
    return [leaf for name in dtype.names for leaf in leaf_dtypes(dtype[name])]


def test_discrete_leaves_alone_which_the_reference_packs_into_int64():
    space = Dict(a=Discrete(5), b=Discrete(7))
    env, played = environment(space)
    flat = env.reset()[0]
    assert (flat.shape, flat.dtype) == ((1, 1), np.int64)
    with pytest.raises(AssertionError):
        pufferlib.pytorch.nativize_dtype(env.emulated)
    with pytest.raises(ValueError, match=r"observation\.a .*int32.*int64.*numpy\.uint8"):
        nativize_dtype(env.emulated)
    with pytest.raises(ValueError, match=r"8 elements of uint8.*int64 of shape \(1, 1\).*view"):
        unflatten_observations(flat, space)
    assert emulated_dtypes(space)[0] == np.uint8
    assert_same(unflatten_observations(flat.view(np.uint8), space), stacked(played))


@pytest.mark.parametrize(
    "space",
    [
        Discrete(9),
        MultiDiscrete([3, 4, 5]),
        MultiBinary([2, 3]),
        box("float32", (2, 3)),
        box("f8", ()),
    ],
    ids=str,
)
def test_leaf_spaces_are_reshaped_or_read_from_bytes(space):
    samples, rows = batch_of(space, 0)
    expected = stacked(samples)
    assert expected.shape == (BATCH, *space.shape)
    assert_same(unflatten_observations(expected, space), expected)
    assert_same(unflatten_observations(expected.reshape(BATCH, -1), space), expected)
    assert_same(unflatten_observations(rows.view(emulated_dtypes(space)[0]), space), expected)
    values = np.ones((BATCH, expected[0].size), np.int64)
    assert_same(unflatten_observations(values, space), values.reshape(expected.shape))


def test_spaces_of_other_libraries_are_recognised_by_their_attributes():
    ours = SimpleNamespace(
        spaces={
            "z": SimpleNamespace(low=0, high=1, shape=(2,), dtype=jnp.float32),
            "d": SimpleNamespace(n=3),
            "t": SimpleNamespace(
                spaces=[
                    SimpleNamespace(n=4, shape=(), dtype=jnp.int32),
                    SimpleNamespace(nvec=[2, 3], shape=(2,), dtype=jnp.int32),
                    SimpleNamespace(n=3, shape=(3,), dtype=jnp.int8),
                ]
            ),
        }
    )
    theirs = OrderedDict(
        z=box("float32"),
        d=Discrete(3),
        t=Tuple([Discrete(4), MultiDiscrete([2, 3]), MultiBinary(3)]),
    )
    samples, rows = batch_of(Dict(theirs), 0)
    assert emulated_dtypes(ours) == emulated_dtypes(Dict(theirs))
    assert_same(unflatten_observations(rows, ours), stacked(samples))


def test_jit_and_vmap_equal_eager():
    space = Dict(
        OrderedDict((d.name, box(d, (2,))) for d in DTYPES), nested=MISPLACED, bit=MultiBinary(1)
    )
    samples, rows = batch_of(space, 0)
    native = nativize_dtype(emulated_bytes(space))
    expected = as_fields(stacked(samples))
    eager = nativize_tensor(jnp.asarray(rows), native)
    assert_same(eager, expected)
    for transformed in (
        jax.jit(lambda rows: nativize_tensor(rows, native))(rows),
        jax.tree.map(
            lambda leaf: leaf[:, 0], jax.vmap(lambda row: nativize_tensor(row[None], native))(rows)
        ),
    ):
        for one, other in zip(jax.tree.leaves(transformed), jax.tree.leaves(expected), strict=True):
            assert_same(one, other)


def in_32_bits(array):
    if array.dtype == np.float64:
        with np.errstate(over="ignore", invalid="ignore"):
            return array.astype(np.float32)
    if array.dtype in (np.int64, np.uint64):
        return array.astype({"i": np.int32, "u": np.uint32}[array.dtype.kind])
    return array


WIDE = Dict(
    byte=box("uint8", (1,)),
    i=box("int64"),
    u=box("uint64", ()),
    f=box("float64", (2, 2)),
    g=box("float32"),
)


@pytest.mark.parametrize("under", ["eager", "jit"])
def test_64_bit_leaves_without_x64(under):
    rng = np.random.default_rng(0)
    samples = [
        {
            "byte": np.uint8([row]),
            "i": np.int64([-1 - row, 2**40 + row]),
            "u": np.uint64(2**64 - 1 - row),
            "f": rng.normal(size=(2, 2)) * 10.0**row,
            "g": rng.normal(size=2).astype(np.float32),
        }
        for row in range(BATCH)
    ]
    rows = emulate_batch(WIDE, samples)
    native = nativize_dtype(emulated_bytes(WIDE))
    expected = jax.tree.map(in_32_bits, stacked(samples))
    assert expected["i"][1].tolist() == [-2, 1]
    transform = jax.jit if under == "jit" else lambda function: function
    with jax.enable_x64(False):
        fields = transform(lambda rows: nativize_tensor(rows, native))(rows)
        tree = transform(lambda rows: unflatten_observations(rows, WIDE))(rows)
    for name in expected:
        assert_same(fields[name], as_fields(expected)[name])
        assert_same(tree[name], expected[name])
    with jax.enable_x64(True):
        assert_same(nativize_tensor(rows, native), as_fields(stacked(samples)))


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64"])
def test_64_bit_elements_without_x64(dtype):
    space = Dict(a=box(dtype), b=box(dtype, ()))
    flat = np.array([[1, 2, 3], [4, 5, 100]], dtype)
    flat = flat + np.array(0.1 if dtype == "float64" else 2**40, dtype)
    emulated = {**emulated_bytes(space), "observation_dtype": np.dtype(dtype)}
    native = nativize_dtype(emulated)
    with jax.enable_x64(False):
        fields = nativize_tensor(flat, native)
        jitted = jax.jit(lambda flat: nativize_tensor(flat, native))(flat)
    for name, expected in {"a": flat[:, :2], "b": flat[:, 2:]}.items():
        assert_same(fields[name], in_32_bits(expected))
        assert_same(jitted[name], in_32_bits(expected))


DOUBLE = (jnp.float64, (64,), 0, 512)


def narrowed(values):
    with jax.enable_x64(False):
        rows = np.ascontiguousarray(values, np.float64).reshape(-1, 64).view(np.uint8)
        return np.asarray(narrow(rows)).reshape(-1)


narrow = jax.jit(lambda rows: nativize_tensor(rows, DOUBLE))


def assert_narrowed(values):
    """Bit for bit numpy's float32, except that any NaN is the quiet NaN."""
    values = np.asarray(values, np.float64)
    expected, actual = in_32_bits(values), narrowed(values)
    assert actual.dtype == np.float32
    nan = np.isnan(values)
    assert (actual[nan].view(np.uint32) & 0x7FFFFFFF == 0x7FC00000).all()
    assert (actual.view(np.uint32) == expected.view(np.uint32))[~nan].all()


@settings(PROPERTY, max_examples=200)
@given(st.lists(st.floats(width=64) | st.floats(-1e-37, 1e-37), min_size=64, max_size=64))
def test_float64_without_x64_is_rounded_as_numpy_rounds(values):
    assert_narrowed(values)


def test_float64_rounding_at_ties_limits_and_random_bits():
    rng = np.random.default_rng(0)
    assert_narrowed(rng.integers(0, 2**64, 2**16, np.uint64).view(np.float64))
    # Random float32 of every exponent, the tie above each, and what lies just beside the tie.
    bits = rng.integers(0, 0x7F800000, 2**16, np.uint32)
    bits[:4] = [0, 0x007FFFFF, 0x00800000, 0x7F7FFFFF]
    low, step = bits.view(np.float32).astype(np.float64), (bits + 1).view(np.float32)
    high = np.where(np.isinf(step), 2.0**128, step.astype(np.float64))
    tie = low + (high - low) / 2
    one_bit = np.uint64(1) << rng.integers(0, 28, tie.size, np.uint64)
    above = (tie.view(np.uint64) | one_bit).view(np.float64)  # by any single lower bit
    for values in (low, tie, above, np.nextafter(tie, 0), np.nextafter(tie, np.inf)):
        assert_narrowed(values)
        assert_narrowed(-values)
    assert_narrowed(np.resize([np.inf, -np.inf, np.nan, 0.0, -0.0, 5e-324, 1e308, 2.0**-150], 64))


SMALL = Dict(n=Discrete(4), t=Tuple([box("uint8", (3,)), box("float32")]))  # 4 + 4 + 8 bytes


def test_observations_that_cannot_be_read():
    native = nativize_dtype(emulated_bytes(SMALL))
    flat = np.zeros((2, 16), np.uint8)
    nativize_tensor(flat, native)
    for transform in (jax.jit, lambda function: function):
        read = transform(lambda flat: nativize_tensor(flat, native))
        with pytest.raises(ValueError, match=r"must be \(batch, width\), got shape \(16,\)"):
            read(flat[0])
        with pytest.raises(ValueError, match=r"observation\.t\.f1 .*8 to 16 .*shape \(2, 15\)"):
            read(flat[:, :15])
        cast = r"observation\.n: expected uint8 bytes, got float32; .*cast to float; pass the bytes"
        with pytest.raises(TypeError, match=cast):
            read(flat.astype(np.float32))
        with pytest.raises(TypeError, match=r"expected uint8 bytes, got int32; pass the bytes"):
            read(flat.astype(np.int32))
        with pytest.raises(TypeError, match=r"expected uint8 bytes, got bool"):
            read(flat.astype(bool))
    elements = (jnp.float32, (2,), 0, 2)
    with pytest.raises(TypeError, match=r"expected float32 elements, got uint8; pass"):
        nativize_tensor(flat, elements)
    with pytest.raises(TypeError, match=r"expected float32 elements, got float16"):
        nativize_tensor(flat.astype(np.float16), elements)


@pytest.mark.parametrize(
    ("sample", "dtype", "message"),
    [
        (
            "f4",
            [("a", "f4"), ("t", [("n", "i4")])],
            r"observation\.t\.n \(int32 at byte 4\).*float32",
        ),
        ("i8", [("n", "i4"), ("m", "i4")], r"observation\.n \(int32 at byte 0\).*int64"),
        ("f4", [("p", "u1"), ("a", "f4")], r"observation\.p \(uint8"),
        (
            "f4",
            {"names": ["a"], "formats": ["f4"], "offsets": [2]},
            r"observation\.a \(float32 at byte 2\)",
        ),
        ("u1", [("a", "c8")], r"observation\.a has dtype complex64; supported are float64, .*bool"),
        ("u1", [("a", ">f4")], r"observation\.a has dtype >f4"),
        ("u1", [("a", [("b", "f4")], (2,))], r"observation\.a has dtype"),
    ],
)
def test_layouts_that_cannot_be_read(sample, dtype, message):
    emulated = {
        "observation_dtype": np.dtype(sample),
        "emulated_observation_dtype": np.dtype(dtype),
    }
    with pytest.raises(ValueError, match=message):
        nativize_dtype(emulated)


def test_spaces_and_rows_that_do_not_fit():
    flat = np.zeros((2, 16), np.uint8)
    assert unflatten_observations(flat, SMALL)["n"].shape == (2,)
    for rows in (flat[:, :15], np.zeros((2, 17), np.uint8), np.zeros((2, 4), np.float32)):
        with pytest.raises(
            ValueError, match=r"expected 16 elements of uint8 per row .*" + str(rows.dtype)
        ):
            unflatten_observations(rows, SMALL)
    with pytest.raises(TypeError, match="cast to float"):
        unflatten_observations(flat.astype(np.float32), SMALL)
    with pytest.raises(ValueError, match="batch axis"):
        unflatten_observations(np.uint8(1)[...], Discrete(3))
    with pytest.raises(
        ValueError, match=r"expected 24 elements of uint8|expected 6 elements of float32"
    ):
        unflatten_observations(np.zeros((2, 5), np.float32), box("float32", (2, 3)))
    for space in (Dict({}), Tuple([]), Dict({1: Discrete(2)}), Dict({"": Discrete(2)})):
        with pytest.raises(ValueError, match="needs non-empty string keys"):
            structured_dtype(space)
    for space in (gymnasium.spaces.Text(3), gymnasium.spaces.Sequence(Discrete(2)), None):
        with pytest.raises(TypeError, match="unsupported space"):
            structured_dtype(space)


UNSORTED = Dict(OrderedDict(z=Discrete(4), m=box("float32", (2, 2)), a=box("uint8", (3,))))


def test_flattening_keeps_the_space_s_order_under_jit():
    """The reference's models.Default concatenates views of the fields in the struct's order."""
    samples, rows = batch_of(UNSORTED, 0)
    dtype = structured_dtype(UNSORTED)
    fields = reference_tensor(rows, emulated_bytes(UNSORTED))
    views = [torch.from_numpy(v).view(BATCH, -1).float() for v in fields.values()]
    expected = torch.cat(views, dim=1).numpy()
    tree = stacked(samples)
    flatten = jax.jit(flatten_observations, static_argnums=(1, 2))
    for leaves in (tree, dict(reversed(tree.items())), as_fields(tree)):
        for order in (dtype, UNSORTED):
            assert_same(flatten_observations(leaves, order), expected)
        assert_same(flatten(leaves, dtype), expected)
        by_key = np.concatenate([expected[:, 5:], expected[:, 1:5], expected[:, :1]], axis=1)
        assert_same(flatten_observations(leaves), by_key)
        assert_same(flatten(leaves), by_key)
    assert_same(flatten(tree, dtype, jnp.float64), expected.astype(np.float64))


@PROPERTY
@given(space=NESTED | leaf_spaces(), seed=st.integers(0, 2**32 - 1))
def test_flattening_nested_observations(space, seed):
    samples, rows = batch_of(space, seed)
    dtype = structured_dtype(space)

    def leaves(tree):
        if isinstance(tree, dict | tuple):
            children = tree.values() if isinstance(tree, dict) else tree
            return [leaf for child in children for leaf in leaves(child)]
        return [tree.reshape(BATCH, -1).astype(np.float64)]

    expected = np.concatenate(leaves(stacked(samples)), axis=1)
    for tree in (
        nativize_tensor(rows, nativize_dtype(emulated_bytes(space))),
        unflatten_observations(rows.view(emulated_dtypes(space)[0]), space),
        stacked(samples),
    ):
        actual = flatten_observations(tree, dtype, jnp.float64)
        # XLA:CPU flushes subnormal float32 to zero when it converts them.
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-37)


def test_flattening_without_an_order():
    tree = {
        "b": np.ones((2, 1)),
        "a": (np.zeros((2,)), {"d": np.full((2, 2), 3), "c": np.full(2, 2)}),
    }
    expected = np.float32([[0, 2, 3, 3, 1]] * 2)
    assert_same(flatten_observations(tree), expected)
    assert_same(jax.jit(flatten_observations)(tree), expected)
    many = tuple(np.full((2, 1), i) for i in range(12))
    assert_same(flatten_observations(many), np.float32([range(12)] * 2))
    assert_same(flatten_observations(np.ones((0, 2, 3))), np.zeros((0, 6), np.float32))


def test_observations_that_cannot_be_flattened():
    samples, _ = batch_of(Dict(u=UNSORTED, t=SMALL["t"]), 0)
    order = structured_dtype(Dict(u=UNSORTED, t=SMALL["t"]))
    good = stacked(samples)
    assert flatten_observations(good, order).shape == (BATCH, 13)
    bad = {"u": {"m": good["u"]["m"][..., None], "a": good["u"]["a"], "y": 1}, "t": good["t"][:1]}
    with pytest.raises(ValueError) as error:
        flatten_observations(bad, order)
    for problem in (
        "observation.u.z is missing",
        "observation.u.y is unexpected",
        "observation.u.m should be (batch, 2, 2), got (3, 2, 2, 1)",
        "observation.t.f1 is missing",
    ):
        assert problem in str(error.value)
    for tree, message in (
        (
            {**good, "u": np.ones((3, 8))},
            r"observation\.u should be fields \['z', 'm', 'a'\], got an array",
        ),
        ({**good, "t": (good["t"][0], {})}, r"observation\.t\.f1 should be an array, got fields"),
        ({**good, "t": (good["t"][0][:2], good["t"][1])}, r"batch sizes differ: \[3, 3, 3, 2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            flatten_observations(tree, order)
    for tree in ({}, (), {"a": {}}):
        with pytest.raises(ValueError, match="no leaves"):
            flatten_observations(tree)
    with pytest.raises(ValueError, match=r"should be \(batch\), got \(\)"):
        flatten_observations(np.float32(1)[...], Discrete(2))
