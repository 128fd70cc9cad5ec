"""State dicts: parameters under torch's names, in torch's layouts."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from puffer_jax.nn.params import mismatches
from puffer_jax.nn.torch_layout import (
    TorchParameter,
    torch_aliases,
    torch_tensors,
    torch_unneeded,
)
from puffer_jax.weights.foreign import obstacles

StateDict = Mapping[str, Any]
"""Torch's names -> NumPy, torch or JAX arrays."""


def state_dict(policy: nnx.Module) -> dict[str, np.ndarray]:
    """Copies of the parameters as torch names them, orders them and lays them out.

    Tied keys (`cell.*` of an LSTMWrapper) are included, as in torch, and share memory with
    the keys they are tied to. Pass the merge of a graphdef and gradients to get gradients
    under torch's names.

    Raises:
        TypeError: the policy has a layer with no torch counterpart.

    Example:
        >>> import puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> tensors = puffer_jax.state_dict(puffer_jax.Default(env, rngs=nnx.Rngs(0)))
        >>> {name: tensor.shape for name, tensor in tensors.items() if name.startswith("encoder")}
        {'encoder.0.weight': (128, 4), 'encoder.0.bias': (128,)}
    """
    parameters, aliases = named_parameters(policy)
    tensors = {name: parameter.to_torch() for name, parameter in parameters.items()}
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def named_parameters(policy: nnx.Module) -> tuple[dict[str, TorchParameter], dict[str, str]]:
    """Every tensor by its name in torch, and the tied keys: alias -> the name it is tied to."""
    parameters, aliases = {}, {}
    names: dict[tuple[int, ...], str] = {}
    for parameter in torch_tensors(policy):
        # A submodule under two attributes is one module in torch too, and two keys.
        ids = tuple(map(id, parameter.variables))
        name = names.setdefault(ids, parameter.name) if ids else parameter.name
        if name == parameter.name:
            parameters[name] = parameter
        else:
            aliases[parameter.name] = name
    covered = {id(v) for parameter in parameters.values() for v in parameter.variables}
    dropped = [
        ".".join(map(str, path))
        for path, value in nnx.iter_graph(policy, graph=True)
        if isinstance(value, nnx.Variable | np.ndarray | jax.Array) and id(value) not in covered
    ]
    if dropped:
        raise TypeError(
            "only nnx.Param in modules, nnx.List, nnx.Dict and nnx.Sequential have a torch "
            f"counterpart; these would be lost: {', '.join(dropped)}"
        )
    return parameters, aliases | torch_aliases(policy)


class LoadResult(NamedTuple):
    """What `load_state_dict(strict=False)` did not use."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_state_dict(
    policy: nnx.Module,
    state_dict: StateDict,
    strict: bool = True,
    *,
    allow_non_finite: bool = False,
) -> LoadResult:
    """Copy a state_dict into the policy, in place.

    Floating tensors of any width are converted to the policy's own dtype: float16 and
    bfloat16 exactly, float64 rounded, as in torch. The prefixes `module.` (DDP) and
    `_orig_mod.` (torch.compile) are stripped, and one of two tied keys is enough.

    Args:
        policy: any `nnx.Module` whose layers have a torch counterpart.
        state_dict: torch's names -> NumPy, torch or JAX arrays.
        strict: whether missing and unexpected keys are an error; a wrong shape always is, and so
            are a core's second layer and weights that are not folded (`weight_g`, ...).
        allow_non_finite: whether to accept NaN and infinity.

    Raises:
        ValueError: keys are missing, unexpected or mis-shaped, tied keys differ, a value is not a
            floating-point tensor or not finite, or one that Flax's layer has no place for would
            change what it computes; all are named at once.
        TypeError: the policy has a layer with no torch counterpart.

    Example:
        >>> import flax.nnx as nnx, puffer_jax
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.Default(env, rngs=nnx.Rngs(0))
        >>> puffer_jax.load_state_dict(policy, puffer_jax.state_dict(policy)).missing_keys
        []
    """
    parameters, aliases = named_parameters(policy)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    expected = shapes | {alias: shapes[name] for alias, name in aliases.items()}
    unneeded = torch_unneeded(policy)
    tensors = strip_prefixes(state_dict, expected.keys() | unneeded)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unneeded}
    for alias, name in aliases.items():  # one of two tied keys is enough
        if alias not in tensors:
            expected.pop(alias)
        elif name not in tensors:
            expected.pop(name, None)
    found = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()}
    problems = [
        problem
        for problem in mismatches(expected, found)
        if strict or problem.startswith("wrong shape")
    ]
    # These are no matter of strictness: without them the policy would compute something else.
    problems += obstacles(tensors, expected)

    # Only tensors of the right shape are looked into, however large the others claim to be.
    fitting = [name for name, shape in expected.items() if found.get(name) == shape]
    arrays = {name: _as_array(tensors[name]) for name in fitting}
    wrong = [f"{name} ({_dtype(tensors[name])})" for name in fitting if arrays[name] is None]
    if wrong:
        problems.append(f"no floating-point numbers: {', '.join(wrong)}")
    arrays = {name: array for name, array in arrays.items() if array is not None}
    for alias in [alias for alias in aliases if alias in arrays]:
        name, array = aliases[alias], arrays.pop(alias)
        if not np.array_equal(arrays.setdefault(name, array), array, equal_nan=True):
            problems.append(f"{alias} and {name} are one tensor in the policy but differ here")

    problems += _other_constants(arrays, parameters)
    new, non_finite = _converted(arrays, parameters)
    if non_finite and not allow_non_finite:
        names = ", ".join(non_finite)
        problems.append(f"NaN or infinity (allow_non_finite=True lets them in): {names}")
    if problems:
        raise ValueError("the state_dict does not fit the policy: " + "; ".join(problems))
    for variable, array in new:
        variable.set_value(array)
    return LoadResult(
        [name for name in expected if name not in found],
        [name for name in found if name not in expected],
    )


def _other_constants(
    arrays: Mapping[str, np.ndarray], parameters: Mapping[str, TorchParameter]
) -> Iterator[str]:
    """What to say of tensors that Flax's layers have no parameters for, and should be others."""
    for name, array in arrays.items():
        parameter = parameters[name]
        if not parameter.variables and not np.array_equal(array, right := parameter.to_torch()):
            values = np.unique(right)
            told = f"{values[0]:g} throughout" if values.size == 1 else f"{right.tolist()}"
            yield f"{name} must be {told}: {parameter.why}"


def _converted(
    arrays: Mapping[str, np.ndarray], parameters: Mapping[str, TorchParameter]
) -> tuple[list[tuple[nnx.Variable, jax.Array]], list[str]]:
    """Each variable with its new value, in its own dtype; names with a NaN or an infinity."""
    new: list[tuple[nnx.Variable, jax.Array]] = []
    non_finite = []
    for name, array in arrays.items():
        variables = parameters[name].variables
        unpacked = parameters[name].from_torch(array)
        with np.errstate(over="ignore"):
            converted = [a.astype(v.dtype) for a, v in zip(unpacked, variables, strict=True)]
        if not all(np.isfinite(a).all() for a in converted):
            non_finite.append(name)
        new += zip(variables, map(jnp.asarray, converted), strict=True)
    return new, non_finite


def strip_prefixes(tensors: StateDict, expected: Collection[str]) -> StateDict:
    """The tensors without the prefixes of DDP and torch.compile that `expected` does not have.

    Raises:
        ValueError: two keys become one.
    """

    def strip(name: str) -> str:
        if name not in expected:
            name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        while name not in expected and name.startswith("module."):
            name = name.removeprefix("module.")
        return name

    stripped = {}
    for name, tensor in tensors.items():
        if strip(name) in stripped:
            raise ValueError(f"two keys of the state_dict both stand for {strip(name)!r}")
        stripped[strip(name)] = tensor
    return stripped


def _as_array(tensor: Any) -> np.ndarray | None:
    """`tensor` as a NumPy array; None if it does not hold floating-point numbers."""
    if hasattr(tensor, "detach"):
        try:
            tensor = tensor.detach().cpu()
            # NumPy's only narrow format is float16; float32 holds them all exactly.
            narrow = tensor.is_floating_point() and tensor.itemsize < 4
            tensor = (tensor.float() if narrow else tensor).numpy()
        except (TypeError, RuntimeError):  # sparse, quantised or without data
            return None
    array = np.asarray(tensor)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else None


def _dtype(tensor: object) -> str:
    return str(getattr(tensor, "dtype", type(tensor).__name__))
