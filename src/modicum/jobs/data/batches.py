"""Data as the batches that a model is measured on: rows, tokens, padding, in one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modicum.jobs.data.collators import collate
from modicum.jobs.data.packing import isolating, ordinary_ids
from modicum.jobs.data.positions import within_table
from modicum.jobs.data.rows import load_rows
from modicum.jobs.data.tokens import tokenize
from modicum.jobs.data.trial import check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from modicum.jobs.data.section import DataSection


def load_batches(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    seed: int,
    note: Callable[[str], None] | None = None,
    one_length: bool = False,
    model: Any = None,
) -> list[dict[str, Any]]:
    """Return the data as batches of token ids and labels, which fit in memory as text does.

    Args:
        section: What to read.
        tokenizer: The model's own.
        batch_size: Rows of a batch; the last one may have fewer.
        seed: Used when the section has no seed of its own.
        note: Told when rows were cut or dropped.
        one_length: Put only rows of one length into a batch, shortest first, so that there is no padding.
        model: The model to measure, which is tried on packed rows: samples must not see each other.

    Raises:
        ModicumError: The data cannot be read, nothing is left to learn from, or packed samples see each other.
    """
    if model is not None:
        section = within_table(section, model.config.to_dict(), note or (lambda _: None))
    rows = tokenize(load_rows(section, seed=seed, note=note), tokenizer, section, note=note)
    if model is not None:
        check_tokens(model, rows)
    pad: Callable[..., dict[str, Any]] = collate(tokenizer)
    if model is not None and "position_ids" in rows.column_names:
        pad = isolating(model, pad, ids=ordinary_ids(tokenizer), max_length=section.max_length)
    examples = [rows[index] for index in range(len(rows))]
    groups: dict[int, list[dict[str, Any]]] = {}
    for example in examples:
        groups.setdefault(len(example["input_ids"]) if one_length else 0, []).append(example)
    return [
        pad(group[start : start + batch_size])
        for _, group in sorted(groups.items())
        for start in range(0, len(group), batch_size)
    ]
