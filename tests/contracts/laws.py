"""Laws of methods, each with a checker and with a method that breaks it.

A law is stated by a method (``laws=`` of its decorator, one of ``known_laws`` of its table) or holds for a whole table.
The files ``*_laws.py`` beside this one hold the checkers, one file for each table. A checker gets an entry and
``draw``, which draws from a Hypothesis strategy; it fails by an ``AssertionError``. Each law names a method that breaks
it, so that a checker which cannot fail is seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import torch
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st

from modicum.errors import ModicumError
from modicum.registry import Entry, Registry

Draw: TypeAlias = Callable[[st.SearchStrategy[Any]], Any]
Check: TypeAlias = Callable[[Entry[Any], Draw], None]

CLOSE = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of numbers near one


@dataclass(frozen=True)
class Law:
    """What entries of a table obey.

    Attributes:
        table: The table.
        name: One of the table's ``known_laws``, or any other name for a law of all its entries.
        check: Fails where an entry breaks the law.
        broken: A method that breaks it.
        facts: Facts of that method.
        examples: How many cases are drawn for each entry.
    """

    table: Registry[..., Any]
    name: str
    check: Check
    broken: Callable[..., Any]
    facts: Mapping[str, Any]
    examples: int

    @property
    def stated(self) -> bool:
        """Whether a method must state the law; the others hold for the whole table."""
        return self.name in self.table.facts.known_laws  # type: ignore[attr-defined]

    def binds(self, entry: Entry[Any]) -> bool:
        """Whether ``entry`` must obey the law."""
        return not self.stated or self.name in entry.laws

    def run(self, entry: Entry[Any], *, shrink: bool = True) -> None:
        """Check drawn cases; knobs that the method refuses together are passed over."""
        phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])]

        @settings(max_examples=self.examples, phases=phases, database=None)
        @given(st.data())
        def cases(data: st.DataObject) -> None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # advice on knobs that nobody should choose
                    self.check(entry, data.draw)
            except ModicumError:
                reject()

        cases()


LAWS: dict[tuple[str, str], Law] = {}


def law(
    table: Registry[..., Any], name: str, *, broken: Callable[..., Any], examples: int = 12, **facts: Any
) -> Callable[[Check], Check]:
    """Register the decorated checker of a law."""

    def register(check: Check) -> Check:
        stated = {"laws": {name}} if name in table.facts.known_laws else {}  # type: ignore[attr-defined]
        LAWS[table.kind, name] = Law(table, name, check, broken, stated | facts, examples)
        return check

    return register


def every_law() -> Mapping[tuple[str, str], Law]:
    """Return all laws, by table and name."""
    for file in sorted(Path(__file__).parent.glob("*_laws.py")):
        if not file.name.startswith("test_"):
            import_module(file.stem)
    return LAWS


@contextmanager
def planted(table: Registry[..., Any], function: Callable[..., Any], **facts: Any) -> Iterator[Entry[Any]]:
    """Register a method for as long as the block lasts."""
    name = "planted"
    table(name, **facts)(function)
    try:
        yield table[name]
    finally:
        del table._entries[name]


def knobs(entry: Entry[Any], draw: Draw, **fixed: Any) -> dict[str, Any]:
    """Return drawn values for the knobs: as often the default as another of their range."""
    values: dict[str, Any] = {}
    for name, field in entry.schema.model_fields.items():
        if name in fixed:
            values[name] = fixed[name]
            continue
        some = [st.sampled_from(found)] if (found := choices(field.annotation, *field.metadata)) else []
        default = [] if field.is_required() else [st.just(field.default)]
        values[name] = draw(st.one_of(*default, *some))
    return entry.knobs(values)


def default_knobs(entry: Entry[Any], **fixed: Any) -> dict[str, Any]:
    """Return the defaults, and the middle of the range for a knob that has none."""
    fields = entry.schema.model_fields
    for name, field in fields.items():
        if field.is_required() and name not in fixed:
            found = choices(field.annotation, *field.metadata)
            fixed[name] = found[len(found) // 2]
    return entry.knobs({name: value for name, value in fixed.items() if name in fields})


def choices(annotation: Any, *metadata: Any) -> list[Any]:
    """Return a few values of a knob's range, its ends included where they belong to it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return choices(arguments[0], *arguments[1:], *metadata)
    if origin in (Union, UnionType):
        return [value for part in arguments for value in choices(part)]
    if origin is Literal:
        return list(arguments)
    candidates: dict[Any, list[Any]] = {
        bool: [False, True],
        int: [0, 1, 2, 3],
        float: [0.0, 0.1, 0.25, 0.5, 1.0, 2.0],
        NoneType: [None],
    }
    return [value for value in candidates.get(annotation, []) if all(_within(value, bound) for bound in metadata)]


def beyond(annotation: Any, *metadata: Any) -> list[Any]:
    """Return numbers outside a knob's range: on an end that does not belong to it, or past one that does."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return beyond(arguments[0], *arguments[1:], *metadata)
    if origin in (Union, UnionType):
        numbers = [part for part in arguments if part is not NoneType]
        return beyond(numbers[0]) if len(numbers) == 1 else []
    found: list[Any] = []
    for bound in metadata:
        match bound:
            case Gt(gt=limit) | Lt(lt=limit):
                found.append(limit)
            case Ge(ge=limit):
                found.append(limit - 1)  # type: ignore[operator]
            case Le(le=limit):
                found.append(limit + 1)  # type: ignore[operator]
    return found


def _within(value: Any, bound: Any) -> bool:
    match bound:
        case Gt(gt=limit):
            return bool(value > limit)
        case Ge(ge=limit):
            return bool(value >= limit)
        case Lt(lt=limit):
            return bool(value < limit)
        case Le(le=limit):
            return bool(value <= limit)
    return True
