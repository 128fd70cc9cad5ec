"""PufferLib's `.ini` files, and those in `puffer_jax/presets`: what learns in an environment."""

import ast
import configparser
import functools
import warnings
from pathlib import Path
from typing import Any


def preset_path(env: str) -> Path | None:
    """The file of the preset for an environment, by the name it has in `puffer-jax train`."""
    return next((path for path, names in presets().items() if env in names), None)


@functools.cache
def presets() -> dict[Path, tuple[str, ...]]:
    """The presets, with the names of the environments they are for."""
    folder = Path(__file__).parent.parent / "presets"
    names = {path: read_ini(path)["base"]["env_name"] for path in sorted(folder.glob("*.ini"))}
    return {path: tuple(str(text).split()) for path, text in names.items()}


def read_ini(path: str | Path) -> dict[str, dict[str, Any]]:
    """The sections of a PufferLib `.ini` file; a value that is a Python literal is evaluated.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an `.ini` file.
    """
    parser = configparser.ConfigParser()
    with open(path, encoding="utf-8") as file:
        try:
            parser.read_file(file)
        except (configparser.Error, ValueError) as error:  # the latter: not UTF-8
            raise ValueError(f"{path}: {error}") from error
    return {
        section: {
            name: _literal(_text(path, parser, section, name)) for name in parser.options(section)
        }
        for section in parser.sections()
    }


def _text(path: str | Path, parser: configparser.ConfigParser, section: str, name: str) -> str:
    try:
        return parser.get(section, name)
    except configparser.Error as error:
        raw = parser.get(section, name, raw=True)
        raise ValueError(
            f"{path}: [{section}] {name} = {raw}: %(NAME)s is the value of NAME, and %% a percent "
            f"sign ({str(error).splitlines()[0]})"
        ) from error


def _literal(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            # A text may look like half a literal.
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.literal_eval(text)
    # TypeError: a set of lists; the last two: brackets within brackets, thousands of them.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
