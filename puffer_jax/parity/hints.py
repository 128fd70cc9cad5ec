"""What lies between two layers of which only the second differs."""

import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

Array = Float[np.ndarray, "..."]

_erf = np.vectorize(math.erf, otypes=[float])

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "GELU in its tanh form": lambda x: (
        x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    ),
    "tanh": np.tanh,
    "sigmoid": lambda x: (1 + np.tanh(x / 2)) / 2,
    "SiLU": lambda x: x * (1 + np.tanh(x / 2)) / 2,
    "ELU": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "LeakyReLU(0.01)": lambda x: np.where(x > 0, x, 0.01 * x),
    "softplus": lambda x: np.logaddexp(x, 0),
    "no activation": lambda x: x,
}


def explain(theirs: Array, ours: Array, earlier: Mapping[str, Array]) -> str:
    """What makes two inputs of a layer differ, in a few words; empty if that cannot be told.

    Args:
        theirs: what torch's layer was given.
        ours: what ours was given.
        earlier: outputs, equal on both sides, of the layers before, the last one last.

    Example:
        >>> import numpy as np
        >>> from puffer_jax.parity.hints import explain
        >>> x = np.array([[0.5, -1.0, 2.0]])
        >>> explain(np.maximum(x, 0), x, {})
        "torch's is ReLU of ours"
    """
    if theirs.size != ours.size:
        return f"torch's has the shape {theirs.shape}, ours {ours.shape}"
    rows = len(theirs) if theirs.ndim else 1
    if _close(*(np.sort(x.reshape(rows, -1)) for x in (theirs, ours))):
        return "the same numbers stand in another order: flattened or transposed otherwise?"
    if theirs.shape != ours.shape:
        return f"torch's has the shape {theirs.shape}, ours {ours.shape}"
    latest = list(earlier.items())[::-1]
    for name, output in latest:
        if output.shape == theirs.shape and _close(theirs - ours, output):
            return f"torch adds the output of {name}, ours does not"
        if output.shape == theirs.shape and _close(ours - theirs, output):
            return f"ours adds the output of {name}, torch does not"
    for name, output in latest:
        if output.shape == theirs.shape:
            there, here = (_activation(output, x) for x in (theirs, ours))
            if there and here:
                return f"torch applies {there} to the output of {name}, ours {here}"
    if here := _activation(ours, theirs):
        return f"torch's is {here} of ours"
    if there := _activation(theirs, ours):
        return f"ours is {there} of torch's"
    factor = float(np.sum(theirs * ours) / max(np.sum(ours**2), np.finfo(float).tiny))
    return f"torch's is {factor:g} times ours" if _close(theirs, factor * ours) else ""


def _activation(x: Array, result: Array) -> str:
    return next((name for name, f in ACTIVATIONS.items() if _close(f(x), result)), "")


def _close(a: Array, b: Array) -> bool:
    scale = max(float(np.abs(b).max(initial=0)), 1e-300)
    return float(np.abs(a - b).max(initial=0)) <= 1e-12 * scale
