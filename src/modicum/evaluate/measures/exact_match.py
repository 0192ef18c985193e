"""Whether an answer is the expected one: for evaluation and for rewards alike.

Two texts are compared after :func:`normalize`, by one of two definitions. ``edges`` leaves the inside of an answer
alone and suits data of any sort: "-4" is not "4" and "4.5" not "45". ``squad`` is the published definition of SQuAD,
which the suite of large-model tasks (:mod:`modicum.jobs.data.sources.suite`) and lost-in-the-middle follow. The data
says which one is its own; see :class:`modicum.evaluate.rows.Rows`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

from modicum.errors import RecipeError
from modicum.evaluate.intervals import Estimate, paired_proportions, wilson
from modicum.evaluate.rows import Normalization, Rows
from modicum.evaluate.subject import Result, Subject
from modicum.patterns import Pattern
from modicum.registry import measure
from modicum.types import PositiveInt

Score: TypeAlias = Literal["own", "exact_match", "f1"]

_EDGES = " \t\n\"'`*.,:;!"


def normalize(text: str, *, normalization: Normalization = "edges") -> str:
    """Return ``text`` without the differences that do not count when answers are compared.

    Args:
        text: An answer.
        normalization: ``edges`` drops case, surrounding punctuation and repeated white space. ``squad`` drops case, all
            ASCII punctuation, the English articles and repeated white space.

    Example:
        >>> normalize(' The  "Answer". ')
        'the "answer'
        >>> normalize("**42.**") == normalize("42")
        True
        >>> normalize("The  answer: 1,204.", normalization="squad")
        'answer 1204'

    Reference:
        P. Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", arXiv:1606.05250, the
        evaluation script, for ``squad``. ``edges`` is our choice.
    """
    if normalization == "edges":
        return re.sub(r"\s+", " ", text).strip(_EDGES).casefold()
    # The published script removes punctuation before articles, so that "a-b" becomes the word "ab".
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(answer: str, expected: str | Sequence[str], *, normalization: Normalization = "edges") -> bool:
    """Whether an answer and an expected one are the same after :func:`normalize`.

    Args:
        answer: What the model answered.
        expected: The right answer, or several of which one suffices.
        normalization: See :func:`normalize`.

    Example:
        >>> exact_match("Paris.", "paris"), exact_match("the cat", ["dog", "cat"])
        (True, False)
        >>> exact_match("the cat", ["dog", "cat"], normalization="squad")
        True
    """
    references = [expected] if isinstance(expected, str) else expected
    said = normalize(answer, normalization=normalization)
    return any(said == normalize(reference, normalization=normalization) for reference in references)


def f1(answer: str, references: Sequence[str]) -> float:
    """Return the best overlap of words with a reference, as harmonic mean of precision and recall.

    Words are those of SQuAD's normalisation, as its definition has it.

    Example:
        >>> round(f1("a big cat", ["the cat"]), 3)
        0.667
    """

    def overlap(reference: str) -> float:
        said, right = (normalize(text, normalization="squad").split() for text in (answer, reference))
        if not said or not right:
            return float(said == right)
        common = sum((Counter(said) & Counter(right)).values())
        return 2 * common / (len(said) + len(right))

    return max((overlap(reference) for reference in references), default=0.0)


def score(rows: Rows, index: int, answer: str, *, metric: Score = "own") -> float:
    """Return the score of an answer to one row, from 0 to 1. Evaluation and rewards both ask here.

    Args:
        rows: The data.
        index: Which of its rows.
        answer: What the model answered.
        metric: ``own`` is the data's scorer where it has one, else exact match.

    Example:
        >>> rows = Rows("completion", [{"prompt": "?", "completion": "Paris"}])
        >>> score(rows, 0, "paris.")
        1.0
    """
    if metric == "own" and rows.score is not None:
        return rows.score(index, answer)
    row = rows.rows[index]
    references = row.get("references") or [row["completion"]]
    if metric == "f1":
        return f1(answer, references)
    return float(exact_match(answer, references, normalization=rows.normalization))


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
    found = compiled(pattern).all_in(text)
    return (found[-1] if found else text).strip()


def compiled(pattern: str) -> Pattern:
    """Return ``pattern`` compiled, when it is a regular expression with one group."""
    expression = Pattern(pattern, "answer")
    if expression.groups != 1:
        raise RecipeError(f"{pattern!r} has {expression.groups} groups, expected one around the answer.")
    return expression


def check_pattern(*, answer: str | None) -> None:
    """Refuse a pattern that takes no answer out of a text."""
    if answer is not None:
        compiled(answer)


def answer_work(count: int, *, max_new_tokens: int) -> str:
    """Say what is done with so many questions."""
    return f"{count} answers of at most {max_new_tokens} tokens"


def _share(items: Sequence[Result], *, level: float) -> Estimate:
    return wilson(sum(item["correct"] for item in items), len(items), level=level)


def _difference(a: Sequence[Result], b: Sequence[Result], *, level: float) -> Estimate:
    return paired_proportions(*([bool(item["correct"]) for item in items] for items in (a, b)), level=level)


@measure(
    "exact_match",
    laws={"right_is_better"},
    rows="completion",
    better="higher",
    unit="share",
    estimate=_share,
    difference=_difference,
    work=answer_work,
    check=check_pattern,
)
def exact_match_measure(
    rows: Rows,
    subject: Subject,
    *,
    max_new_tokens: PositiveInt = 32,
    batch_size: PositiveInt = 32,
    answer: str | None = None,
) -> list[Result]:
    """Generate an answer to each prompt; the share of those that are right, with Wilson's interval.

    Data that can score answers, such as a task of reasoning-gym, judges by its own rules. Elsewhere an answer is right
    when :func:`exact_match` says so. Some data gives part of a point; a right answer has a full one.

    Args:
        rows: Prompts and completions.
        subject: The model.
        max_new_tokens: Limit on an answer.
        batch_size: Prompts at a time.
        answer: Regular expression whose group is the answer; the last match counts.

    Returns:
        Prompt, text, answer, expected answer and score of each row.

    Example:
        >>> from types import SimpleNamespace
        >>> rows = Rows("completion", [{"prompt": "2 + 2 =", "completion": "4"}])
        >>> parrot = SimpleNamespace(generate=lambda rows, **_: ["I say 4."])
        >>> [item["correct"] for item in exact_match_measure(rows, parrot, answer="say (.*)")]
        [True]

    Cost:
        One generation a row.

    Deviates:
        ``edges``, the normalisation of data that follows no published suite, is our choice.

    Reference:
        P. Rajpurkar et al., "SQuAD", arXiv:1606.05250; E. B. Wilson, JASA 1927, for the interval.
    """
    texts = subject.generate(rows.rows, max_new_tokens=max_new_tokens, batch_size=batch_size)
    items: list[Result] = []
    for index, (row, text) in enumerate(zip(rows.rows, texts, strict=True)):
        given = extract(text, answer)
        points = score(rows, index, given)
        items.append(
            {
                "index": index,
                "prompt": row["prompt"],
                "text": text,
                "answer": given,
                "expected": row["completion"],
                "score": points,
                "correct": points >= 1.0,
            }
        )
    return items
