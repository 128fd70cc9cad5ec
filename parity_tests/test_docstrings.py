"""Every public function and class has an example, and every example in a docstring runs."""

import ast
import doctest
import inspect
from pathlib import Path

import jax
import pytest

import puffer_jax

HOUSE = Path(puffer_jax.__file__).parent


def docstrings() -> dict[str, str]:
    """Those with examples, by file and name; read, not imported, so optional packages may lack."""
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and ">>>" in (
                text := ast.get_docstring(node) or ""
            ):
                found[f"{path.relative_to(HOUSE)}:{node.name}"] = text
    return found


EXAMPLES = docstrings()
PUBLIC = [
    name
    for name in puffer_jax.__all__
    if callable(value := getattr(puffer_jax, name))
    and not (inspect.isclass(value) and issubclass(value, Exception))
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_an_example(name):
    assert ">>>" in (inspect.getdoc(getattr(puffer_jax, name)) or "")


def marked(name: str):
    """What compares with the reference needs it, and Stable-Baselines3 its torch."""
    needs = any(part in name for part in ("parity/", "sb3.py"))
    return pytest.param(name, marks=pytest.mark.needs_reference if needs else ())


@pytest.mark.parametrize("name", map(marked, EXAMPLES))
def test_examples_run(name, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(EXAMPLES[name], {}, name, name, 0)
    said: list[str] = []
    with jax.enable_x64(False):
        failed, tried = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert tried and not failed, "".join(said)
