"""What checks the types of `puffer_jax` in tests."""

from collections.abc import Callable

import beartype


def checked(function: Callable) -> Callable:
    """Beartype, but not for functions within functions, which it would read anew at every call.

    None of those is public.
    """
    return function if "<locals>" in function.__qualname__ else beartype.beartype(function)
