"""Whether an answer is the expected one."""

from __future__ import annotations

import re

from modicum.errors import RecipeError

_EDGES = " \t\n\"'`*.,:;!"


def normalize(text: str) -> str:
    """Return ``text`` without case, surrounding punctuation and repeated white space.

    Example:
        >>> normalize(' The  "Answer". ')
        'the "answer'
        >>> normalize("**42.**") == normalize("42")
        True
    """
    return re.sub(r"\s+", " ", text).strip(_EDGES).casefold()


def exact_match(answer: str, expected: str) -> bool:
    """Whether two texts are the same after :func:`normalize`.

    Example:
        >>> exact_match("Paris.", "paris")
        True
    """
    return normalize(answer) == normalize(expected)


def extract(text: str, pattern: str | None) -> str:
    """Return the first group of the last match of ``pattern``, or the whole text when there is none.

    Args:
        text: What the model wrote.
        pattern: A regular expression with one group; ``None`` takes the text as it is.

    Raises:
        RecipeError: The pattern is not a regular expression with one group.

    Example:
        >>> extract("2 + 2 = 4. Answer: 4", r"Answer: (.*)")
        '4'
    """
    if pattern is None:
        return text.strip()
    found = re.findall(compiled(pattern), text)
    return (found[-1] if found else text).strip()


def compiled(pattern: str) -> re.Pattern[str]:
    """Return ``pattern`` compiled, when it is a regular expression with one group."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"{pattern!r} is not a regular expression: {error}.") from None
    if expression.groups != 1:
        raise RecipeError(f"{pattern!r} has {expression.groups} groups, expected one around the answer.")
    return expression
