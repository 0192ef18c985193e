"""Rows as tokens before anything runs: a check encodes some of them, so that what would be refused is refused then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from heapq import nlargest
from typing import Any

from modicum.errors import ModicumError
from modicum.evaluate.rows import Row, Rows
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import tokenize

SAMPLE = 64  # rows that a check encodes, or up to twice as many
LONGEST = 4  # rows that are in a sample for their length, by which they may not fit


def sample_of(rows: Rows) -> Rows:
    """Return some of the rows, the longest among them."""
    chosen = {*range(0, len(rows), max(1, len(rows) // SAMPLE))}
    chosen.update(nlargest(LONGEST, range(len(rows)), key=lambda place: _letters(rows.rows[place])))
    return replace(rows, rows=[rows.rows[place] for place in sorted(chosen)])


def _letters(row: Row) -> int:
    """Return about how long a row is."""
    return sum(len(value) if isinstance(value, str) else len(repr(value)) for value in row.values())


def check_tokens(model: Any, data: Any) -> None:
    """Refuse a data set with tokens for which a model has no embedding.

    Raises:
        UnsupportedError: There is one.
    """
    from modicum.evaluate.generation import check_ids

    for name in data.column_names:
        if name.endswith("input_ids"):
            check_ids(model, data[name])


def try_rows(
    rows: Rows,
    tokenizer: Any,
    section: DataSection,
    note: Callable[[str], None],
    *,
    model: Any = None,
    encode: Callable[..., Any] = tokenize,
) -> None:
    """Encode a sample of the rows as the run will, so that what it would refuse is refused now.

    Args:
        rows: All of them.
        tokenizer: The model's own.
        section: Where they come from.
        note: Told what the run would be told.
        model: What reads them, if it is known; its weights are not needed.
        encode: ``(rows, tokenizer, section, *, note)`` gives the data set.

    Raises:
        ModicumError: The rows cannot be learned from.
    """
    sample = replace(rows, rows=rows.rows[:: max(1, len(rows) // SAMPLE)])
    try:
        data = encode(sample, tokenizer, section, note=note)
    except ModicumError:
        if len(sample) == len(rows):
            raise
        data = encode(rows, tokenizer, section, note=note)  # rows left out by chance may be those that do
    if model is not None:
        check_tokens(model, data)
