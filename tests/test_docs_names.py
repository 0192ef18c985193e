"""What the pages name exists: modules and their members, files, the recipes that come with the package, and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from modicum.recipe import shipped

ROOT = Path(__file__).parents[1]
MADE = {"_build", "methods"}  # pages of the methods are made from the code itself
PAGES = sorted(
    {path for path in (ROOT / "docs").rglob("*.md") if not MADE & set(path.relative_to(ROOT / "docs").parts)}
    | {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("benchmarks/claims/*/README.md")}
)


def exists(name: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def missing(path: Path) -> Iterator[str]:
    """Yield what a page names and what is not there."""
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"(?<![/\w])modicum(?:\.[A-Za-z_]\w*)+", text))
    for module, imported in re.findall(r"^\s*(?:>>> )?from (modicum[\w.]*) import ([\w, ]+)$", text, re.M):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    yield from (name for name in sorted(names) if not exists(name))
    for module in re.findall(r"python -m (benchmarks[\w.]+)", text):
        if not (ROOT / module.rstrip(".").replace(".", "/")).with_suffix(".py").exists():
            yield module
    for file in re.findall(r"`((?:benchmarks|docs|src|tests)/[\w./-]+)`", text):
        if "/NAME" not in file and not (ROOT / file).exists():
            yield file
    for recipe in re.findall(r"modicum run ([\w-]+)(?=[`\s])", text):
        if recipe not in shipped() and not recipe.isupper():
            yield f"recipe {recipe}"
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        if not (path.parent / target).exists():
            yield f"link to {target}"
    for target in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", text):
        if "methods/" not in target and not (path.parent / f"{target}.md").exists():
            yield f"page {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert not list(missing(page))


def test_names_that_do_not_exist_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`modicum.weights.merge` `modicum.weights.no_such` `tests/no_such.py` `python -m benchmarks.no_such`\n"
        "`modicum run no-such` `modicum run quickstart` [a](no-such.md) [b](https://example.org) {doc}`no-such`\n"
        "from modicum.optim import AdaGC, NoSuch\n"
    )
    assert list(missing(page)) == [
        "modicum.optim.NoSuch", "modicum.weights.no_such", "benchmarks.no_such", "tests/no_such.py", "recipe no-such",
        "link to no-such.md", "page no-such",
    ]  # fmt: skip
