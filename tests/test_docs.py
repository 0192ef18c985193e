"""The documentation's recipes are valid, and its pages name what exists."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from modicum.recipe import parse, parse_yaml
from modicum.registry import REGISTRIES

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


def result(name: str, *keys: str) -> Any:
    """Return a value of a result file."""
    value = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    for key in keys:
        value = value[key]
    return value


def campaign(name: str, *ways: str) -> int:
    """Count the ends of a campaign whose names hold one of the words."""
    return sum(n for end, n in result(name, "ends").items() if not ways or any(way in end for way in ways))


KILLS = ("SIG", "killed")
TIMES = [case["pairs_per_second_ratio"] for case in result("preferences-speed", "cases").values()]
MERGES = [method["ratio"]["seconds"] for method in result("merge", "methods").values()]
HOPS = {(cell["variant"], cell["seed"]): cell["accuracy"] for cell in result("zero-token-hops", "cells").values()}
KEYS = [HOPS["ZTT", seed] - HOPS["off-by-one key", seed] for seed in range(10)]
# What a page says, and the figures in it.
STATED: list[tuple[str, str, Sequence[Any]]] = [
    ("README.md", "run unchanged, {:.1f} to {:.1f} times faster", [min(MERGES), max(MERGES)]),
    ("README.md", "DPO, {:.1f} to {:.1f} times as fast as TRL's", [min(TIMES), max(TIMES)]),
    (
        "docs/guide/route.md",
        "{:.2f} times as fast as the plain model, {:.2f} times as fast as PEFT",
        [result("routed-speed", "parts", "decode", f"routed speed / {peer}") for peer in ("plain", "peft")],
    ),
    (
        "docs/guide/route.md",
        "Memory in bfloat16 is {:.1f} times that of one plain model",
        [result("routed-speed", "parts", "memory", "bfloat16", "routed / plain")],
    ),
    (
        "docs/guide/trust.md",
        "{:,} kills of {:,} runs so far: all but one ended with the same bytes, and nothing lay around. {} were not",
        [campaign("kills", *KILLS), campaign("kills", "again"), campaign("kills", "wrong")],
    ),
    (
        "docs/guide/trust.md",
        "of the {} kills at any moment since then, none was wrong",
        [sum(n for end, n in result("kills", "seeds", "7", "ends").items() if any(way in end for way in KILLS))],
    ),
    (
        "docs/guide/trust.md",
        "{:,} kills of {:,} runs so far, all with the same bytes but for {}:",
        [campaign("kills-ranks", *KILLS), campaign("kills-ranks", "again"), campaign("kills-ranks", "wrong")],
    ),
    (
        "docs/guide/trust.md",
        "{:,} so far, of which {} were not answered",
        [campaign("hostile"), campaign("hostile", "wrong")],
    ),
    ("docs/guide/trust.md", "{:,} so far, all answered alike", [campaign("places")]),
    (
        "docs/guide/trust.md",
        "{:,} so far, of which {} were refused by the run alone",
        [campaign("parity"), campaign("parity", "wrong")],
    ),
    ("docs/guide/trust.md", "{:,} so far: none raised", [campaign("fuzz")]),
    (
        "docs/guide/trust.md",
        "{} moments of a merge, {} moments of a training",
        [result("power-loss", "campaign", job, "moments") for job in ("merge", "train")],
    ),
    (
        "docs/guide/trust.md",
        "{:.2f} times (task arithmetic",
        [result("trust-speed", "shapes", "135m", "merge", "task_arithmetic", "ratio")],
    ),
    (
        "docs/guide/trust.md",
        "Hashing reads {:.1f} GB/s on one core",
        [result("trust-speed", "hash_gb_per_s", "1 threads")],
    ),
    (
        "docs/guide/trust.md",
        "{:.2f} times as long (TIES",
        [result("trust-speed", "shapes", "135m", "merge", "ties", "ratio")],
    ),
    (
        "docs/guide/trust.md",
        "it is {:.2f} times (1.5 s without; 12 pairs, {:.2f} to {:.2f}) and {:.2f} times as long "
        "(TIES, 3.0 s; {:.2f} to {:.2f})",
        [
            value
            for name in ("task_arithmetic", "ties")
            for found in [result("trust-speed", "shapes", "1.5b", "merge", name)]
            for value in (found["ratio"], *found["interval"])
        ],
    ),
    (
        "docs/guide/merge.md",
        "SLERP takes {:.0f} s of a busy machine of two cores and {:.1f} GB of memory, TIES {:.0f} s and {:.1f} GB",
        [
            value
            for method in ("slerp", "ties")
            for value in (result("merge-7b", method, "seconds"), result("merge-7b", method, "peak_mb") / 1e3)
        ],
    ),
    ("docs/guide/train.md", "a step takes {:.2f} of a plain", [result("training-speed", "median_of_ratios")]),
    ("docs/guide/zero-token.md", "(a difference of {:.3f} ±", [sum(KEYS) / len(KEYS)]),
    (
        "docs/guide/zero-token.md",
        "kept to {:.0%} and make greedy text {:.2f} times as fast",
        [
            result("zero-token-serving", "rows", "draft, 8 layers", "ways", "greedy, draft of 1", key)
            for key in ("of the drafted tokens kept", "times no draft")
        ],
    ),
]


@pytest.mark.parametrize(
    ("page", "words", "figures"), STATED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_figures_that_a_page_states_are_those_of_the_results(page: str, words: str, figures: Sequence[Any]) -> None:
    told = " ".join((ROOT / page).read_text(encoding="utf-8").split()).replace(" %", "%")
    assert words.format(*figures) in told


@pytest.mark.parametrize(
    ("words", "kind", "itself"),
    [
        (r"AdaGC and (\d+) other gradient rules", "gradient_rules", 1),
        (r"(\d+) averaging rules", "averagers", 0),
        (r"HRP and (\d+) other ways to start an adapter", "adapter_inits", 1),
        (r"(\d+) merge methods", "merge_methods", 0),
        (r"(\d+) policies", "policies", 0),
        (r"(\d+) stores", "expert_stores", 0),
        (r"(\d+) judges", "judges", 0),
        (r"TeZO and (\d+) other zeroth-order optimizers", "zeroth_order", 1),
    ],
)
def test_the_readme_counts_no_more_methods_than_there_are(words: str, kind: str, itself: int) -> None:
    (told,) = re.findall(words, (ROOT / "README.md").read_text(encoding="utf-8"))
    assert int(told) + itself <= len(REGISTRIES[kind])  # a method of one's own needs no line here


@pytest.mark.parametrize("kind", REGISTRIES)
def test_everything_that_is_registered_has_a_page(kind: str) -> None:
    assert f'"{kind}": "' in (DOCS / "_ext" / "modicum_methods.py").read_text(encoding="utf-8")


def test_every_extra_is_in_the_page_on_installing() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    told = re.findall(r"^\| `([\w-]+)` \|", (DOCS / "guide" / "install.md").read_text(encoding="utf-8"), re.M)
    assert sorted(told) == sorted(extras)


def test_there_are_pages_to_check() -> None:
    assert len(PAGES) >= 9 and len(FENCES) >= 4
