"""A policy's parameters as a plain nested dict, and back."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx, traverse_util
from jaxtyping import PyTree

Path = tuple[str | int, ...]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GraphDef:
    """The static half of a policy: its structure, and what `merge` checks parameters against."""

    graphdef: Any
    shapes: tuple[tuple[Path, Shape], ...]
    attributes: tuple[tuple[Path, tuple[str, ...]], ...]


def split(policy: nnx.Module) -> tuple[GraphDef, dict[str, PyTree]]:
    """Split a policy into its static structure and a plain nested dict of arrays.

    The dict is what `jax.jit`, `jax.grad`, `jax.vmap`, optax and orbax handle fastest. Its keys are
    strings, those of lists ("0", "1", ...) too, as `jax.export` wants them.

    Returns:
        `(graphdef, params)`; `graphdef` is hashable and equal for policies of the same
        structure, so it can be closed over or passed as a static argument.

    Raises:
        TypeError: the policy holds a variable that is not an `nnx.Param` (dropout keys,
            batch statistics): a forward pass would have to write it back.

    Example:
        >>> import puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> graphdef, params = puffer_jax.split(puffer_jax.Default(env, rngs=nnx.Rngs(0)))
        >>> params["encoder"]["layers"]["0"]["kernel"].shape
        (4, 128)
    """
    graphdef, state = nnx.split(policy)
    others = [
        f"{'.'.join(map(str, path))}: {type(variable).__name__}"
        for path, variable in nnx.to_flat_state(state)
        if not isinstance(variable, nnx.Param)
    ]
    if others:
        raise TypeError(
            "a policy holds only nnx.Param and static values; keep other state outside it. "
            f"Found {', '.join(others)}"
        )
    params = nnx.to_pure_dict(state)
    shapes = tuple(sorted(_shapes(params).items(), key=str))
    attributes = tuple((path, tuple(vars(module))) for path, module in _submodules(policy))
    return GraphDef(graphdef, shapes, attributes), _renamed(params, _worded)


def merge(graphdef: GraphDef, params: Mapping[str, PyTree]) -> Any:
    """Rebuild a policy from what `split` returned; free under `jax.jit` once traced.

    The keys of lists may also be numbers, as they were in version 0.1.

    Raises:
        ValueError: `params` lacks an array, has one too many or one of another shape; all
            are listed. (Flax itself matches a plain dict by sorted position only, so a
            renamed key would silently permute weights.)

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> graphdef, params = puffer_jax.split(puffer_jax.Default(env, rngs=nnx.Rngs(0)))
        >>> halves = jax.tree.map(lambda x: x / 2, params)
        >>> logits, values = puffer_jax.merge(graphdef, halves).forward(jax.numpy.ones((3, 4)))
        >>> values.shape
        (3, 1)
    """
    expected = {_worded(path): shape for path, shape in graphdef.shapes}
    found = {_worded(path): shape for path, shape in _shapes(params).items()}
    if expected != found:
        problems = mismatches(
            {".".join(path): shape for path, shape in expected.items()},
            {".".join(path): shape for path, shape in found.items()},
        )
        raise ValueError("the parameters do not fit the policy: " + "; ".join(problems))
    paths = {_worded(path): path for path, _ in graphdef.shapes}
    params = _renamed(params, lambda path: paths[_worded(path)])
    policy = nnx.merge(graphdef.graphdef, params)
    # Flax rebuilds attributes in sorted order; torch's order is the order of definition.
    modules = dict(_submodules(policy))
    for path, names in graphdef.attributes:
        values = vars(modules[path])
        for name in names:
            if name in values:
                values[name] = values.pop(name)
    return policy


def mismatches(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[str]:
    """Every missing, unexpected and mis-shaped name, one line of text for each kind."""
    wrong = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    kinds = {
        "missing": [f"{name} {expected[name]}" for name in expected if name not in found],
        "unexpected": [f"{name} {found[name]}" for name in found if name not in expected],
        "wrong shape": wrong,
    }
    return [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]


def shape_of(shapes: Mapping[str, Shape], name: str, dimensions: int) -> Shape:
    """The shape under `name`; a ValueError unless it has that many dimensions."""
    shape = shapes[name]
    if len(shape) != dimensions:
        raise ValueError(f"{name} has shape {shape}; expected {dimensions} dimensions")
    return shape


def _shapes(params: Mapping[str, PyTree]) -> dict[Path, Shape]:
    flat: dict[Path, PyTree] = dict(traverse_util.flatten_dict(params))
    return {path: tuple(np.shape(x)) for path, x in flat.items()}


def _worded(path: Path) -> tuple[str, ...]:
    return tuple(map(str, path))


def _renamed(params: Mapping[str, PyTree], rename: Callable[[Path], Path]) -> dict[str, PyTree]:
    """The same arrays under other paths."""
    flat: dict[Path, PyTree] = dict(traverse_util.flatten_dict(params))
    return traverse_util.unflatten_dict({rename(path): array for path, array in flat.items()})


def _submodules(module: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    yield path, module
    items = enumerate(module) if isinstance(module, nnx.List) else list(vars(module).items())
    for name, value in items:
        if isinstance(value, nnx.Module | nnx.List | nnx.Dict):
            yield from _submodules(value, (*path, name))
