"""Every registered method is documented as far as a user needs to judge it."""

import ast
import inspect
import re
import textwrap

import pytest

from modicum import registry
from modicum.knobs import documentation
from modicum.registry import REGISTRIES, Entry, job, merge_method

METHODS = [entry for table in REGISTRIES.values() for entry in table.values() if entry.noun != job.noun]
SECTIONS = ("Args", "Example", "Cost", "Reference")  # others stand where they have something to say
OWN = {registry.source.noun, registry.row_kind.noun}  # ways of ours to read data, which nobody published


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: f"{entry.noun}-{entry.name}")
def test_a_method_says_what_it_takes_costs_changes_and_rests_on(entry: Entry):
    text = documentation(entry.function)
    needed = SECTIONS[:2] if entry.noun in OWN else SECTIONS
    missing = [section for section in needed if f"\n{section}:" not in text]
    assert not missing, f"{entry.noun} {entry.name} has no {', '.join(missing)}"
    gathered = inspect.getdoc(entry.facts.gather) or "" if entry.facts.gather else ""
    arguments = gathered + re.split(r"\n[A-Z]\w+:\n", text.partition("\nArgs:")[2])[0]
    undocumented = [knob for knob in entry.parameters[1] if not re.search(rf"\b{knob}\b", arguments)]
    assert not undocumented, f"{entry.noun} {entry.name} does not explain {', '.join(undocumented)}"


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: f"{entry.noun}-{entry.name}")
def test_what_is_raised_is_said(entry: Entry):
    text = documentation(entry.function)
    assert "\nRaises:" in text or not raises(inspect.getsource(entry.function))


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: f"{entry.noun}-{entry.name}")
def test_a_section_with_nothing_to_say_is_left_out(entry: Entry):
    assert not idle_sections(inspect.getdoc(entry.function) or "")


def raises(source: str) -> bool:
    """Whether there is a ``raise`` in a function's own body, or in a class' constructor."""
    (node,) = ast.parse(textwrap.dedent(source)).body
    if isinstance(node, ast.ClassDef):
        node = next((part for part in node.body if getattr(part, "name", None) == "__init__"), ast.Pass())
    return any(isinstance(part, ast.Raise) for part in ast.walk(node))


def idle_sections(text: str) -> list[str]:
    return re.findall(r"\n([A-Z]\w+):\n\s*(?:None known|None of its own|Nothing)\b", text, re.IGNORECASE)


def test_the_two_checks_above_can_fail():
    assert raises("def f():\n    if True:\n        raise ValueError") and not raises("def f():\n    return 'raise'")
    assert raises("class A:\n    def __init__(self):\n        raise ValueError") and not raises("class A: pass")
    assert idle_sections("A.\n\nDeviates:\n    None known.\n\nRaises:\n    Nothing of its own.") == [
        "Deviates",
        "Raises",
    ]
    assert not idle_sections("A.\n\nDeviates:\n    Rounds up.\n\nReference:\n    None: folklore.")


@pytest.mark.parametrize("entry", merge_method.values(), ids=lambda entry: entry.name)
def test_a_merge_method_shows_its_mathematics_and_its_file_says_when_to_take_it(entry: Entry):
    text = documentation(entry.function)
    assert ".. math::" in text and "\nReturns:" in text
    assert len(inspect.getdoc(inspect.getmodule(entry.function)) or "") > 60
