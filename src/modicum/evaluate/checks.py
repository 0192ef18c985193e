"""Instructions that a program can check, as data: ``{"kind": "words", "count": 5}``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from modicum.errors import RecipeError, did_you_mean

Check: TypeAlias = Mapping[str, Any]

_EDGES = " \t\n\"'`*.,:;!?()"


def _words_of(text: str) -> list[str]:
    return [word for word in (part.strip(_EDGES) for part in text.split()) if word]


def _words(text: str, *, count: int) -> bool:
    return len(text.split()) == count


def _fewer_words(text: str, *, count: int) -> bool:
    return len(text.split()) <= count


def _more_words(text: str, *, count: int) -> bool:
    return len(text.split()) >= count


def _lower_case(text: str) -> bool:
    return text == text.lower()


def _upper_case(text: str) -> bool:
    return text == text.upper()


def _with(text: str, *, text_: str) -> bool:
    return text_.casefold() in text.casefold()


def _without(text: str, *, text_: str) -> bool:
    return text_.casefold() not in text.casefold()


def _begins_with(text: str, *, text_: str) -> bool:
    wanted = _words_of(text_)
    return _words_of(text)[: len(wanted)] == wanted


def _ends_with(text: str, *, text_: str) -> bool:
    wanted = _words_of(text_)
    return _words_of(text)[-len(wanted) :] == wanted


def _json(text: str, *, keys: list[str] | None = None) -> bool:
    try:
        found = json.loads(re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip()))
    except ValueError:
        return False
    return keys is None or (isinstance(found, dict) and sorted(found) == sorted(keys))


def _sentences(text: str, *, count: int) -> bool:
    return len(re.findall(r"[.!?]+(?=\s|$)", text.strip())) == count


def _mentions(text: str, *, text_: str, count: int) -> bool:
    return len(re.findall(rf"\b{re.escape(text_)}\b", text, re.IGNORECASE)) == count


def _lines(text: str, *, count: int, prefix: str = "") -> bool:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return len(lines) == count and all(line.startswith(prefix) for line in lines)


CHECKS: Mapping[str, tuple[Callable[..., bool], Mapping[str, type]]] = MappingProxyType(
    {
        "words": (_words, {"count": int}),
        "at_most_words": (_fewer_words, {"count": int}),
        "at_least_words": (_more_words, {"count": int}),
        "lower_case": (_lower_case, {}),
        "upper_case": (_upper_case, {}),
        "with": (_with, {"text": str}),
        "without": (_without, {"text": str}),
        "begins_with": (_begins_with, {"text": str}),
        "ends_with": (_ends_with, {"text": str}),
        "json": (_json, {"keys": list}),
        "sentences": (_sentences, {"count": int}),
        "mentions": (_mentions, {"text": str, "count": int}),
        "lines": (_lines, {"count": int, "prefix": str}),
    }
)
OPTIONAL = frozenset({"keys", "prefix"})


def kept(check: Check, text: str) -> bool:
    """Whether a text keeps an instruction. White space around it does not count, and an empty text keeps none.

    ==================  ==============================================================================
    ``words``           has exactly ``count`` words; ``at_most_words``, ``at_least_words``
    ``lower_case``      has no capital letter; ``upper_case`` has no small one
    ``with``            holds ``text``, whatever the case; ``without`` does not
    ``begins_with``     begins with the words of ``text``, punctuation aside; ``ends_with`` ends with them
    ``json``            is JSON, in a fence or not, an object with exactly the ``keys`` where they are given
    ``sentences``       has exactly ``count`` sentences
    ``mentions``        holds the word ``text`` exactly ``count`` times
    ``lines``           has exactly ``count`` lines, each of which begins with ``prefix``
    ==================  ==============================================================================

    Args:
        check: ``kind``, and what the kind needs.
        text: An answer.

    Raises:
        RecipeError: There is no such kind, or it lacks something.

    Example:
        >>> kept({"kind": "words", "count": 2}, "Good morning.")
        True
        >>> kept({"kind": "ends_with", "text": "river"}, "Down by the river.")
        True
    """
    function, values = read(check)
    return bool(text.strip()) and function(text.strip(), **values)


def read(check: Check) -> tuple[Callable[..., bool], dict[str, Any]]:
    """Return the function of a check and what it is called with.

    Raises:
        RecipeError: There is no such kind, or it lacks something.

    Example:
        >>> read({"kind": "words", "count": 2})[1]
        {'count': 2}
    """
    if not isinstance(check, Mapping) or check.get("kind") not in CHECKS:
        given = check.get("kind") if isinstance(check, Mapping) else check
        raise RecipeError(f"there is no check {given!r:.60}. {did_you_mean(str(given), CHECKS)}")
    function, needs = CHECKS[check["kind"]]
    values = {key: value for key, value in check.items() if key != "kind" and value is not None}
    for key in {**values, **needs}:
        value = values.get(key)
        if key not in needs:
            raise RecipeError(f"check {check['kind']!r} has no {key!r}. {did_you_mean(key, needs)}")
        if value is None and key in OPTIONAL:
            continue
        if not isinstance(value, needs[key]) or isinstance(value, bool) or value == "":
            raise RecipeError(f"check {check['kind']!r}: {key} is {value!r:.60}, expected {needs[key].__name__}")
    return function, {("text_" if key == "text" else key): value for key, value in values.items()}
