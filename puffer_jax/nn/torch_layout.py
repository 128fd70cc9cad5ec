"""What puffer_jax knows about any `nnx.Module`: split and merge, and its parameters as torch's.

The exchange with torch is a rule per layer type (`torch_rules`) applied along attribute paths:
`policy.encoder.layers[0].kernel` of an `nnx.Linear` is torch's `policy.encoder.0.weight`,
transposed. A module whose attributes carry the names of its torch twin therefore converts
with no code. A class may say more:

    torch_names = {"attribute": "torch_attribute", ...}    other names, and torch's order
    torch_aliases = {"cell.weight_ih": "lstm.weight_ih_l0"}    keys torch lists twice (tied)
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from puffer_jax.nn.params import Shape, merge, mismatches, split
from puffer_jax.nn.torch_rules import (
    CONTAINERS,
    RULES,
    Constant,
    Layout,
    Rule,
    Tensor,
    held,
    rule_for,
)

Conversion = Callable[[Mapping[str, PyTree]], dict[str, PyTree]]
"""From a policy's dict of parameters to tensors by torch's names, or back."""


class TorchParameter(NamedTuple):
    """One tensor of the torch twin and the Flax parameters that hold its values.

    `pack` turns their NumPy arrays into torch's tensor; `unpack` is its inverse. Without variables
    it is a constant of the twin's, and `why` says why Flax has none.
    """

    name: str
    variables: tuple[nnx.Variable, ...]
    pack: Callable[..., Tensor]
    unpack: Callable[..., tuple[Tensor, ...]]
    why: str = ""

    @property
    def shape(self) -> Shape:
        """Shape of the torch tensor."""
        zero = np.zeros((), np.int8)
        return self.pack(*(np.broadcast_to(zero, v.shape) for v in self.variables)).shape

    def to_torch(self) -> np.ndarray:
        """A copy of the current values in torch's layout."""
        return np.array(self.pack(*(np.asarray(v[...]) for v in self.variables)), order="C")

    def from_torch(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Arrays for `variables` holding the values of `tensor`."""
        return self.unpack(tensor, *(v.shape for v in self.variables))


def torch_parameters(module: nnx.Module, prefix: str = "") -> list[TorchParameter]:
    """The module's parameters in torch's `named_parameters()` order.

    A module's own parameters come before those of its submodules, each group in the order
    of definition. Tied tensors appear once, as in torch.

    Raises:
        TypeError: a layer has parameters but no rule, or a variable is not a Param.
    """
    return [tensor for tensor in torch_tensors(module, prefix) if tensor.variables]


def torch_tensors(module: nnx.Module, prefix: str = "") -> list[TorchParameter]:
    """As `torch_parameters`, with the constants that Flax's layers have no parameters for."""
    rule = rule_for(module)
    if rule is not None:
        return _of_layer(module, rule, prefix)
    if type(module).__module__.startswith("flax.") and not isinstance(module, CONTAINERS):
        if jax.tree.leaves(nnx.state(module)):
            raise TypeError(
                f"{prefix.rstrip('.') or 'module'}: no torch rule for this "
                f"{type(module).__name__}; puffer_jax.weights.rule adds one. Known are "
                f"{', '.join(sorted(cls.__name__ for cls in RULES))} and bare nnx.Param"
            )
        return []
    direct, nested = [], []
    for name, value in _attributes(module):
        if isinstance(value, nnx.Param):
            layout = Layout(name)
            direct.append(TorchParameter(prefix + name, (value,), layout.to_torch, layout.unpack))
        elif isinstance(value, nnx.Variable):
            raise TypeError(f"{prefix + name}: {type(value).__name__} has no torch counterpart")
        else:
            nested.extend(torch_tensors(value, f"{prefix}{name}."))
    return direct + nested


def _of_layer(layer: nnx.Module, rule: Rule, prefix: str) -> list[TorchParameter]:
    where = f"{prefix.rstrip('.') or 'module'}: the torch rule of {type(layer).__name__}"
    tensors = []
    for name, entry in rule.items():
        if isinstance(entry, Layout):
            try:
                variables = held(layer, entry)
            except TypeError as error:
                raise TypeError(f"{where} does not fit at {name}: {error}") from error
            if variables is not None:
                tensors.append(
                    TorchParameter(prefix + name, variables, entry.to_torch, entry.unpack)
                )
        elif isinstance(entry, Constant):
            value = np.asarray(entry.value(layer))
            tensors.append(
                TorchParameter(
                    prefix + name, (), lambda value=value: value, lambda tensor: (), entry.why
                )
            )
    covered = {id(variable) for tensor in tensors for variable in tensor.variables}
    left = [
        ".".join(map(str, path))
        for path, variable in nnx.iter_graph(layer, graph=True)
        if isinstance(variable, nnx.Variable) and id(variable) not in covered
    ]
    if left:
        raise TypeError(f"{where} leaves out {', '.join(left)}")
    return tensors


def torch_unneeded(module: nnx.Module) -> set[str]:
    """Names in the torch twin's state_dict of what Flax has nothing for, and needs nothing."""
    return {
        f"{prefix}{name}"
        for prefix, layer in torch_modules(module)
        for name, entry in (rule_for(layer) or {}).items()
        if entry is None
    }


def torch_layout(policy: nnx.Module) -> tuple[Conversion, Conversion]:
    """Two functions between a policy's dict of parameters and torch's names and layouts.

    Both only transpose, reshape, join and cut: they are linear, keep every leaf's dtype, trace
    under `jit`, `vmap` and `grad`, and take gradients and optimizer moments as well.

    Args:
        policy: only its structure is used, so it may come from `nnx.eval_shape`.

    Returns:
        `to_torch(tree)`: the nested dict that `split` returns, of NumPy or JAX arrays -> torch
            name -> array, each tensor once, in `named_parameters()` order (unless Flax has
            sorted the attributes, as `nnx.eval_shape` does).
        `from_torch(tensors)`: its inverse.

    Raises:
        TypeError: a layer has no torch counterpart, or a parameter belongs to no layer. The
            functions raise ValueError for names or shapes that do not fit.
    """
    graphdef, params = split(policy)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def parameters(tree: Mapping[str, PyTree]) -> tuple[nnx.Module, dict[str, TorchParameter]]:
        merged = merge(graphdef, tree)
        first: dict[tuple[int, ...], TorchParameter] = {}
        for parameter in torch_parameters(merged):
            # A module under two attributes is listed twice; torch names it once.
            first.setdefault(tuple(map(id, parameter.variables)), parameter)
        return merged, {parameter.name: parameter for parameter in first.values()}

    def to_torch(tree: Mapping[str, PyTree]) -> dict[str, PyTree]:
        named = parameters(tree)[1]
        return {name: p.pack(*(v.get_value() for v in p.variables)) for name, p in named.items()}

    def from_torch(tensors: Mapping[str, PyTree]) -> dict[str, PyTree]:
        merged, named = parameters(template)
        expected = {name: parameter.shape for name, parameter in named.items()}
        found = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()}
        if expected != found:
            problems = "; ".join(mismatches(expected, found))
            raise ValueError(f"the tensors do not fit the policy: {problems}")
        for name, parameter in named.items():
            arrays = parameter.from_torch(tensors[name])
            for variable, array in zip(parameter.variables, arrays, strict=True):
                variable.set_value(array)
        return split(merged)[1]

    covered = sum(len(p.variables) for p in parameters(template)[1].values())
    if covered != len(jax.tree.leaves(params)):
        raise TypeError(
            "only nnx.Param in modules, nnx.List, nnx.Dict and nnx.Sequential have a torch "
            f"counterpart: {covered} of the policy's {len(jax.tree.leaves(params))} have"
        )
    return to_torch, from_torch


def torch_aliases(module: nnx.Module) -> dict[str, str]:
    """Tied keys of the torch twin's `state_dict()`: alias -> the name it is tied to."""
    return {
        f"{prefix}{alias}": f"{prefix}{name}"
        for prefix, below in torch_modules(module)
        for alias, name in getattr(below, "torch_aliases", {}).items()
    }


def torch_modules(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, nnx.Module]]:
    """Every module, with its name in torch and a final dot; the root's name is empty."""
    yield prefix, module
    if rule_for(module) is None:
        for name, value in _attributes(module):
            if not isinstance(value, nnx.Variable):
                yield from torch_modules(value, f"{prefix}{name}.")


def _attributes(module: object) -> Iterator[tuple[str, Any]]:
    """Torch's name and the value of every parameter and submodule, in torch's order."""
    if isinstance(module, nnx.Sequential):
        module = module.layers
    if isinstance(module, nnx.List):
        items = [(str(i), value) for i, value in enumerate(module)]
    elif isinstance(module, nnx.Dict):
        items = list(module.items())
    else:
        names = getattr(module, "torch_names", {})
        attributes = vars(module)
        order = [name for name in names if name in attributes]
        order += [name for name in attributes if name not in names]
        items = [(names.get(name, name), attributes[name]) for name in order]
    for name, value in items:
        if isinstance(value, nnx.Variable | nnx.Module | nnx.List | nnx.Dict):
            yield name, value
