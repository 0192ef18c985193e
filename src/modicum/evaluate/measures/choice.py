"""Which of several given answers a model finds likeliest, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from modicum.evaluate.dimensions import brier, calibration_error
from modicum.evaluate.measures.pairs import (
    mean_of,
    question_key,
    read_items,
    refuse_all_long,
    right_difference,
    right_estimate,
)
from modicum.evaluate.rows import Rows, answered
from modicum.evaluate.subject import Likelihood, Result, Subject
from modicum.registry import measure
from modicum.types import PositiveInt


def _details(items: Sequence[Result]) -> dict[str, Any]:
    kept = read_items(items)
    sure, right = [item["confidence"] for item in kept], [item["correct"] == 1.0 for item in kept]
    error, squared = round(calibration_error(sure, right), 6), round(brier(sure, right), 6)
    return {
        "beside": {"calibration error": error, "Brier score": squared},
        "calibration_error": error,
        "brier": squared,
        "confidence": mean_of(sure),
        "by_chance": mean_of([1 / item["choices"] for item in kept]),
        "left_out": len(items) - len(kept),
    }


def _work(count: int) -> str:
    return f"log-probabilities of the answers to {count} questions"


@measure(
    "choice",
    laws={"right_is_better"},
    rows="choice",
    metric="accuracy",
    better="higher",
    unit="share",
    estimate=right_estimate,
    difference=right_difference,
    details=_details,
    work=_work,
)
def choice(
    rows: Rows,
    subject: Subject,
    *,
    score: Literal["mean", "sum"] = "mean",
    batch_size: PositiveInt = 8,
    max_length: int,
) -> list[Result]:
    r"""Ask which of the given answers the model finds likeliest; the share of questions in which it is the right one.

    The picked answer has the highest mean log-probability over its tokens, or the highest sum. Its confidence is its
    share of the probability of all answers, from which calibration error and Brier score are computed.

    .. math:: c = \frac{p(y_{\text{picked}})}{\sum_j p(y_j)}

    Args:
        rows: Questions with choices.
        subject: The model.
        score: What is compared. ``sum`` prefers short answers.
        batch_size: Questions at a time.
        max_length: Questions with longer answers are left out and counted: that of the data.

    Returns:
        For each question the scores of its answers, the picked one, its confidence, and whether it is right; a tie with
        the right one counts its share.

    Raises:
        CheckpointError: All questions are too long.

    Example:
        >>> from types import SimpleNamespace
        >>> rows = Rows("choice", [{"prompt": "1 + 1?", "choices": ["2", "3"], "answer": 0}])
        >>> calm = SimpleNamespace(alternatives=lambda rows, **_: [[Likelihood(1.0, 1), Likelihood(2.0, 1)]])
        >>> [item["correct"] for item in choice(rows, calm, max_length=9)]
        [1.0]

    Cost:
        One forward pass over prompt and all answers of each question.

    Reference:
        T. Brown et al., "Language Models are Few-Shot Learners", 2020, arXiv:2005.14165, section 2.4.
    """
    asked = [[answered(row, option) for option in row["choices"]] for row in rows.rows]
    found = subject.alternatives(asked, max_length=max_length, batch_size=batch_size)
    items = [
        {"index": index, "question": question_key(row), **_item(own, row["answer"], score)}
        for index, (row, own) in enumerate(zip(rows.rows, found, strict=True))
    ]
    refuse_all_long(items, max_length)
    return items


def _item(own: list[Likelihood] | None, answer: int, score: str) -> Result:
    if own is None:
        return {"correct": None}
    values = [-each.nats / (each.tokens if score == "mean" else 1) for each in own]
    highest = max(values)
    best = [number for number, value in enumerate(values) if value == highest]
    least = min(each.nats for each in own)
    shares = [math.exp(least - each.nats) for each in own]
    return {
        "correct": 1 / len(best) if answer in best else 0.0,
        "picked": best[0],
        "answer": answer,
        "choices": len(values),
        "confidence": shares[best[0]] / math.fsum(shares),
        "scores": values,
    }
