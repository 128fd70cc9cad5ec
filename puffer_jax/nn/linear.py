"""Linear layers and perceptrons of Flax's modules, several in one pass if they are plain.

An `nnx.Linear` is plain if Flax itself would compute it as `x @ kernel + bias`. Layers that were
replaced, subclassed or hooked are called one by one as they are, so that nothing is bypassed.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float

from puffer_jax.kernels import perceptron as kernels
from puffer_jax.kernels.perceptron import gelu

# `nnx.capture` replaces these classes' methods for a while, and a subclass may have its own.
_CALLS = {cls: cls.__call__ for cls in (nnx.Linear, nnx.Sequential)}


def perceptron(
    x: Float[Array, "batch inputs"],
    encoder: Callable[[Array], Array],
    heads: Sequence[Callable[[Array], Array]] = (),
) -> tuple[Float[Array, "batch _"], ...]:
    """The outputs of each head for `encoder(x)`; the hidden vectors if there are no heads.

    One pass if `encoder` is an `nnx.Sequential` of a plain linear layer and `gelu` and the heads
    are plain, too, all in one dtype; that has no forward-mode derivatives (`jax.jvp`) on CPUs.

    Args:
        x: the inputs.
        encoder: a layer.
        heads: layers that take the encoder's outputs.
    """
    if isinstance(encoder, nnx.Sequential) and _calls_flax(encoder, nnx.Sequential):
        first, *others = encoder.layers
        arrays = _plain_arrays(x, [first, *heads])
        if others == [gelu] and arrays is not None:
            return kernels.perceptron(*arrays)
    hidden = encoder(x)
    return linear(hidden, heads) if heads else (hidden,)


def linear(
    x: Float[Array, "batch inputs"], layers: Sequence[Callable[[Array], Array]]
) -> tuple[Float[Array, "batch _"], ...]:
    """The outputs of each of the layers for the same vectors.

    One pass if all are plain, in one dtype; that has no forward-mode derivatives (`jax.jvp`) on
    CPUs.
    """
    arrays = _plain_arrays(x, layers)
    return tuple(layer(x) for layer in layers) if arrays is None else kernels.linear(*arrays)


def _plain_arrays(x: Array, layers: Sequence[Callable[[Array], Array]]) -> list[Array] | None:
    """`x` and the kernel and bias of each layer, in the dtype Flax would compute all of them in.

    None if a layer is not plain, or if Flax would compute them in several dtypes.
    """
    arrays = [x]
    dtypes = set()
    for layer in layers:
        if not isinstance(layer, nnx.Linear) or not _is_plain(layer) or layer.bias is None:
            return None
        weights = layer.kernel[...], layer.bias[...]
        dtypes.add(jnp.dtype(layer.dtype or jnp.result_type(x, *weights)))
        arrays += weights
    if len(dtypes) != 1:
        return None
    return [jnp.asarray(array, *dtypes) for array in arrays]


def _is_plain(layer: nnx.Linear) -> bool:
    return (
        _calls_flax(layer, nnx.Linear)
        and layer.dot_general is jax.lax.dot_general
        and layer.promote_dtype is promote_dtype
        and layer.precision is None
        and layer.preferred_element_type is None
    )


def _calls_flax(layer: nnx.Module, cls: type[nnx.Linear | nnx.Sequential]) -> bool:
    return type(layer).__call__ is _CALLS[cls]
