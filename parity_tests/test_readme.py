"""Every Python snippet of the README runs, in order, as a reader would paste them."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.needs_reference
@pytest.mark.needs_gymnax
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_snippets_run_in_order(tmp_path, monkeypatch, capsys):
    assert len(SNIPPETS) >= 5
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    with jax.enable_x64(False):
        for number, snippet in enumerate(SNIPPETS):
            exec(compile(snippet, f"README snippet {number}", "exec"), namespace)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.pt", "model.bin", "model.bin.json"}
    assert "gradient" in capsys.readouterr().out


def test_commands_in_the_readme_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile, target
