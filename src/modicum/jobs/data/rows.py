"""Data for training and evaluation, from anywhere, as rows of one kind.

Nothing is left in a cache: local files and generated tasks are read straight into memory. Only a Hub id goes through
``datasets.load_dataset``. The same section and seed give the same rows everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

from modicum.errors import CheckpointError, RecipeError, listed
from modicum.evaluate.rows import Row, Rows
from modicum.job_facts import RowKindFacts
from modicum.jobs.data.bad_rows import BadRow, each
from modicum.jobs.data.collators import LabelledLogits, PaddingCollator, collate
from modicum.jobs.data.section import DataSection, Fields
from modicum.jobs.data.tokens import tokenize
from modicum.registry import Entry, row_kind, wanted

__all__ = ["DataSection", "Fields", "LabelledLogits", "PaddingCollator", "Rows", "collate", "load_rows", "tokenize"]

ASKED = 50  # from this order on kinds of rows only ask, which is of use to some evaluations


def load_rows(
    section: DataSection, *, seed: int = 0, note: Callable[[str], None] | None = None, prefer: str | None = None
) -> Rows:
    """Read or generate the rows of ``section``.

    Args:
        section: Where rows come from.
        seed: Used when the section has no seed of its own.
        note: Told when bad rows were left out.
        prefer: Kind of rows that is meant where the fields of a row fit several kinds.

    Raises:
        CheckpointError: The file, folder, split or task does not exist, is empty or cannot be read.
        RecipeError: The rows do not have the fields that their format needs.
        MissingExtraError: The source needs a package that is not installed.
    """
    seed = seed if section.seed is None else section.seed
    entry, name = section.source
    offered = {"seed": seed, "note": note, **_config(section)}
    found = entry.function(section, name, **wanted(entry.function, offered))
    if isinstance(found, Rows):
        return found
    if not found:
        raise CheckpointError(f"{section.path} (split {section.split!r}) has no rows, expected at least one.")
    if section.shuffle:
        import torch

        from modicum.random import generator

        order = torch.randperm(len(found), generator=generator(seed, "data", section.split))
        found = [found[i] for i in order.tolist()]
    found = found[: section.size]
    kind = _kind(section, found, prefer)
    for key in ("template", "system"):
        given = getattr(section, key) != DataSection.model_fields[key].default
        if given and key not in kind.facts.surrounds:
            raise RecipeError(f"{section.path} holds {kind.name} rows, which have no prompt for {key}. Leave it out.")
    return Rows(kind.name, each(found, lambda index, row: kind.function(section, row, index), section, note))


def _config(section: DataSection) -> dict[str, Any]:
    """Return the knobs of the source, checked; a source with an open config reads ``section.config`` itself."""
    entry, _ = section.source
    if entry.facts.open_config:
        return {}
    try:
        return entry.knobs(section.config)
    except RecipeError as error:
        raise RecipeError(f"{section.path}: config: {error}") from None


def _kind(section: DataSection, rows: list[Row], prefer: str | None = None) -> Entry[RowKindFacts]:
    """Return the kind of the first row; where bad rows are left out, the kind of most rows."""
    if section.format != "auto":
        return row_kind[section.format]
    kinds = sorted(row_kind.values(), key=lambda kind: (kind.name != prefer, kind.facts.order))
    counts: Counter[str] = Counter()
    for row in rows if section.on_bad_row == "skip" else rows[:1]:
        names = (kind.name for kind in kinds if all(section.fields.of(field) in row for field in kind.facts.fields))
        counts.update(islice(names, 1))
    if counts:
        return row_kind[counts.most_common(1)[0][0]]
    row = rows[0]
    if isinstance(row, BadRow):
        raise CheckpointError(row.why)
    shown = [kind for kind in kinds if kind.name == prefer or kind.facts.order < ASKED]
    *most, last = (" and ".join(repr(section.fields.of(field)) for field in kind.facts.fields) for kind in shown)
    raise RecipeError(
        f"{section.path}: rows have the fields {listed(row) or 'none'}; "
        f"expected {', '.join(most)}, or {last}. Name yours: fields: {{prompt: …, completion: …}}"
    )
