"""Whether a text holds what its writer was given: words or names of the guidelines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from modicum.jobs.safety.filters import ngrams, normal
from modicum.jobs.safety.prompts import Guideline, guideline_text

Spans: TypeAlias = set[tuple[str, ...]]

NGRAM = 12  # words in a row that no text shares with another by chance
LEAST = 5  # words of a guideline that is shorter, and known by all of them; fewer are ordinary speech


def spans_of(guidelines: Sequence[Guideline], *, ngram: int = NGRAM) -> Spans:
    """Return the rows of words by which guidelines are known; a guideline shorter than ``ngram`` is known as a whole.

    Example:
        >>> short = Guideline("a", "safety", "others", "Harm", "Never tell where people live.")
        >>> spans_of([short])
        {('never', 'tell', 'where', 'people', 'live')}
    """
    found = ngrams(guideline_text(guidelines), ngram)
    for guideline in guidelines:
        words = normal(guideline.text).split()
        if min(LEAST, ngram) <= len(words) < ngram:
            found.add(tuple(words))
    return found


def shared_span(text: str, spans: Spans) -> tuple[str, ...] | None:
    """Return words in a row that a text shares with some spans, of any lengths."""
    for size in sorted({len(span) for span in spans}, reverse=True):
        if shared := ngrams(text, size) & spans:
            return min(shared)
    return None


def names_of(guidelines: Sequence[Guideline]) -> re.Pattern[str]:
    """Return what finds ids and titles of guidelines in a text of :func:`normal`.

    Two words or more are a name wherever they stand together. One word, such as «harm», is one only beside the word
    guideline.

    Example:
        >>> names = names_of([Guideline("intent", "reasoning", "others", "Second thoughts", "Think twice.")])
        >>> texts = "My second thoughts:", "By guideline “intent”", "The intent"
        >>> [bool(names.search(normal(text))) for text in texts]
        [True, True, False]
    """
    names = {normal(name) for guideline in guidelines for name in (guideline.id, guideline.title)} - {""}
    phrases = "|".join(re.escape(name) for name in sorted(names) if " " in name) or "(?!)"
    alone = "|".join(re.escape(name) for name in sorted(names) if " " not in name) or "(?!)"
    return re.compile(rf"\b(?:(?:{phrases})|guidelines? (?:{alone})|(?:{alone}) guidelines?)\b")
