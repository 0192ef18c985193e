"""Whether the questions of an evaluation stand among the rows that are learned from."""

from __future__ import annotations

from collections.abc import Sequence

from modicum.errors import RecipeError
from modicum.evaluate.rows import Rows, question_of


def same_text(text: str) -> str:
    """Return a text without case, spaces and punctuation.

    Example:
        >>> same_text("Is it  so?") == same_text("is it so")
        True
    """
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def check_apart(training: Rows, evaluation: Rows, *, names: Sequence[str] = ("data", "eval_data")) -> None:
    """Refuse an evaluation whose questions are learned: its score would say nothing.

    Raises:
        RecipeError: A question stands in both; both rows are shown.
    """
    learned = {same_text(question_of(row)): index for index, row in reversed([*enumerate(training.rows)])}
    for index, row in enumerate(evaluation.rows):
        question = question_of(row)
        found = learned.get(same_text(question))
        if same_text(question) and found is not None:  # documents ask nothing
            raise RecipeError(
                f"{names[1]}, row {index} ({question!r:.60}) asks what {names[0]}, row {found} "
                f"({question_of(training.rows[found])!r:.60}) teaches, case, spaces and punctuation aside. "
                "Split the rows by question."
            )
