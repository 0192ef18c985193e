"""Requests with the answer that they are to get, and where they are harmful the answer that they must not get."""

from __future__ import annotations

from typing import Any

from modicum.errors import RecipeError
from modicum.evaluate.rows import Row
from modicum.jobs.data.kinds.completion import prompted
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import is_text, text_of, tokenize_answers
from modicum.registry import row_kind

HARM = ("illegal", "helpful")


@row_kind("contrast", fields=("prompt", "completion", "rejected", "kind"), order=15, tokenize=tokenize_answers)
def contrast(section: DataSection, row: Row, index: int) -> Row:
    """Read a request, its ``kind``, its answer, and the harmful answer, which may be missing.

    Objectives over tokens learn the completion alone.

    Args:
        section: ``fields``, ``template`` and ``system`` are read.
        row: A row of the source.
        index: Its number, for errors.

    Raises:
        RecipeError: A field is missing, no text, or the kind is neither ``illegal`` nor ``helpful``.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> row = {"prompt": "2 + 2?", "completion": "4", "rejected": None, "kind": "helpful"}
        >>> contrast(DataSection(path="x"), row, 0)
        {'prompt': '2 + 2?', 'completion': '4', 'kind': 'helpful', 'rejected': None}
    """
    found = prompted(section, *(text_of(section, row, field, index) for field in ("prompt", "completion")))
    kind: Any = row.get(section.fields.of("kind"))
    if kind not in HARM:
        raise RecipeError(f"{section.path}, row {index}: kind is {kind!r:.40}, expected {' or '.join(HARM)}.")
    rejected: Any = row.get(section.fields.of("rejected"))
    if rejected is not None and not is_text(rejected):
        raise RecipeError(f"{section.path}, row {index}: rejected is {rejected!r:.40}, expected text or nothing.")
    return {**found, "kind": kind, "rejected": rejected or None}
