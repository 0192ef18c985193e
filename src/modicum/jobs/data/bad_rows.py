"""Rows that cannot be read or learned from: the first one ends the run, or all of them are left out and counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from modicum.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from modicum.jobs.data.section import DataSection

T = TypeVar("T")
EXAMPLES = 3


class BadRow(dict[str, Any]):
    """Stands for a row that a source could not read.

    Args:
        why: One line.
    """

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why


def each(
    rows: Iterable[Any],
    make: Callable[[int, Any], T],
    section: DataSection,
    note: Callable[[str], None] | None = None,
) -> list[T]:
    """Return ``make(index, row)`` of every row.

    Args:
        rows: What to go through.
        make: Raises a CheckpointError or RecipeError for a bad row.
        section: ``on_bad_row`` says whether the first bad row ends the run, or bad rows are left out.
        note: Told how many rows were left out, with some examples; without it this is a Python warning.

    Raises:
        ModicumError: A row is bad and ``on_bad_row`` is ``stop``, or all are.
    """
    made, refused, count = [], [], 0
    for index, row in enumerate(rows):
        count += 1
        try:
            if isinstance(row, BadRow):
                raise CheckpointError(row.why)
            made.append(make(index, row))
        except (CheckpointError, RecipeError) as error:
            if section.on_bad_row == "stop":
                raise type(error)(f"{error} (data.on_bad_row: skip leaves such rows out.)") from None
            refused.append(str(error))
    if refused and not made:
        raise CheckpointError(f"{section.path}: all {count} rows are bad. The first: {refused[0]}")
    if refused:
        examples = " | ".join(f"{why:.300}" for why in refused[:EXAMPLES])
        told = f"{section.path}: {len(refused)} of {count} rows were left out (on_bad_row: skip): {examples}"
        (note or warnings.warn)(told + (" | …" if len(refused) > EXAMPLES else ""))
    return made


def whole(
    examples: Iterable[T], length: Callable[[T], int], section: DataSection, note: Callable[[str], None], *, noun: str
) -> list[T]:
    """Return the examples that fit into ``max_length``: an answer that is cut would be compared with a whole one.

    Args:
        examples: As tokens.
        length: Of an example's longest row, in tokens.
        section: ``max_length`` is read.
        note: Told how many were left out.
        noun: What to call the examples.

    Raises:
        CheckpointError: None fits.
    """
    given = list(examples)
    kept = [example for example in given if length(example) <= section.max_length]
    if not kept:
        raise CheckpointError(
            f"{section.path}: all {len(given)} {noun} are longer than max_length {section.max_length}. Raise it."
        )
    if len(kept) < len(given):
        note(
            f"{section.path}: {len(given) - len(kept)} of {len(given)} {noun} are longer than max_length "
            f"{section.max_length} and were left out; none is cut."
        )
    return kept
