"""Which of two answers a model finds likelier: the cheap score of every dimension, which needs no judge."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.intervals import Estimate, by_group, by_group_difference
from modicum.evaluate.rows import Row, Rows, answered
from modicum.evaluate.subject import Likelihood, Result, Subject
from modicum.registry import measure
from modicum.types import PositiveInt

Score: TypeAlias = Literal["mean", "sum", "reward"]


def preferred(chosen: float, rejected: float) -> float:
    """Return 1 where the chosen answer has the higher score, 0 where it has the lower one, and 0.5 for a tie.

    Example:
        >>> preferred(-1.0, -2.0), preferred(-1.0, -1.0)
        (1.0, 0.5)
    """
    return 0.5 if chosen == rejected else float(chosen > rejected)


def question_key(row: Row) -> str:
    """Return a name of a row's prompt: answers to one prompt are not independent. The text itself is not kept."""
    asked = {key: row[key] for key in ("system", "prompt", "messages") if key in row}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def read_items(items: Sequence[Result]) -> list[Result]:
    """Return the items that were read whole."""
    return [item for item in items if item["correct"] is not None]


def right_estimate(items: Sequence[Result], *, level: float) -> Estimate:
    """Return the share of right items; those that share a question count as one draw for the interval."""
    kept = read_items(items)
    return by_group([item["correct"] for item in kept], [item["question"] for item in kept], level=level)


def right_difference(a: Sequence[Result], b: Sequence[Result], *, level: float) -> Estimate:
    """Return the difference of two models on the items that both have read."""
    kept = [(x, y) for x, y in zip(a, b, strict=True) if x["correct"] is not None and y["correct"] is not None]
    return by_group_difference(
        [x["correct"] for x, _ in kept], [y["correct"] for _, y in kept], [x["question"] for x, _ in kept], level=level
    )


def refuse_all_long(items: Sequence[Result], max_length: int) -> None:
    """Refuse an evaluation that has read nothing."""
    if not read_items(items):
        raise CheckpointError(
            f"All {len(items)} rows are longer than max_length {max_length}, or than the model can read. Raise it."
        )


def mean_of(values: Sequence[float]) -> float:
    """Return the mean, rounded for the record."""
    return round(math.fsum(values) / len(values), 6)


def _details(items: Sequence[Result]) -> dict[str, Any]:
    kept = read_items(items)
    columns = ("margin", "logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected")
    means = {name: mean_of([item[name] for item in kept]) for name in columns}
    parts: dict[str, list[float]] = {}
    for item in kept:
        if "dimension" in item:
            parts.setdefault(item["dimension"], []).append(item["correct"])
    return {
        "beside": {f"{name.replace('_', ' of ')} answers": value for name, value in means.items() if "_" in name},
        **means,
        **({"dimensions": {name: mean_of(values) for name, values in parts.items()}} if parts else {}),
        "ties": sum(item["correct"] == 0.5 for item in kept),
        "left_out": len(items) - len(kept),
    }


def _check(*, score: str, reference: str | None) -> None:
    if (score == "reward") != (reference is not None):
        raise RecipeError(
            "score: reward compares with a reference, and no other score does: set score: reward and reference: MODEL, "
            "or neither"
        )


def _work(count: int) -> str:
    return f"log-probabilities of {count} pairs of answers"


@measure(
    "pairs",
    laws={"right_is_better"},
    rows="preference",
    metric="pair_accuracy",
    better="higher",
    unit="share",
    estimate=right_estimate,
    difference=right_difference,
    details=_details,
    work=_work,
    check=_check,
    reads=("reference",),
)
def pairs(
    rows: Rows,
    subject: Subject,
    *,
    score: Score = "mean",
    reference: str | None = None,
    batch_size: PositiveInt = 8,
    max_length: int,
    reference_of: Callable[[str], Any],
) -> list[Result]:
    r"""Ask which answer of each pair the model finds likelier; the share of pairs in which it is the chosen one.

    .. math:: \frac1n \sum_i [s(y_w) > s(y_l)] + \tfrac12 [s(y_w) = s(y_l)]

    where :math:`s` is the mean log-probability of an answer's tokens, their sum, or the implicit reward
    :math:`\log \pi(y) - \log \pi_0(y)` that an objective such as DPO trains. The interval counts pairs of one prompt as
    one draw.

    Args:
        rows: Pairs of answers.
        subject: The model.
        score: What is compared; see above. ``sum`` prefers short answers.
        reference: The model of :math:`\pi_0`, for ``reward``.
        batch_size: Pairs at a time.
        max_length: Pairs with longer answers are left out and counted: that of the data.
        reference_of: Supplied by the job.

    Returns:
        For each pair the scores' margin, summed log-probabilities and tokens of both answers, and whether the chosen
        one wins; a hash stands for the prompt.

    Raises:
        CheckpointError: All pairs are too long.

    Example:
        >>> from types import SimpleNamespace
        >>> rows = Rows("preference", [{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}])
        >>> calm = SimpleNamespace(alternatives=lambda rows, **_: [[Likelihood(1.0, 1), Likelihood(2.0, 1)]])
        >>> [item["correct"] for item in pairs(rows, calm, max_length=9, reference_of=None)]
        [1.0]

    Cost:
        One forward pass over prompt and both answers of each pair.

    Deviates:
        The mean over tokens as default, which does not favour short answers, is our choice.

    Reference:
        R. Rafailov et al., "Direct Preference Optimization", 2023, arXiv:2305.18290, for the implicit reward.
    """
    asked = [[answered(row, row["chosen"]), answered(row, row["rejected"])] for row in rows.rows]
    found = subject.alternatives(asked, max_length=max_length, batch_size=batch_size)
    before: Sequence[list[Likelihood] | None] = [None] * len(asked)
    if reference is not None:
        before = reference_of(reference).alternatives(asked, max_length=max_length, batch_size=batch_size)
    items = [
        {"index": index, "question": question_key(row), **_item(own, old, score), **_part(row)}
        for index, (row, own, old) in enumerate(zip(rows.rows, found, before, strict=True))
    ]
    refuse_all_long(items, max_length)
    return items


def _part(row: Row) -> Result:
    """Return the part of a mixture that a row is of."""
    return {"dimension": row["dimension"]} if "dimension" in row else {}


def _item(own: list[Likelihood] | None, old: list[Likelihood] | None, score: Score) -> Result:
    if own is None or (score == "reward" and old is None):
        return {"correct": None}
    values = [-each.nats for each in own]
    if score == "mean":
        values = [value / each.tokens for value, each in zip(values, own)]
    elif score == "reward" and old is not None:
        values = [value + each.nats for value, each in zip(values, old)]
    return {
        "correct": preferred(*values),
        "margin": values[0] - values[1],
        "logp_chosen": -own[0].nats,
        "logp_rejected": -own[1].nats,
        "tokens_chosen": own[0].tokens,
        "tokens_rejected": own[1].tokens,
    }
