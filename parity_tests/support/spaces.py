"""Spaces for property tests."""

from collections import OrderedDict

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from hypothesis import strategies as st

DTYPES = [np.dtype(f"{kind}{8 * size}") for kind in ("int", "uint") for size in (1, 2, 4, 8)]
DTYPES += [np.dtype(name) for name in ("float16", "float32", "float64", "bool")]


def box(dtype, shape=(2,)):
    dtype = np.dtype(dtype)
    return Box(0, 1 if dtype == np.bool_ else 100, shape, dtype.type)


def leaf_spaces(dtypes=DTYPES):
    shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
    return st.one_of(
        st.builds(box, st.sampled_from(dtypes), shapes),
        st.builds(Discrete, st.integers(2, 9)),
        st.builds(MultiDiscrete, st.lists(st.integers(2, 9), min_size=1, max_size=3)),
        st.builds(MultiBinary, st.one_of(st.integers(1, 4), st.just([2, 3]))),
    )


def containers(children, max_size=3):
    keys = st.lists(st.sampled_from("zyxabc"), min_size=1, max_size=max_size, unique=True)
    dicts = keys.flatmap(
        lambda names: st.tuples(*[children] * len(names)).map(
            lambda spaces: Dict(OrderedDict(zip(names, spaces, strict=True)))
        )
    )
    return st.one_of(dicts, st.lists(children, min_size=1, max_size=max_size).map(Tuple))


NESTED = containers(st.recursive(leaf_spaces(), containers, max_leaves=5))
