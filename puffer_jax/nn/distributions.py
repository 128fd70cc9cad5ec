"""Action distributions: sampling, log-probability and entropy of a policy's logits.

Discrete actions take an array of logits, MultiDiscrete ones a tuple of arrays, and continuous
ones a `Normal` or a `TanhNormal`. `sample_logits` takes all of them. Values and gradients follow
`pufferlib.pytorch` wherever the reference's are finite; float16 and bfloat16 inputs are computed,
and their log-probabilities and entropies returned, in float32.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num, PRNGKeyArray, PyTree

from puffer_jax.nn import random

# Trapezoidal rule for expectations under N(0, 1): for a smooth integrand it converges
# exponentially in the number of nodes, and for tanh's it beats Gauss-Hermite at the same cost.
_NODES = np.linspace(-9.0, 9.0, 128)

_WEIGHTS = np.exp(-0.5 * _NODES**2) / np.exp(-0.5 * _NODES**2).sum()


def at_least_float32(x: ArrayLike) -> Array:
    """`x` as an array of its own dtype, or of float32 if its own is narrower."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


_Class = TypeVar("_Class")


def _pytree(cls: type[_Class]) -> type[_Class]:
    """Make a pytree of a class with the fields loc and scale.

    Not with `jax.tree_util.register_dataclass`: in jaxlib 0.10 the tree definitions of two such
    classes compare equal, and now and then (as addresses hash) `jit` runs one's program for the
    other.
    """
    names = ["loc", "scale"]
    keys = [jax.tree_util.GetAttrKey(name) for name in names]

    def flatten(x: object) -> tuple[list[PyTree], None]:
        return [getattr(x, name) for name in names], None

    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda x: (list(zip(keys, flatten(x)[0], strict=True)), None),
        lambda _, children: cls(*children),
        flatten,
    )
    return cls


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Normal:
    """Independent Gaussians, one per element; the formulas of `torch.distributions.Normal`.

    A pytree, so it passes through `jit`, `vmap`, `grad` and `scan`.

    Attributes:
        loc: mean, floating, any shape.
        scale: standard deviation, positive (not checked), of a shape that broadcasts with `loc`.

    Example:
        >>> import jax, puffer_jax
        >>> logits = puffer_jax.Normal(jax.numpy.zeros((8, 2)), jax.numpy.ones((8, 2)))
        >>> action, logprob, entropy = puffer_jax.sample_logits(logits, key=jax.random.key(0))
        >>> action.shape, logprob.shape
        ((8, 2), (8,))
    """

    loc: PyTree  # an array, but pytree transformations put other things in the fields
    scale: PyTree

    def parameters(self) -> tuple[Array, Array]:
        """`loc` and `scale`, broadcast, in one dtype, at least float32."""
        dtype = jnp.result_type(self.loc, self.scale, jnp.float32)
        loc, scale = jnp.asarray(self.loc, dtype), jnp.asarray(self.scale, dtype)
        loc, scale = jnp.broadcast_arrays(loc, scale)  # before JAX 0.12, a list
        return loc, scale

    def narrow(self, value: Array) -> Array:
        """`value` in the dtype of `loc`."""
        return value.astype(jnp.result_type(self.loc, 0.0))

    def sample(self, key: PRNGKeyArray, rows: random.Rows | None = None) -> Float[Array, "..."]:
        """One draw per element in `loc`'s dtype; differentiable (torch's `rsample`).

        With `rows`, these rows of a larger batch are drawn as they are in the whole.
        """
        loc, scale = self.parameters()
        return self.narrow(loc + scale * random.normal(key, loc, rows))

    def log_prob(self, value: ArrayLike) -> Float[Array, "..."]:
        """Log-density of each element of `value`, which broadcasts with `loc`."""
        loc, scale = self.parameters()
        squares = (jnp.asarray(value) - loc) ** 2 / (2 * scale**2)
        return -squares - jnp.log(scale) - math.log(math.sqrt(2 * math.pi))

    def entropy(self) -> Float[Array, "..."]:
        """Differential entropy of each element."""
        _, scale = self.parameters()
        return 0.5 + 0.5 * math.log(2 * math.pi) + jnp.log(scale)

    def mode(self) -> Float[Array, "..."]:
        """The most likely value, `loc`."""
        return self.narrow(self.parameters()[0])


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class TanhNormal(Normal):
    """The law of tanh(u), u ~ N(loc, scale): actions inside (-1, 1), element by element.

    Squashing a draw from a Normal with tanh while keeping the Normal's log-probability, as
    PufferLib's guide suggests, is wrong: the density also changes by the Jacobian, so that
    log p(tanh(u)) = log N(u) - log(1 - tanh(u)^2) (Haarnoja et al. 2018, appendix C). The last
    term is computed as 2 (log 2 - u - softplus(-2u)), which never overflows.

    Example:
        >>> import jax, puffer_jax
        >>> logits = puffer_jax.TanhNormal(jax.numpy.zeros((8, 2)), jax.numpy.ones((8, 2)))
        >>> action, logprob, _ = puffer_jax.sample_logits(logits, key=jax.random.key(0))
        >>> bool((abs(action) < 1).all())
        True
    """

    @staticmethod
    def _log_slope(u: Array) -> Array:
        return 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))

    def sample(self, key: PRNGKeyArray, rows: random.Rows | None = None) -> Float[Array, "..."]:
        """One draw per element in `loc`'s dtype; differentiable. Rounding may make it +-1."""
        return self.sample_and_log_prob(key, rows)[0]

    def sample_and_log_prob(
        self, key: PRNGKeyArray, rows: random.Rows | None = None
    ) -> tuple[Float[Array, "..."], ...]:
        """A draw and its log-density, from the draw before tanh: exact however near +-1 it is."""
        loc, scale = self.parameters()
        u = loc + scale * random.normal(key, loc, rows)
        return self.narrow(jnp.tanh(u)), Normal.log_prob(self, u) - self._log_slope(u)

    def log_prob(self, value: ArrayLike) -> Float[Array, "..."]:
        """Log-density of each element of `value`, which broadcasts with `loc`.

        The value is first clipped to the largest magnitude below 1 of its own dtype, so that
        +-1 has a finite log-density: 1 - 2^-53 in float64 (u = 18.7), 1 - 2^-24 in float32
        (u = 8.7), 1 - 2^-11 in float16 (u = 4.2), 1 - 2^-8 in bfloat16 (u = 3.1). A clipped
        value gets no gradient; `loc` and `scale` do.
        """
        dtype = jnp.result_type(getattr(value, "dtype", self.parameters()[0]), 0.0)
        edge = 1 - float(jnp.finfo(dtype).epsneg)
        u = jnp.arctanh(jnp.clip(at_least_float32(jnp.asarray(value, dtype)), -edge, edge))
        return super().log_prob(u) - self._log_slope(u)

    def entropy(self) -> Float[Array, "..."]:
        """Differential entropy of each element: H(N) + E[log(1 - tanh(u)^2)].

        The expectation has no closed form. It is a 128-node trapezoidal sum, deterministic and
        differentiable; its error is below 1e-13 for scale <= 2, 1e-10 at 3, 1e-6 at 5, 1e-4 at 8.
        """
        loc, scale = (x[..., None] for x in self.parameters())
        u = loc + scale * _NODES.astype(loc.dtype)
        return super().entropy() + (_WEIGHTS.astype(loc.dtype) * self._log_slope(u)).sum(-1)

    def mode(self) -> Float[Array, "..."]:
        """The centre tanh(loc), the median and deterministic action (not the density's peak)."""
        return self.narrow(jnp.tanh(self.parameters()[0]))


Logits = ArrayLike | Sequence[ArrayLike] | Normal


def _eager(*arrays: Array) -> bool:
    return not any(isinstance(x, Tracer) for x in arrays)


def pick(log_pmf: Array, value: ArrayLike, where: str = "") -> Array:
    """`log_pmf[..., value]`; an index outside 0..n-1 is an error eagerly, NaN when traced."""
    n = log_pmf.shape[-1]
    value = jnp.asarray(value)
    value = value.astype(jnp.promote_types(value.dtype, jnp.int32))  # a uint8 cannot hold n = 300
    valid = (value >= 0) & (value < n)
    if _eager(log_pmf, valid) and not np.all(valid):
        first = np.asarray(value)[~np.asarray(valid)].flat[0]
        raise ValueError(f"action index {first} is out of range for n = {n}{where}")
    index = jnp.where(valid, value, 0).astype(jnp.int32)[..., None]
    shape = jnp.broadcast_shapes(index.shape[:-1], log_pmf.shape[:-1])
    index, log_pmf = jnp.broadcast_to(index, (*shape, 1)), jnp.broadcast_to(log_pmf, (*shape, n))
    return jnp.where(valid, jnp.take_along_axis(log_pmf, index, axis=-1)[..., 0], jnp.nan)


def log_prob(
    logits: Float[ArrayLike, "*#batch n"], value: Num[ArrayLike, "*#batch"]
) -> Float[Array, "..."]:
    """Log-probability of the actions `value` (reference: `pufferlib.pytorch.log_prob`).

    Args:
        logits: normalised logits, (..., n).
        value: action indices, (...), any real dtype; fractions are cut off.

    Returns:
        The chosen entries of `logits`, (...), at least float32. An index outside 0..n-1,
        negative ones included, gives NaN under `jit`, `grad` or `vmap`.

    Raises:
        ValueError: otherwise, for an index outside 0..n-1.

    Example:
        >>> import jax, puffer_jax
        >>> logits = jax.nn.log_softmax(jax.numpy.zeros((3, 4)))
        >>> print(f"{puffer_jax.log_prob(logits, jax.numpy.array([0, 1, 3]))[2]:.4f}")
        -1.3863
    """
    return pick(at_least_float32(logits), value)


def entropy(logits: Float[ArrayLike, "*batch n"]) -> Float[Array, "*batch"]:
    """Entropy of normalised logits, (..., n) -> (...) (reference: `pufferlib.pytorch.entropy`).

    As in the reference, logits are clamped to the smallest finite number, so that -inf counts as
    0. Unlike in the reference, the gradient at -inf is 0 for any upstream gradient, never NaN.

    Example:
        >>> import jax, puffer_jax
        >>> uniform = jax.nn.log_softmax(jax.numpy.zeros((3, 4)))
        >>> print(f"{puffer_jax.entropy(uniform)[0]:.4f}")
        1.3863
    """
    logits = at_least_float32(logits)
    logits = jnp.maximum(logits, jnp.finfo(logits.dtype).min)
    probs = jax.nn.softmax(logits)
    # Where p = 0 the product is 0 whatever the logit: without the logit, -1e38 * 0 and its like
    # stay out of the backward pass as well. NaN != 0, so NaN stays.
    return -(jnp.where(probs != 0, logits, 0) * probs).sum(-1)


def entropy_probs(
    logits: Float[ArrayLike, "*#batch n"], probs: Float[ArrayLike, "*#batch n"]
) -> Float[Array, "..."]:
    """-(logits * probs) summed over n, (..., n) -> (...).

    The reference (`pufferlib.pytorch.entropy_probs`) gives NaN for -inf * 0; here that term is 0,
    with gradient 0.

    Example:
        >>> import jax, puffer_jax
        >>> uniform = jax.nn.log_softmax(jax.numpy.zeros((3, 4)))
        >>> print(f"{puffer_jax.entropy_probs(uniform, jax.numpy.exp(uniform))[0]:.4f}")
        1.3863
    """
    logits, probs = at_least_float32(logits), at_least_float32(probs)
    return -(jnp.where((logits == -jnp.inf) & (probs == 0), 0, logits) * probs).sum(-1)


def mask_logits(
    logits: ArrayLike | Sequence[ArrayLike], mask: ArrayLike | Sequence[ArrayLike]
) -> Array | tuple[Array, ...]:
    """Set the logits of actions that are not allowed to -inf, so that they are never drawn.

    Args:
        logits: floating, (..., n), or a tuple or list of such arrays.
        mask: True where the action is allowed; of the same shape, or a sequence of as many masks.
            In an integer mask (gymnasium's int8 `info["action_mask"]`) all but 0 is allowed.

    Returns:
        The masked logits in their dtype, an array or a tuple. When traced, a row with nothing
        allowed is NaN, which `sample_logits` reports as a bad row.

    Raises:
        TypeError: the mask is neither boolean nor integer.
        ValueError: mask and logits differ in shape or number; or, when nothing is traced, a row
            allows nothing.

    Example:
        >>> import jax, puffer_jax
        >>> mask = jax.numpy.array([[True, False, False]])
        >>> logits = puffer_jax.mask_logits(jax.numpy.zeros((1, 3)), mask)
        >>> int(puffer_jax.sample_logits(logits, key=jax.random.key(0))[0][0])
        0
    """
    if isinstance(logits, tuple | list):
        if not isinstance(mask, tuple | list) or len(mask) != len(logits):
            got = len(mask) if isinstance(mask, tuple | list) else type(mask).__name__
            raise ValueError(f"{len(logits)} arrays of logits need as many masks; got {got}")
        return tuple(_mask_array(*pair) for pair in zip(logits, mask, strict=True))
    return _mask_array(logits, mask)


def _mask_array(logits: Any, mask: Any) -> Array:
    logits, mask = jnp.asarray(logits), jnp.asarray(mask)
    if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.integer):
        raise TypeError(f"mask must be bool or integer, not {mask.dtype} (logits: {logits.dtype})")
    if mask.shape != logits.shape:
        raise ValueError(f"mask of shape {mask.shape} does not fit logits of shape {logits.shape}")
    allowed = mask != 0
    some = allowed.any(-1, keepdims=True)
    if _eager(logits, some) and not np.all(some):
        row = np.argwhere(~np.asarray(some)[..., 0])[0].tolist()
        raise ValueError(f"the mask allows no action in row {row[0] if len(row) == 1 else row}")
    return jnp.where(some, jnp.where(allowed, logits, -jnp.inf), jnp.nan)
