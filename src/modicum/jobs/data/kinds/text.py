"""Documents, learned from whole."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING

from modicum.evaluate.rows import Row, Rows
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import blocks, dataset, ended, text_of
from modicum.registry import row_kind

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def tokenize_text(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, section: DataSection, note: Callable[[str], None] | None
) -> datasets.Dataset:
    """Learn from every token; packed text is one stream, cut into blocks whose last one is shorter."""
    documents = [
        ended(ids, tokenizer) for ids in tokenizer([row["text"] for row in rows.rows], verbose=False).input_ids
    ]
    if section.packing:
        return blocks(list(chain.from_iterable(documents)), section)
    return dataset([(ids, list(ids)) for ids in documents], section, note)


@row_kind("text", fields=("text",), order=30, tokenize=tokenize_text, surrounds=())
def text(section: DataSection, row: Row, index: int) -> Row:
    """Read a document.

    Args:
        section: ``fields`` is read.
        row: A row of the source.
        index: Its number, for errors.

    Raises:
        RecipeError: The field is missing or no text.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> text(DataSection(path="x", fields={"text": "body"}), {"body": "Once.", "id": 3}, 0)
        {'text': 'Once.'}
    """
    return {"text": text_of(section, row, "text", index)}
