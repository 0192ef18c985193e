"""Every entry of every table stands beside an independent version of its formulas, or in the list of exceptions.

A test that compares a method with such a version says so by a mark, ``@pytest.mark.oracle("merge_methods", "ties")``;
a name of a dictionary of cases stands for the parts of its keys before the first comma. The version is a slow NumPy
transcription, in ``tests/oracles`` or in the test's own file, or the method in another library.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from modicum.registry import REGISTRIES

TESTS = Path(__file__).parents[1]
INDEPENDENT = ("oracles", "numpy", "peft", "torch.nn.utils")  # where other versions come from

# A whole table, or names of one; each with the reason.
EXCEPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "jobs": ("put parts together and compute nothing of their own; tests/jobs runs them", ()),
    "sources": ("read what is there; tests/jobs/data compares rows with the files", ()),
    "row_kinds": ("rearrange fields; tests/jobs/data compares them by hand", ()),
    "adapter_inits": (
        "PEFT draws these itself, and tests/jobs/training trains them through PEFT",
        ("adalora", "dora", "loftq", "lora_fa", "lora_plus", "rslora"),
    ),
    "judges": ("ask a model and read its words; tests/evaluate/judges compares the reading with texts by hand", ()),
    "attacks": ("rewrite a goal; tests/evaluate/attacks reads the goal back", ()),
    "measures": (
        "count answers to questions whose answers are known; tests go by hand",
        ("retrieval", "instructions", "decline", "refusal", "lm_eval"),
    ),
    "models": ("writes stored experts into a host; tests/models/routed compares it with plain models", ("routed",)),
    "objectives": ("returns what came; a law says so", ("ntp",)),
}


def marked(source: str) -> Iterator[tuple[str, str]]:
    """Yield table and name of what a test file compares with an independent version."""
    tree = ast.parse(source)
    modules = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    literals = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
            match mark:
                case ast.Call(func=ast.Attribute(attr="oracle"), args=[ast.Constant(value=str(table)), *names]):
                    if not any(f"{module}.".startswith(f"{known}.") for module in modules for known in INDEPENDENT):
                        continue
                    for name in names:
                        yield from ((table, found) for found in _names(name, literals))


def _names(node: ast.expr, literals: dict[str, ast.expr | None]) -> list[str]:
    match node:
        case ast.Constant(value=str(name)):
            return [name.partition(",")[0]]
        case ast.Name(id=name) if isinstance(literals.get(name), ast.Dict):
            keys: list[ast.expr | None] = literals[name].keys  # type: ignore[union-attr]
            return [found for key in keys if key is not None for found in _names(key, literals)]
    raise ValueError(f"line {node.lineno}: a name, or the name of a dictionary whose keys are names, is expected")


COMPARED = {
    pair
    for file in sorted(TESTS.rglob("test_*.py"))
    if "mark.oracle" in (text := file.read_text(encoding="utf-8"))
    for pair in marked(text)
}


@pytest.mark.parametrize("table", REGISTRIES)
def test_every_entry_stands_beside_an_oracle_or_among_the_exceptions(table: str) -> None:
    reason, names = EXCEPTIONS.get(table, ("", ()))
    excepted = set(names or (REGISTRIES[table] if reason else ()))
    compared = {name for kind, name in COMPARED if kind == table}
    assert compared | excepted == set(REGISTRIES[table]), "write an oracle test and mark it, or take the name out"
    assert not compared & set(names), "an exception that has an oracle is none"


def test_marks_name_tables() -> None:
    assert {table for table, _ in COMPARED} <= REGISTRIES.keys()


def test_only_a_file_with_an_independent_version_counts() -> None:
    mark = '@pytest.mark.oracle("merge_methods", "toy", CASES)\ndef test_toy(): ...\n'
    cases = 'CASES = {"one": 1, "two, more": 2}\n'
    assert list(marked(f"import numpy as np\n{cases}{mark}")) == [("merge_methods", n) for n in ("toy", "one", "two")]
    assert list(marked(f"from oracles import merge\n{cases}{mark}"))
    assert not list(marked(f"import torch\nimport numpyro\n{cases}{mark}"))


def test_oracles_import_nothing_of_modicum() -> None:
    for file in (TESTS / "oracles").glob("*.py"):
        assert "modicum" not in {
            part.partition(".")[0]
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for part in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }, file.name
