"""Rows as tokens before anything runs: a check encodes some of them, so that what would be refused is refused then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from heapq import nlargest
from itertools import chain
from typing import Any, TypeVar

from modicum.errors import ModicumError
from modicum.evaluate.rows import Row, Rows
from modicum.jobs.data.collators import pad_id
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import tokenize
from modicum.vocabulary import check_ids

T = TypeVar("T")
SAMPLE = 64  # rows that a check encodes, or up to twice as many
LONGEST = 4  # rows that are in a sample for their length, by which they may not fit


def sample_of(rows: Rows) -> Rows:
    """Return some of the rows, the longest among them."""
    chosen = {*range(0, len(rows), max(1, len(rows) // SAMPLE))}
    chosen.update(nlargest(LONGEST, range(len(rows)), key=lambda place: _letters(rows.rows[place])))
    return replace(rows, rows=[rows.rows[place] for place in sorted(chosen)])


def on_some(rows: Rows, act: Callable[[Rows], T]) -> T:
    """Do something with a sample of the rows; where it is refused, with all, since others may do what none of it does.

    Raises:
        ModicumError: It is refused for all rows.
    """
    some = sample_of(rows)
    try:
        return act(some)
    except ModicumError:
        if len(some) == len(rows):
            raise
        return act(rows)


def _letters(row: Row) -> int:
    """Return about how long a row is."""
    return sum(len(value) if isinstance(value, str) else len(repr(value)) for value in row.values())


def check_tokens(model: Any, data: Any) -> None:
    """Refuse a data set with tokens for which a model has no embedding.

    Args:
        model: What reads them.
        data: A data set of ``datasets``, or rows of whatever holds lists of ids.

    Raises:
        UnsupportedError: There is one.
    """
    if not hasattr(data, "column_names"):
        check_ids(model, (ids for place in range(len(data)) for ids in _ids_in(data[place])))
        return
    import pyarrow.compute  # type: ignore[import-untyped]

    # As a column, since a list of all tokens would take many times the memory of the data set.
    tokens = pyarrow.compute.list_flatten(data.data.column("input_ids"))
    check_ids(model, [[pyarrow.compute.max(tokens).as_py() or 0]])


def _ids_in(row: Any) -> Iterator[Sequence[int]]:
    """Yield the lists of whole numbers in a row, wherever they are; positions are no tokens."""
    if isinstance(row, (list, tuple)):
        if row and isinstance(row[0], int):
            yield row
        elif row and not isinstance(row[0], (float, str)):
            yield from chain.from_iterable(map(_ids_in, row))
    elif isinstance(row, Mapping) or is_dataclass(row):
        named = row if isinstance(row, Mapping) else {field.name: getattr(row, field.name) for field in fields(row)}
        yield from chain.from_iterable(_ids_in(value) for name, value in named.items() if name != "position_ids")


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
        ModicumError: The rows cannot be learned from, or not put into batches.
    """
    pad_id(tokenizer)
    data = on_some(rows, lambda some: encode(some, tokenizer, section, note=note))
    if model is not None:
        check_tokens(model, data)
