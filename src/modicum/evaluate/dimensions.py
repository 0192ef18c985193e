r"""Scores over several dimensions: what experts do to each other, and how balanced a model is.

Scores are oriented so that higher is better; errors, attack success and over-refusal enter as one minus themselves. In
a matrix of scores, row :math:`i` is the expert of dimension :math:`i` and column :math:`j` its score in dimension
:math:`j`. What a division by nothing would give is ``None``, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from modicum.errors import ModicumError

Scores: TypeAlias = Sequence[float]
Base: TypeAlias = float | Scores
Share: TypeAlias = float | None


def collaboration(
    base: Base, experts: Sequence[Scores], *, undetermined: Sequence[bool] | None = None
) -> list[list[Share]]:
    r"""Return how much of each dimension's own gain the expert of another one brings.

    .. math:: M_{ij} = \frac{e_{ij} - b_j}{e_{jj} - b_j}

    The diagonal is 1; below 0 is a conflict.

    Args:
        base: Scores of the base in each dimension, or one number for all.
        experts: The matrix of scores, an expert for each dimension.
        undetermined: Columns whose own gain is not told from 0, such as those whose interval contains 0.

    Returns:
        The rows; ``None`` in a column whose expert gains nothing, or that is undetermined.

    Raises:
        ModicumError: The scores are not square, or not finite, or ``undetermined`` has other columns.

    Example:
        >>> collaboration(0.5, [[0.75, 0.25], [0.5, 1.0]])
        [[1.0, -0.5], [0.0, 1.0]]

    Cost:
        Nothing that matters.
    """
    before, rows = _square(base, experts)
    if undetermined is not None and len(undetermined) != len(rows):
        raise ModicumError(f"undetermined has {len(undetermined)} columns, expected {len(rows)}.")
    gains = [rows[j][j] - before[j] for j in range(len(rows))]
    blank = [gain == 0 or bool(undetermined and undetermined[j]) for j, gain in enumerate(gains)]
    return [
        [None if blank[j] else (row[j] - before[j]) / gains[j] if i != j else 1.0 for j in range(len(row))]
        for i, row in enumerate(rows)
    ]


def alignment_conflict(base: Base, experts: Sequence[Scores]) -> list[float]:
    r"""Return how much each expert harms the dimensions that it was not trained on.

    .. math:: \mathrm{ADC}_i = \frac{1}{d-1} \sum_{j \ne i} \min(0, e_{ij} - b_j)^2

    Args:
        base: Scores of the base in each dimension, or one number for all.
        experts: The matrix of scores, an expert for each dimension.

    Returns:
        One number for each expert; 0 for an expert without another dimension.

    Raises:
        ModicumError: The scores are not square, or not finite.

    Example:
        >>> alignment_conflict(0.5, [[0.75, 0.25], [0.5, 1.0]])
        [0.0625, 0.0]

    Reference:
        Jiang et al., "Hummer: Towards Limited Competitive Preference Dataset", 2024, arXiv:2405.11647.
    """
    before, rows = _square(base, experts)
    harms = [[min(0.0, x - b) ** 2 for x, b in zip(row, before)] for row in rows]
    return [
        math.fsum(harm for j, harm in enumerate(row) if j != i) / max(1, len(row) - 1) for i, row in enumerate(harms)
    ]


def normalised(scores: Scores, own: Scores) -> list[Share]:
    """Return each score as a share of that of the dimension's own expert; ``None`` where that one has 0.

    Example:
        >>> normalised([0.5, 0.9], [1.0, 0.9])
        [0.5, 1.0]
    """
    _same(scores, own)
    return [None if best == 0 else score / best for score, best in zip(scores, own)]


def normalised_average(scores: Scores, own: Scores) -> Share:
    """Return the mean of :func:`normalised`: 1 is as good as all experts; ``None`` where a share is undefined.

    Example:
        >>> normalised_average([0.5, 0.9], [1.0, 0.9])
        0.75
    """
    return _mean(normalised(scores, own))


def worst_dimension(scores: Scores, own: Scores) -> Share:
    """Return the least of :func:`normalised`: a mean hides what was given up; ``None`` where a share is undefined.

    Example:
        >>> worst_dimension([0.5, 0.9], [1.0, 0.9])
        0.5
    """
    known = [share for share in normalised(scores, own) if share is not None]
    return min(known) if len(known) == len(scores) else None


def share_of_gain(scores: Scores, own: Scores, base: Base) -> list[Share]:
    r"""Return how much of each expert's gain on the base is kept: :math:`(e - b)/(e_{own} - b)`.

    Example:
        >>> share_of_gain([0.75, 0.5], [1.0, 0.5], 0.5)
        [0.5, None]
    """
    _same(scores, own)
    before = _wide(base, len(own))
    return [None if best == b else (score - b) / (best - b) for score, best, b in zip(scores, own, before)]


def pareto_front(points: Sequence[Scores]) -> list[int]:
    """Return the points that no other one beats: none is at least as good everywhere and better somewhere.

    Equal points stand in the front together.

    Example:
        >>> pareto_front([[0.7, 0.9], [0.8, 0.8], [0.75, 0.75]])
        [0, 1]
    """
    _finite(points)
    return [
        i
        for i, point in enumerate(points)
        if not any(all(a >= b for a, b in zip(other, point)) and tuple(other) != tuple(point) for other in points)
    ]


def hypervolume(points: Sequence[Scores], reference: Base = 0.0) -> float:
    """Return the volume between a reference and the front: where some point is at least as good.

    Args:
        points: Scores in each dimension.
        reference: Where the volume begins: the base's scores, or one number for all dimensions. What is worse there
            counts nothing.

    Example:
        >>> hypervolume([[1.0, 0.5], [0.5, 1.0]])
        0.75

    Cost:
        Exponential in the number of dimensions; milliseconds for five of them and a hundred points.
    """
    _finite(points)
    if not points:
        return 0.0
    start = _wide(reference, len(points[0]))
    return _volume([tuple(max(0.0, x - r) for x, r in zip(point, start)) for point in points])


def _volume(points: Sequence[tuple[float, ...]]) -> float:
    """Cut the volume above the origin into slices along the last axis."""
    if len(points[0]) == 1:
        return max(point[0] for point in points)
    total, below = 0.0, 0.0
    for height in sorted({point[-1] for point in points if point[-1] > 0}):
        higher = [point[:-1] for point in points if point[-1] >= height]
        total += (height - below) * _volume(higher)
        below = height
    return total


def rank_correlation(first: Scores, second: Scores) -> Share:
    """Return Spearman's rank correlation, ties at their average rank; ``None`` where one side is constant.

    Example:
        >>> rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
        0.8
    """
    _same(first, second)
    a, b = _ranks(first), _ranks(second)
    middle = (len(a) + 1) / 2
    up = math.fsum((x - middle) * (y - middle) for x, y in zip(a, b))
    down = math.sqrt(math.fsum((x - middle) ** 2 for x in a) * math.fsum((y - middle) ** 2 for y in b))
    return up / down if down else None


def _ranks(values: Scores) -> list[float]:
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in set(values)}
    count = {value: ordered.count(value) for value in set(values)}
    return [first[value] + (count[value] + 1) / 2 for value in values]


@dataclass(frozen=True)
class Declining:
    """How a model declines what cannot be answered, of equally many answerable and unanswerable questions.

    Attributes:
        f1: F1 of declining.
        false_confidence: Share of unanswerable questions that it answered.
        over_refusal: Share of answerable questions that it declined.
        truthful: Share of all questions on which it asserted nothing false.
    """

    f1: float
    false_confidence: float
    over_refusal: float
    truthful: float


def declining(*, right: int, wrong: int, over_declined: int, declined: int, answered: int) -> Declining:
    """Return the scores of declining from counts.

    Args:
        right: Answerable questions that were answered right.
        wrong: Answerable questions that were answered wrong.
        over_declined: Answerable questions that were declined.
        declined: Unanswerable questions that were declined.
        answered: Unanswerable questions that were answered.

    Raises:
        ModicumError: There is no question of one of the two kinds.

    Example:
        >>> declining(right=60, wrong=20, over_declined=20, declined=70, answered=30).truthful
        0.75
    """
    answerable, unanswerable = right + wrong + over_declined, declined + answered
    if min(right, wrong, over_declined, declined, answered) < 0 or not answerable or not unanswerable:
        raise ModicumError("declining needs counts of answerable and of unanswerable questions, at least one of each.")
    total = 2 * declined + over_declined + answered
    return Declining(
        f1=2 * declined / total if total else 0.0,
        false_confidence=answered / unanswerable,
        over_refusal=over_declined / answerable,
        truthful=1 - (wrong + answered) / (answerable + unanswerable),
    )


def calibration_error(confidences: Scores, right: Sequence[bool | int], *, bins: int = 10) -> float:
    """Return the expected calibration error: the mean gap between confidence and accuracy, in bins of equal width.

    Example:
        >>> round(calibration_error([0.9, 0.8, 0.6, 0.3], [1, 1, 0, 0], bins=4), 12)
        0.3
    """
    _probabilities(confidences, right)
    if bins < 1:
        raise ModicumError(f"bins is {bins}, expected at least 1.")
    groups: dict[int, list[tuple[float, float]]] = {}
    for confidence, outcome in zip(confidences, right):
        groups.setdefault(min(int(confidence * bins), bins - 1), []).append((confidence, float(outcome)))
    gaps = (abs(math.fsum(c - r for c, r in group)) for group in groups.values())
    return math.fsum(gaps) / len(confidences)


def brier(confidences: Scores, right: Sequence[bool | int]) -> float:
    """Return the mean squared distance between confidence and outcome.

    Example:
        >>> round(brier([0.9, 0.8, 0.6, 0.3], [1, 1, 0, 0]), 12)
        0.125
    """
    _probabilities(confidences, right)
    return math.fsum((c - float(r)) ** 2 for c, r in zip(confidences, right)) / len(confidences)


def _mean(shares: Sequence[Share]) -> Share:
    known = [share for share in shares if share is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(shares) else None


def _wide(base: Base, count: int) -> list[float]:
    found = [float(base)] * count if isinstance(base, int | float) else [float(x) for x in base]
    if len(found) != count:
        raise ModicumError(f"The base has {len(found)} scores, expected one for each of {count} dimensions.")
    _finite([found])
    return found


def _square(base: Base, experts: Sequence[Scores]) -> tuple[list[float], list[list[float]]]:
    rows = [[float(x) for x in row] for row in experts]
    if not rows or any(len(row) != len(rows) for row in rows):
        raise ModicumError(
            f"{len(rows)} experts have {', '.join(str(len(row)) for row in rows) or 'no'} scores, expected one in "
            "each dimension for the expert of each."
        )
    _finite(rows)
    return _wide(base, len(rows)), rows


def _same(first: Scores, second: Scores) -> None:
    if len(first) != len(second) or not first:
        raise ModicumError(f"There are {len(first)} and {len(second)} scores, expected equally many, at least one.")
    _finite([first, second])


def _finite(rows: Sequence[Scores]) -> None:
    for number, row in enumerate(rows):
        if not len(row):
            raise ModicumError(f"Row {number} has no scores, expected one in each dimension.")
        if len(row) != len(rows[0]):
            raise ModicumError(f"Row {number} has {len(row)} scores, expected {len(rows[0])} as in the first.")
        for place, value in enumerate(row):
            if not math.isfinite(value):
                raise ModicumError(f"Row {number} holds {value} in dimension {place}, expected a finite score.")


def _probabilities(confidences: Scores, right: Sequence[bool | int]) -> None:
    if len(confidences) != len(right) or not confidences:
        raise ModicumError(
            f"There are {len(confidences)} confidences and {len(right)} outcomes, expected equally many, at least one."
        )
    if not all(0 <= confidence <= 1 for confidence in confidences):
        raise ModicumError("A confidence lies outside [0, 1], expected probabilities.")
    if other := [outcome for outcome in right if outcome not in (0, 1)]:
        raise ModicumError(f"An outcome is {other[0]!r}, expected 1 where the answer was right, else 0.")
