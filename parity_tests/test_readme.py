"""Every Python snippet of every README runs, in order, as a reader would paste them."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("puffer_jax", "parity_tests", "examples")
PAGES = sorted(ROOT.glob("*.md")) + sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


WITH_SNIPPETS = [name for name in NAMES if snippets(ROOT / name)]


def test_the_pages_are_found():
    assert {"README.md", "puffer_jax/README.md", "examples/README.md"} <= set(NAMES)
    assert sum(len(snippets(page)) for page in PAGES) >= 8


@pytest.mark.needs_reference
@pytest.mark.needs_gymnax
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_snippets_run_in_order(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    with jax.enable_x64(False):
        for number, snippet in enumerate(snippets(ROOT / name)):
            exec(compile(snippet, f"{name}, snippet {number}", "exec"), namespace)
    if name == "README.md":
        files = {path.name for path in tmp_path.iterdir()}
        assert files >= {"model.pt", "model.bin", "model.bin.json"}
        assert "gradient" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_commands_on_the_pages_exist(name):
    makefile, text = (ROOT / "Makefile").read_text(), (ROOT / name).read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    for script in re.findall(r"python ((?:examples|parity_tests)/\S+\.py)", text):
        assert (ROOT / script).exists(), script


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for link in re.findall(r'(?:\]\(|src=")([^)"\s]+)', (ROOT / name).read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link
