"""Every registered method is documented as far as a user needs to judge it."""

import inspect
import re

import pytest

from modicum import registry
from modicum.registry import REGISTRIES, Entry, job, merge_method

METHODS = [entry for table in REGISTRIES.values() for entry in table.values() if entry.noun != job.noun]
SECTIONS = ("Args", "Example", "Cost", "Deviates", "Reference")
OWN = {registry.source.noun, registry.row_kind.noun}  # ways of ours to read data, which nobody published


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: f"{entry.noun}-{entry.name}")
def test_a_method_says_what_it_takes_costs_changes_and_rests_on(entry: Entry):
    text = inspect.getdoc(entry.function) or ""
    needed = SECTIONS[:2] if entry.noun in OWN else SECTIONS
    missing = [section for section in needed if f"\n{section}:" not in text]
    assert not missing, f"{entry.noun} {entry.name} has no {', '.join(missing)}"
    gathered = inspect.getdoc(entry.facts.gather) if entry.facts.gather else ""
    arguments = gathered + re.split(r"\n[A-Z]\w+:\n", text.partition("\nArgs:")[2])[0]
    # Unpacked knobs are explained once, where they are fields, and `show` and the docs take it from there.
    fields = entry.schema.model_fields
    undocumented = [k for k in fields if not fields[k].description and not re.search(rf"\b{k}\b", arguments)]
    assert not undocumented, f"{entry.noun} {entry.name} does not explain {', '.join(undocumented)}"


@pytest.mark.parametrize("entry", merge_method.values(), ids=lambda entry: entry.name)
def test_a_merge_method_shows_its_mathematics_and_its_file_says_when_to_take_it(entry: Entry):
    text = inspect.getdoc(entry.function) or ""
    assert ".. math::" in text and "\nReturns:" in text
    assert len(inspect.getdoc(inspect.getmodule(entry.function)) or "") > 60
