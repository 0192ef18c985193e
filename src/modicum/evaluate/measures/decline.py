"""Whether a model answers what can be answered and declines what cannot: three outcomes on either kind of question."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeAlias

from modicum.errors import RecipeError
from modicum.evaluate.dimensions import declining
from modicum.evaluate.intervals import Estimate, paired_proportions, ratio, ratio_difference, wilson
from modicum.evaluate.measures.exact_match import answer_work, normalize
from modicum.evaluate.rows import Rows
from modicum.evaluate.subject import Result, Subject
from modicum.patterns import Pattern
from modicum.registry import measure
from modicum.types import PositiveInt

Metric: TypeAlias = Literal["f1", "truthful", "right"]
Outcome: TypeAlias = Literal["right", "wrong", "declined", "unparsed"]

_KNOW = "know|tell|say|determine|answer|find|see"
DECLINES = (
    r"\b(?:is|are|was|were) ?(?:not|n['’]t) (?:in|part of|on|given|stated|specified|mentioned|provided|included|known|"
    r"available|recorded|listed|possible)\b",
    r"\bnot (?:enough|sufficient) (?:information|data|context)\b",
    r"\bno (?:information|answer|mention|record|data)\b",
    r"\b(?:can|could|do|does|did) ?(?:not|n['’]t) (?:" + _KNOW + r"|contain|include|mention|specify|provide|state)\b",
    r"\b(?:do|does) ?(?:not|n['’]t) (?:have|hold|give) (?:enough |any |that |this |the |an? )?"
    r"(?:information|answer|data|records?|access|details?)\b",
    r"\bunable to (?:" + _KNOW + r")\b",
    r"\b(?:cannot|can['’]t) be (?:determined|answered|known|found)\b",
    r"^\W*(?:unknown|unanswerable|none|n/a|not known|no answer)\W*$",
)


def outcome(text: str, answers: Sequence[str], *, declines: Sequence[str] = ()) -> Outcome:
    """Return what an answer does: it declines, or gives one of the right answers, or is wrong.

    An answer that holds a phrase of declining declines, whatever else it says. One without a letter or digit is
    ``unparsed``. To a question without right answers every other answer is wrong.

    Args:
        text: The answer.
        answers: Right answers, one of which must stand in the text word for word; none for an unanswerable question.
        declines: Regular expressions of declining in small letters, beside the usual English ones.

    Example:
        >>> outcome("Ada's city is Oslo.", ["Oslo"]), outcome("That is not in the record.", ["Oslo"])
        ('right', 'declined')
    """
    if not any(map(str.isalnum, text)):
        return "unparsed"
    own = any(Pattern(pattern, "declines").finds(text.casefold()) for pattern in declines)
    if own or any(re.search(pattern, text, re.IGNORECASE) for pattern in DECLINES):
        return "declined"
    said = f" {normalize(text, normalization='squad')} "
    found = any(f" {normalize(answer, normalization='squad')} " in said for answer in answers)
    return "right" if found else "wrong"


def _counts(items: Sequence[Result]) -> dict[str, int]:
    seen = Counter((item["answerable"], item["outcome"]) for item in items)
    return {
        "right": seen[True, "right"],
        "wrong": seen[True, "wrong"],
        "over_declined": seen[True, "declined"],
        "declined": seen[False, "declined"],
        "answered": seen[False, "wrong"],
    }


def _parts(item: Result, metric: Metric) -> tuple[float, float]:
    """Return what an item adds to the two sums whose ratio the metric is."""
    declined, answerable = item["outcome"] == "declined", item["answerable"]
    if metric == "f1":
        if item["outcome"] == "unparsed":
            return 0.0, 0.0
        return 2.0 * (declined and not answerable), float(declined) + float(not answerable)
    if metric == "truthful":
        return float(item["outcome"] != "wrong"), 1.0
    return float(item["correct"]), 1.0


def _estimate(items: Sequence[Result], *, level: float, metric: Metric = "f1") -> Estimate:
    parts = [_parts(item, metric) for item in items]
    if metric != "f1":
        return wilson(round(sum(x for x, _ in parts)), len(parts), level=level)
    if not any(y for _, y in parts):
        return Estimate(0.0, None, None, len(items))  # nothing could be read
    value, low, high, n = ratio(*zip(*parts, strict=True), level=level)
    if low == high:  # all or nothing was declined, which leaves no spread to linearise
        counted = sum(y > 0 for _, y in parts)
        return wilson(round(value * counted), counted, level=level)._replace(value=value, n=n)
    return Estimate(value, low and max(low, 0.0), high and min(high, 1.0), n)


def _difference(a: Sequence[Result], b: Sequence[Result], *, level: float, metric: Metric) -> Estimate:
    sides = [[_parts(item, metric) for item in items] for items in (a, b)]
    if not all(any(y for _, y in side) for side in sides):
        one, other = (_estimate(items, level=level, metric=metric).value for items in (a, b))
        return Estimate(one - other, None, None, len(a))
    found = ratio_difference(*sides, level=level)
    if found.value == 0 and found.low == found.high:
        same = [bool(item["correct"]) for item in a]
        return paired_proportions(same, same, level=level)
    return found


def _details(items: Sequence[Result]) -> dict[str, Any]:
    """Return the counts of all outcomes, and the scores of declining from those that could be read."""
    counts = _counts(items)
    unread = Counter(item["answerable"] for item in items if item["outcome"] == "unparsed")
    readable = counts["right"] + counts["wrong"] + counts["over_declined"], counts["declined"] + counts["answered"]
    scores = {key: round(value, 6) for key, value in asdict(declining(**counts)).items()} if all(readable) else {}
    answerable = sum(item["answerable"] for item in items)
    beside = {
        "over_refusal": "answerable declined",
        "false_confidence": "unanswerable answered",
        "truthful": "truthful",
    }
    return {
        "beside": {label: scores[key] for key, label in beside.items() if key in scores},
        "counts": counts,
        "unparsed": {"answerable": unread[True], "unanswerable": unread[False]},
        "answerable": answerable,
        "unanswerable": len(items) - answerable,
        "words": sum(len(item["text"].split()) for item in items) / len(items),
        **scores,
    }


def _questions(load: Callable[[], Rows]) -> Rows:
    """Return the questions, of which there must be both kinds."""
    rows = load()
    answerable = sum(bool(row["answers"]) for row in rows.rows)
    if answerable in (0, len(rows)):
        kind = "answerable" if answerable else "unanswerable"
        raise RecipeError(f"all {len(rows)} questions are {kind}, expected some of either kind, best equally many.")
    return rows


def _check(*, declines: Sequence[str]) -> None:
    for pattern in declines:
        Pattern(pattern, "declines")


@measure(
    "decline",
    laws={"right_is_better"},
    rows="question",
    better="higher",
    unit="share",
    data={"path": "task:unanswerable", "split": "test", "size": 60},
    prepare=_questions,
    estimate=_estimate,
    difference=_difference,
    details=_details,
    work=answer_work,
    check=_check,
)
def decline(
    rows: Rows,
    subject: Subject,
    *,
    max_new_tokens: PositiveInt = 32,
    batch_size: PositiveInt = 16,
    declines: tuple[str, ...] = (),
) -> list[Result]:
    r"""Ask answerable and unanswerable questions; F1 of declining, with over-refusal and false confidence beside it.

    Each answer is right, wrong or declines; one that cannot be read is counted apart. With :math:`d` unanswerable
    questions declined, :math:`a` answered, and :math:`o` answerable ones declined,

    .. math:: F_1 = \frac{2d}{2d + o + a}

    ``truthful`` is the share on which nothing false was said, ``right`` the share of right answers and right declines.
    F1 and these depend on how many questions are unanswerable; give equally many of both.

    Args:
        rows: Questions with their right answers, or none.
        subject: The model.
        max_new_tokens: Limit on an answer.
        batch_size: Questions at a time.
        declines: Regular expressions of declining, beside the usual English ones; see :func:`outcome`.
        metric: ``f1``, ``truthful`` or ``right``.

    Returns:
        For each question the text, its outcome, and whether that is the right one.

    Example:
        >>> from types import SimpleNamespace
        >>> rows = Rows("question", [{"prompt": "City?", "answers": ["Oslo"]}, {"prompt": "Pet?", "answers": []}])
        >>> calm = SimpleNamespace(generate=lambda rows, **_: ["Oslo.", "That is not known."])
        >>> [item["outcome"] for item in decline(rows, calm)]
        ['right', 'declined']

    Cost:
        One generation a row.

    Deviates:
        Declining is told by phrases, which miss what is worded otherwise; the list is our choice.

    Reference:
        P. Rajpurkar et al., "Know What You Don't Know: Unanswerable Questions for SQuAD", 2018, arXiv:1806.03822.
    """
    texts = subject.generate(rows.rows, max_new_tokens=max_new_tokens, batch_size=batch_size)
    items: list[Result] = []
    for index, (row, text) in enumerate(zip(rows.rows, texts, strict=True)):
        found, answerable = outcome(text, row["answers"], declines=declines), bool(row["answers"])
        correct = found == ("right" if answerable else "declined")
        items.append({"index": index, "text": text, "answerable": answerable, "outcome": found, "correct": correct})
    return items
