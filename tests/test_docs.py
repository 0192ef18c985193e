"""The documentation's recipes are valid, and its pages name what exists."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from modicum.recipe import parse, parse_yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "methods"} & set(path.relative_to(DOCS).parts))
FENCES = [
    pytest.param(text, id=f"{path.relative_to(DOCS)}-{i}")
    for path in PAGES
    for i, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("text", FENCES)
def test_every_recipe_in_the_guide_is_valid(text: str) -> None:
    parse(parse_yaml(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_example_compiles(page: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("study", sorted(path.parent.name for path in ROOT.glob("benchmarks/claims/*/tables.py")))
def test_the_tables_of_the_guide_are_those_of_the_results(study: str, tmp_path: Path, monkeypatch) -> None:
    if study == "adagc":
        pytest.importorskip("matplotlib", reason="its tables come with a picture")
    tables = import_module(f"benchmarks.claims.{study}.tables")
    monkeypatch.setattr("benchmarks.tables.GUIDE", tmp_path)
    if hasattr(tables, "GUIDE"):
        monkeypatch.setattr(tables, "GUIDE", tmp_path)
    tables.main()
    written = list(tmp_path.glob("*.inc"))
    assert written
    for file in written:
        committed = (DOCS / "guide" / file.name).read_text(encoding="utf-8")
        assert file.read_text(encoding="utf-8") == committed, f"run python -m benchmarks.claims.{study}.tables"


def test_there_are_pages_to_check() -> None:
    assert len(PAGES) >= 9 and len(FENCES) >= 4
