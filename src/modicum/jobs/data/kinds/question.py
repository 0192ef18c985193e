"""Questions that may have no answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modicum.errors import RecipeError
from modicum.evaluate.rows import Row
from modicum.jobs.data.kinds.completion import prompted
from modicum.jobs.data.kinds.instruction import no_answers
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import is_text, text_of
from modicum.registry import row_kind


@row_kind("question", fields=("prompt", "answers"), order=51, tokenize=no_answers)
def question(section: DataSection, row: Row, index: int) -> Row:
    """Read a question with its right answers, of which an unanswerable one has none.

    Answers are a text, a list of texts, ``{text: […]}`` as in SQuAD 2.0, or nothing.

    Args:
        section: ``fields``, ``template`` and ``system`` are read.
        row: A row of the source.
        index: Its number, for errors.

    Raises:
        RecipeError: The answers are of another form, or one is empty.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> question(DataSection(path="x"), {"prompt": "Who?", "answers": {"text": []}}, 0)
        {'prompt': 'Who?', 'answers': []}
    """
    asked = prompted(section, text_of(section, row, "prompt", index), "")
    del asked["completion"]
    name = section.fields.of("answers")
    given: Any = row.get(name)
    found = given.get("text") if isinstance(given, Mapping) else given
    found = [found] if isinstance(found, str) else [] if found is None else found
    if name not in row or not isinstance(found, list | tuple):
        raise RecipeError(f"{section.path}, row {index}: {name!r} is {given!r:.60}, expected texts, or [] for none.")
    if not all(is_text(text) and any(map(str.isalnum, text)) for text in found):
        raise RecipeError(f"{section.path}, row {index}: {name!r} is {given!r:.60}, expected texts with letters or [].")
    return asked | {"answers": list(found)}
