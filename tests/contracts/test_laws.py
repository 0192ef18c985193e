"""Every law that is stated has a checker that can fail, and every method obeys the laws of its table and its own."""

from __future__ import annotations

import pytest
from laws import Law, beyond, every_law, planted
from objective_laws import zeroes_labels
from zeroth_order_laws import NeverMoves

from modicum.errors import RecipeError
from modicum.registry import REGISTRIES, Entry, objective, zeroth_order
from modicum.types import Fraction, PositiveInt

LAWS = every_law()
BOUND = [
    pytest.param(law, entry, id=f"{entry.noun}-{entry.name}-{law.name}")
    for law in LAWS.values()
    for entry in law.table.values()
    if law.binds(entry)
]
ENTRIES = [
    pytest.param(entry, id=f"{entry.noun}-{entry.name}") for table in REGISTRIES.values() for entry in table.values()
]


def test_every_law_that_may_be_stated_has_a_checker() -> None:
    known = {(table.kind, name) for table in REGISTRIES.values() for name in table.facts.known_laws}  # type: ignore[attr-defined]
    assert known == {key for key, law in LAWS.items() if law.stated}


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: f"{law.table.kind}-{law.name}")
def test_a_checker_fails_for_a_method_that_breaks_its_law(law: Law) -> None:
    with planted(law.table, law.broken, **law.facts) as entry, pytest.raises(AssertionError):
        law.run(entry, shrink=False)


def test_an_optimiser_that_never_moves_does_not_pass() -> None:
    with planted(zeroth_order, NeverMoves) as toy:
        assert "with a learning rate every tensor moves, and the loss falls" in broken_laws(toy, zeroth_order.kind)


def test_an_objective_that_zeroes_labels_does_not_pass() -> None:
    with planted(objective, zeroes_labels, laws={"labels_untouched"}) as toy:
        assert "labels_untouched" in broken_laws(toy, objective.kind)


def broken_laws(entry: Entry, kind: str) -> list[str]:
    broken = []
    for (table, name), law in LAWS.items():
        if table == kind and law.binds(entry):
            try:
                law.run(entry, shrink=False)
            except Exception:
                broken.append(name)
    return broken


@pytest.mark.parametrize(("law", "entry"), BOUND)
def test_a_method_obeys(law: Law, entry: Entry) -> None:
    law.run(entry)


@pytest.mark.parametrize("entry", ENTRIES)
def test_unknown_knobs_are_refused(entry: Entry) -> None:
    with pytest.raises(RecipeError, match="unknown key 'no_such_knob'"):
        entry.knobs({"no_such_knob": 1})


@pytest.mark.parametrize("entry", ENTRIES)
def test_numbers_outside_the_range_of_a_knob_are_refused(entry: Entry) -> None:
    for name, field in entry.schema.model_fields.items():
        for value in beyond(field.annotation, *field.metadata):
            with pytest.raises(RecipeError, match=name):
                entry.knobs({name: value})


def test_some_knobs_have_a_range() -> None:
    assert beyond(Fraction) == [0, 2] and beyond(PositiveInt | None) == [0] and not beyond(float)
    fields = [f for table in REGISTRIES.values() for e in table.values() for f in e.schema.model_fields.values()]
    assert sum(bool(beyond(field.annotation, *field.metadata)) for field in fields) > 50
