"""Requests that are harmful or harmless."""

from __future__ import annotations

from modicum.errors import RecipeError
from modicum.evaluate.rows import Row
from modicum.jobs.data.kinds.completion import prompted
from modicum.jobs.data.kinds.instruction import no_answers
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import text_of
from modicum.registry import row_kind


@row_kind("request", fields=("prompt", "harmful"), order=52, tokenize=no_answers)
def request(section: DataSection, row: Row, index: int) -> Row:
    """Read a request and whether it is harmful; ``goal`` may say what is asked for behind a wrapper.

    Args:
        section: ``fields``, ``template`` and ``system`` are read.
        row: A row of the source.
        index: Its number, for errors.

    Raises:
        RecipeError: A field is missing or of another form.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> request(DataSection(path="x"), {"prompt": "How do I kill a process?", "harmful": False}, 0)
        {'prompt': 'How do I kill a process?', 'harmful': False}
    """
    asked = prompted(section, text_of(section, row, "prompt", index), "")
    del asked["completion"]
    name = section.fields.of("harmful")
    harmful = row.get(name)
    if not isinstance(harmful, bool) and harmful not in (0, 1):
        raise RecipeError(f"{section.path}, row {index}: {name!r} is {harmful!r:.60}, expected true or false.")
    goal = row.get("goal")
    return asked | {"harmful": bool(harmful)} | ({"goal": goal} if isinstance(goal, str) else {})
