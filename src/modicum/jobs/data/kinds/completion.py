"""Prompts and their completions."""

from __future__ import annotations

from modicum.evaluate.rows import Row
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import text_of, tokenize_answers
from modicum.registry import row_kind


@row_kind("completion", fields=("prompt", "completion"), order=20, tokenize=tokenize_answers)
def completion(section: DataSection, row: Row, index: int) -> Row:
    """Read a prompt and its completion; ``section.template`` and ``section.system`` surround the prompt.

    Args:
        section: ``fields``, ``template`` and ``system`` are read.
        row: A row of the source.
        index: Its number, for errors.

    Raises:
        RecipeError: A field is missing or no text.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> completion(DataSection(path="x", template="Q: {prompt}"), {"prompt": "1 + 1?", "completion": "2"}, 0)
        {'prompt': 'Q: 1 + 1?', 'completion': '2'}
    """
    return prompted(section, *(text_of(section, row, field, index) for field in ("prompt", "completion")))


def prompted(section: DataSection, prompt: str, answer: str) -> Row:
    """Return a prompt and its answer as a row, with the template and system message of the section."""
    row: Row = {"prompt": section.template.replace("{prompt}", prompt), "completion": answer}
    return {"system": section.system, **row} if section.system is not None else row
