"""Optional packages: imported when needed, or an error with the line that installs them."""

import importlib
from typing import Any

TORCH = "'torch>=2.10'"
"""What to install for torch."""

PUFFERLIB = "psutil && pip install --no-deps pufferlib-core==3.0.23"
"""What to install for PufferLib, whose package pins an older torch than ours takes."""


def require(
    module: str, user: str, install: str = "", oldest: tuple[int, int] = (0, 0), note: str = ""
) -> Any:
    """Import an optional module.

    Args:
        module: its full name.
        user: what needs it, as the subject of the message: "the plot", "CartPole-v1".
        install: the arguments of `pip install`; by default, the module's package.
        oldest: the first version of the package that will do.
        note: a remark at the end of the message.

    Returns:
        The module.

    Raises:
        ImportError: it is missing or too old; the message has the line that installs it.
    """
    package = module.partition(".")[0]
    how = f"pip install {install or package}{note}"
    try:
        importlib.import_module(package)  # which may be blocked though the module is loaded
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{user} needs {package}: {how}") from error
    if oldest > (0, 0) and _version(found) < oldest:
        needed = ".".join(map(str, oldest))
        raise ImportError(f"{user} needs {package} >= {needed}, not {found.__version__}: {how}")
    return found


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split("+")[0].split(".")[:2])
