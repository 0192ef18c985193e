"""Questions with several answers to choose from, one of which is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modicum.errors import RecipeError
from modicum.evaluate.rows import Row, Rows, answered
from modicum.jobs.data.kinds.completion import prompted
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import is_text, text_of, tokenize_answers
from modicum.registry import row_kind

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def tokenize_right(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, section: DataSection, note: Callable[[str], None] | None
) -> datasets.Dataset:
    """Learn the right answers."""
    answers = [answered(row, row["choices"][row["answer"]]) for row in rows.rows]
    return tokenize_answers(replace(rows, kind="completion", rows=answers), tokenizer, section, note)


@row_kind("choice", fields=("prompt", "choices", "answer"), order=25, tokenize=tokenize_right)
def choice(section: DataSection, row: Row, index: int) -> Row:
    """Read a question with its choices; ``section.template`` and ``section.system`` surround the question.

    Choices are a list of texts, or ``{text: […], label: […]}`` as in ARC. The answer is a number from 0, a label, a
    letter (A is the first), or the text of a choice.

    Args:
        section: ``fields``, ``template`` and ``system`` are read.
        row: A row of the source.
        index: Its number, for errors.

    Raises:
        RecipeError: There are not two or more different texts to choose from, or the answer is none of them.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> choice(DataSection(path="x"), {"prompt": "1 + 1?", "choices": ["2", "3"], "answer": "A"}, 0)
        {'prompt': '1 + 1?', 'choices': ['2', '3'], 'answer': 0}
    """
    where = f"{section.path}, row {index}"
    asked = prompted(section, text_of(section, row, "prompt", index), "")
    del asked["completion"]
    given: Any = row.get(section.fields.of("choices"))
    labels: list[Any] = []
    if isinstance(given, Mapping):
        given, labels = given.get("text"), list(given.get("label") or [])
    texts = list(given) if isinstance(given, list | tuple) else []
    if len(texts) < 2 or not all(is_text(text) and text.strip() for text in texts):
        raise RecipeError(f"{where}: the choices are {given!r:.80}, expected a list of two or more texts.")
    if len({text.strip() for text in texts}) < len(texts):
        raise RecipeError(f"{where}: two choices are the same text ({texts!r:.80}). Drop one.")
    return asked | {"choices": texts, "answer": _place(row.get(section.fields.of("answer")), texts, labels, where)}


def _place(answer: Any, texts: list[str], labels: list[Any], where: str) -> int:
    """Return which choice is meant: by its label, its number, its text, or its letter."""
    if answer in labels and not isinstance(answer, bool):
        return labels.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and not labels:
        if 0 <= answer < len(texts):
            return answer
    elif isinstance(answer, str) and answer in texts:
        return texts.index(answer)
    elif isinstance(answer, str) and len(answer.strip()) == 1 and not labels:
        letter = ord(answer.strip().upper()) - ord("A")
        if 0 <= letter < len(texts):
            return letter
    raise RecipeError(
        f"{where}: the answer is {answer!r:.60}, expected one of {len(texts)} choices: a number from 0 to "
        f"{len(texts) - 1}, a letter, a label or the text itself."
    )
