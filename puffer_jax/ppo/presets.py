"""PufferLib's `.ini` files, and those in `puffer_jax/presets`: what learns in an environment."""

import ast
import configparser
import functools
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
    with open(path) as file:
        try:
            parser.read_file(file)
        except configparser.Error as error:
            raise ValueError(f"{path}: {error}") from error
    return {
        section: {name: _literal(text) for name, text in parser.items(section)}
        for section in parser.sections()
    }


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
