"""Whether the questions of an evaluation stand among the rows that are learned from."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from modicum.errors import RecipeError
from modicum.evaluate.rows import Rows, question_of

DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212"), "-")
# What is punctuation in a sentence is a sign beside a number: minus, the decimal point, times and over, per cent.
SIGNS = re.compile(
    r"-(?=\.?\d)|(?<=[\d)] )-(?= [\d(])|\.(?=\d)|(?<=[\d)])[*/]{1,2}(?=[\w(])|(?<=[\d)] )[*/]{1,2}(?= [\w(])|(?<=\d)%"
)


@lru_cache(maxsize=20_000)  # a grid compares one set with many
def same_text(text: str) -> str:
    """Return a text without case, spaces and punctuation; signs of arithmetic and marks on letters are kept.

    Example:
        >>> same_text("Is it  so?") == same_text("is it so"), same_text("3 + 6") == same_text("3 - 6")
        (True, False)
    """
    text = unicodedata.normalize("NFC", " ".join(text.casefold().translate(DASHES).split()))
    signs = {place for match in SIGNS.finditer(text) for place in range(*match.span())}
    return "".join(letter for place, letter in enumerate(text) if letter.isalnum() or place in signs or _counts(letter))


def _counts(letter: str) -> bool:
    """Whether what is no letter is a mark on one, or a symbol; a grave accent alone quotes."""
    return unicodedata.category(letter)[0] in "MS" and letter != "`"


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
