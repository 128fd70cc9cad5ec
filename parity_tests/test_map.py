"""The map in puffer_jax/README.md is what the imports say, and the house keeps its measures."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import puffer_jax

HOUSE = Path(puffer_jax.__file__).parent
PAGE = HOUSE / "README.md"
WINGS = {folder.name for folder in HOUSE.iterdir() if (folder / "__init__.py").exists()}
FLOORS, FILE_LINES, FUNCTION_LINES = 9, 500, 80
NAME = re.compile(r"puffer_jax(\.\w+)+\.?")

Arrows = set[tuple[str, str]]


def named(tree: ast.AST) -> Iterator[str]:
    """The dotted names of this package that a file imports, wherever in it, or uses."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                raise AssertionError(f"line {node.lineno}: relative imports hide where they lead")
            case ast.Attribute(value=ast.Name(id="puffer_jax"), attr=name):
                yield f"puffer_jax.{name}"
            case ast.Constant(value=str(text)) if NAME.fullmatch(
                text
            ):  # importlib, importlib.resources
                yield text


@cache
def front(module: str) -> dict[str, set[str]]:
    """What a module that only re-exports takes from which wing, by name."""
    homes: dict[str, set[str]] = {}
    for node in ast.parse((HOUSE / f"{module}.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                homes[alias.name] = wings(f"{node.module}.{alias.name}")
    return homes


def wings(name: str) -> set[str]:
    """The wings that a dotted name leads to."""
    package, _, rest = name.partition(".")
    if package != "puffer_jax" or not rest:
        return set()
    first, _, rest = rest.partition(".")
    if first in WINGS:
        return {first}
    if first in puffer_jax._HOME:
        return {puffer_jax._HOME[first].partition(".")[0]}
    if not (HOUSE / f"{first}.py").exists():  # __version__, say
        return set()
    homes = front(first)
    return homes.get(rest) or set().union(*homes.values())


def drawn_by_imports() -> Arrows:
    return {
        (wing, to)
        for wing in WINGS
        for file in (HOUSE / wing).rglob("*.py")
        for name in named(ast.parse(file.read_text()))
        for to in wings(name)
        if to != wing
    }


def table() -> dict[str, set[str]]:
    """The map's rows in their order: wing -> what it imports."""
    _, _, rows = PAGE.read_text().partition("| wing | what | imports |\n|---|---|---|\n")
    cells = [row.strip("|").split("|") for row in rows.partition("\n\n")[0].splitlines()]
    return {re.sub(r"\W", "", wing): set(re.findall(r"\w+", imports)) for wing, _, imports in cells}


def test_the_map_is_what_the_imports_say():
    rows = table()
    assert set(rows) == WINGS
    drawn = {(wing, to) for wing, imports in rows.items() for to in imports}
    found = drawn_by_imports()
    assert drawn == found, f"not drawn: {found - drawn}, not there: {drawn - found}"


def test_no_wing_imports_one_after_it():
    order = list(table())
    against = {(a, b) for a, b in drawn_by_imports() if order.index(b) >= order.index(a)}
    assert not against


def test_the_house_is_at_most_nine_floors_high():
    found, heights = drawn_by_imports(), {}
    for wing in table():
        heights[wing] = 1 + max((heights[to] for a, to in found if a == wing), default=0)
    assert max(heights.values()) <= FLOORS, heights


def test_the_front_only_re_exports():
    for file in set(HOUSE.glob("*.py")) - {HOUSE / "__init__.py", HOUSE / "__main__.py"}:
        docstring, *rest = ast.parse(file.read_text()).body
        assert isinstance(docstring, ast.Expr) and rest, file.name
        assert all(isinstance(node, ast.ImportFrom) for node in rest), file.name
        assert all(alias.asname == alias.name for node in rest for alias in node.names), file.name


SOURCES = sorted(path for suffix in ("py", "cc", "h") for path in HOUSE.rglob(f"*.{suffix}"))


def test_no_file_is_above_500_lines():
    lengths = {str(path.relative_to(HOUSE)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: length for name, length in lengths.items() if length > FILE_LINES}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lengths in lines, from the first of the signature to the last of the body."""
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, node.end_lineno - node.lineno + 1
        return
    # C++: braces after parentheses, those of lambdas and methods included, those of loops not.
    code = re.sub(r'//.*|"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])\'', "", path.read_text())
    code = re.sub(r"^ *#(?:.*\\\n)*.*", "", code, flags=re.MULTILINE)
    opened: list[tuple[str, int]] = []
    head = ""  # what stands before a brace, from the end of the statement before
    for number, line in enumerate(code.splitlines()):
        for text in re.findall(r"[{};]|[^{};]+", line + " "):
            match text:
                case "{":
                    lines = number - head.strip().count("\n")
                    opened.append((head.strip().replace("\n", " "), lines))
                case "}":
                    head, start = opened.pop()
                    found = re.search(
                        r"(\w+|\])\s*\(", re.sub(r"^template *<.*?> (?=\w)", "", head)
                    )
                    if found and found[1] not in ("if", "for", "while", "switch"):
                        yield found[1], number - start + 1
            head = "" if text in "{};" else head + text
        head += "\n"
    assert not opened, path


@pytest.mark.parametrize("suffix", [".py", ".cc", ".h"])
def test_no_function_is_above_80_lines(suffix):
    found = {
        f"{path.relative_to(HOUSE)}: {name}": length
        for path in SOURCES
        if path.suffix == suffix
        for name, length in functions(path)
    }
    assert not {name: length for name, length in found.items() if length > FUNCTION_LINES}
