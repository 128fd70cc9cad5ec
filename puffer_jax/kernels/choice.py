"""Who computes an operation: XLA, or a kernel for the platform that the program is compiled for.

An operation is declared once, with all its implementations:

    _pool = Operation("max_pool", xla=_pool_xla, cpu=Kernel(_pool_cpu, takes=native.takes))
    y = _pool(x)

Callers know nothing of devices. `use` and `replace` are for tests and measurements.

By default, kernels for CPUs and for JAX's default backend are considered, the others not even
traced, which takes seconds; with PUFFER_JAX_NATIVE=0 in the environment none are. A process that
compiles for devices that it does not have names them: `use("xla", "gpu", "tpu")`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import PyTree

Function = Callable[..., PyTree]
"""(*arrays, **options) -> arrays; an array may also be a pytree of arrays."""

# To XLA's names. Triton compiles for other GPUs, too, but nothing here was ever run on one.
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}

IMPLEMENTATIONS = ("xla", *_PLATFORMS)


class Kernel(NamedTuple):
    """An implementation of an operation for one platform.

    Attributes:
        function: with the arguments, results and first derivatives of the operation's `xla`.
        takes: says of the same arguments, arrays or tracers, whether `function` can compute with
            them. It may look at shapes, dtypes and options, and is asked once per trace.
    """

    function: Function
    takes: Callable[..., bool]


class _Choice(NamedTuple):
    allowed: frozenset[str] | None = None
    replaced: tuple[tuple[str, str, Function], ...] = ()


# Part of the key of all of JAX's caches, so that nothing that `jax.jit` traced under another choice
# is reused; each thread has its own.
_choice = jax.make_user_context(_Choice())

OPERATIONS: dict[str, "Operation"] = {}
"""All operations that imported modules have declared, by name."""


def _default() -> tuple[str, ...]:
    if os.environ.get("PUFFER_JAX_NATIVE") == "0":
        return ("cpu",)  # where it is the kernels' library that is not loaded
    return ("cpu", jax.default_backend())


class Operation:
    """A function of arrays with an implementation by XLA and perhaps kernels for some platforms.

    A call runs the kernel for the platform that the program is compiled for, if there is one that
    takes these arguments; otherwise it runs `xla`. In a traced function that is decided when the
    program is lowered (`jax.lax.platform_dependent`), so one program may serve several platforms.

    Args:
        name: unique.
        xla: the function in JAX's own operations; it takes everything.
        cpu: a kernel for CPUs.
        gpu: a kernel for NVIDIA's GPUs.
        tpu: a kernel for TPUs.

    Attributes:
        name: see above.
        implementations: name -> function, "xla" first.

    Raises:
        ValueError: there already is an operation of this name.
    """

    def __init__(
        self,
        name: str,
        xla: Function,
        *,
        cpu: Kernel | None = None,
        gpu: Kernel | None = None,
        tpu: Kernel | None = None,
    ):
        if name in OPERATIONS:
            raise ValueError(f"there already is an operation named {name!r}")
        kernels = {"cpu": cpu, "gpu": gpu, "tpu": tpu}
        self.name = name
        self._kernels = {where: kernel for where, kernel in kernels.items() if kernel is not None}
        functions = {where: kernel.function for where, kernel in self._kernels.items()}
        self.implementations: dict[str, Function] = {"xla": xla, **functions}
        OPERATIONS[name] = self

    def __call__(self, *arrays: PyTree, **options: object) -> PyTree:
        """Compute the operation.

        Args:
            arrays: pytrees of arrays.
            options: passed to the implementation as they are.
        """
        xla = self._function("xla", options)
        kernels = {
            _PLATFORMS[where]: self._function(where, options)
            for where in self.kernels(*arrays, **options)
        }
        if not kernels:
            return xla(*arrays)
        return jax.lax.platform_dependent(*arrays, default=xla, **kernels)

    def kernels(self, *arrays: PyTree, **options: object) -> tuple[str, ...]:
        """The platforms that have a kernel for these arguments: "cpu", "gpu", "tpu"."""
        allowed = _choice.value.allowed
        if allowed is None:
            allowed = _default()
        return tuple(
            where
            for where, kernel in self._kernels.items()
            if where in allowed and kernel.takes(*arrays, **options)
        )

    def _function(self, implementation: str, options: dict[str, object]) -> Function:
        function = self.implementations[implementation]
        for name, where, other in _choice.value.replaced:
            if (name, where) == (self.name, implementation):
                function = other
        return partial(function, **options) if options else function


@contextmanager
def use(*implementations: str) -> Iterator[None]:
    """Compute with these implementations only, and with XLA's where none of them applies.

        with puffer_jax.kernels.use("xla"):
            ...  # as on a machine without any kernels

    It holds for what this thread traces or runs eagerly inside. Jitted functions are traced anew:
    what was compiled outside is kept, but not run here.

    Args:
        implementations: any of "xla", "cpu", "gpu", "tpu".

    Raises:
        ValueError: a name is not one of these.
    """
    unknown = set(implementations) - set(IMPLEMENTATIONS)
    if unknown:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementations are {known}; got {', '.join(sorted(unknown))}")
    with _choice(_choice.value._replace(allowed=frozenset(implementations))):
        yield


@contextmanager
def replace(operation: str, implementation: str, function: Function) -> Iterator[None]:
    """Replace an implementation by another function, say by a wrong one that tests must find.

    It holds where `use` would.

    Args:
        operation: a key of `OPERATIONS`.
        implementation: a key of its `implementations`.
        function: hashable, as functions are.

    Raises:
        KeyError: there is no such implementation.
    """
    OPERATIONS[operation].implementations[implementation]
    choice = _choice.value
    replaced = (*choice.replaced, (operation, implementation, function))
    with _choice(choice._replace(replaced=replaced)):
        yield
