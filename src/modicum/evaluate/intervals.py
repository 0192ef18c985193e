"""Estimates with confidence intervals: proportions, means, ratios, and paired differences between two models.

Use the paired forms to compare models on the same items: the difficulty of an item cancels, so the interval of
the difference is far narrower than two separate intervals suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from modicum.errors import RecipeError

if TYPE_CHECKING:
    import torch


class Estimate(NamedTuple):
    """A value with its interval; the ends are ``None`` where one item cannot tell the spread."""

    value: float
    low: float | None
    high: float | None
    n: int


def wilson(successes: int, n: int, *, level: float = 0.95) -> Estimate:
    r"""Proportion with Wilson's score interval, which is sound at 0, at 1 and for small ``n``.

    .. math:: \frac{\hat p + z^2/2n \pm z\sqrt{\hat p(1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        successes: Items that succeeded, from 0 to ``n``.
        n: Items in all, at least 1.
        level: Confidence, in (0, 1).

    Example:
        >>> wilson(0, 10)
        Estimate(value=0.0, low=0.0, high=0.277..., n=10)

    Reference:
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    if not 0 <= successes <= n or n < 1:
        raise RecipeError(f"{successes} successes of {n} items, expected 0 ≤ successes ≤ n and n ≥ 1.")
    z, p = _normal(level), successes / n
    center, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the edges the ends are exact; rounding would put them a hair beside.
    low = 0.0 if successes == 0 else (center - spread) / scale
    high = 1.0 if successes == n else (center + spread) / scale
    return Estimate(p, low, high, n)


def mean(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    r"""Mean with Student's interval, :math:`\bar x \pm t_{n-1}\, s/\sqrt n`.

    Args:
        values: One number per item, at least one.
        level: Confidence, in (0, 1).

    Example:
        >>> mean([1.0, 2.0, 3.0])
        Estimate(value=2.0, low=-0.484..., high=4.484..., n=3)
    """
    return ratio(values, [1.0] * len(values), level=level)


def mean_score(scores: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Return the mean of scores, with Wilson's interval where each question was answered wholly or not at all.

    Args:
        scores: From 0 to 1.
        level: Probability that the interval holds the truth.

    Example:
        >>> mean_score([1.0, 0.0]) == wilson(1, 2), mean_score([0.5, 1.0]) == mean([0.5, 1.0])
        (True, True)
    """
    whole = {*scores} <= {0.0, 1.0}
    return wilson(int(sum(scores)), len(scores), level=level) if whole else mean(scores, level=level)


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, level: float = 0.95) -> Estimate:
    r"""Ratio of two sums over the same items, such as bits per byte over documents.

    The items are the unit of sampling; the interval linearises the ratio :math:`R = \sum x_i / \sum y_i`:

    .. math:: R \pm t_{n-1} \frac{\sqrt{\frac{n}{n-1}\sum_i (x_i - R y_i)^2}}{\sum_i y_i}

    Args:
        numerators: One number per item.
        denominators: One number per item, with a positive sum.
        level: Confidence, in (0, 1).

    Example:
        >>> ratio([1.0, 3.0], [1.0, 1.0]).value
        2.0

    Reference:
        W. G. Cochran, "Sampling Techniques", 3rd ed., 1977, chapter 6.
    """
    n, total = len(numerators), math.fsum(denominators)
    if n < 1 or n != len(denominators) or not total > 0:
        raise RecipeError(f"{n} and {len(denominators)} items with a denominator of {total:g}, expected one or more.")
    value = math.fsum(numerators) / total
    if n == 1:
        _normal(level)
        return Estimate(value, None, None, 1)
    squares = math.fsum((x - value * y) ** 2 for x, y in zip(numerators, denominators, strict=True))
    half = _student(level, n - 1) * math.sqrt(squares * n / (n - 1)) / total
    return Estimate(value, value - half, value + half, n)


def ratio_difference(
    a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]], *, level: float = 0.95
) -> Estimate:
    r"""Difference of two ratios over the same items, a − b, such as two F1 scores; see :func:`ratio`.

    Args:
        a: Numerator and denominator of each item for the first model.
        b: The same for the second, in the same order.
        level: Confidence, in (0, 1).

    Returns:
        The difference; the interval linearises both ratios, with their covariance.

    Example:
        >>> ratio_difference([(1.0, 1.0), (1.0, 2.0)], [(0.0, 1.0), (1.0, 1.0)]).value
        0.166...
    """
    sums = [tuple(math.fsum(column) for column in zip(*rows, strict=True)) for rows in (a, b)]
    if len(a) != len(b) or not a or any(not y > 0 for _, y in sums):
        raise RecipeError(f"{len(a)} and {len(b)} items, expected the same items with positive denominators.")
    (one, whole), (other, rest) = sums
    first, second, n = one / whole, other / rest, len(a)
    if n == 1:
        return Estimate(first - second, None, None, 1)
    gaps = [(x - first * y) / whole - (u - second * v) / rest for (x, y), (u, v) in zip(a, b, strict=True)]
    half = _student(level, n - 1) * math.sqrt(math.fsum(gap * gap for gap in gaps) * n / (n - 1))
    return Estimate(first - second, first - second - half, first - second + half, n)


def paired_proportions(a: Sequence[bool], b: Sequence[bool], *, level: float = 0.95) -> Estimate:
    r"""Difference of two success rates on the same items, a − b, with the interval of Agresti and Min.

    With :math:`n_{10}` items that only ``a`` solved and :math:`n_{01}` that only ``b`` solved, half an item is added to
    each of the four outcomes (:math:`n' = n + 2`), which keeps the interval honest when nothing or all differs:

    .. math:: d' \pm z \frac{\sqrt{n'_{10} + n'_{01} - n' d'^2}}{n'}, \qquad d' = \frac{n'_{10} - n'_{01}}{n'}

    Args:
        a: Whether the first model solved each item.
        b: Whether the second did, in the same order.
        level: Confidence, in (0, 1).

    Returns:
        The plain difference, with the adjusted interval cut to [-1, 1].

    Example:
        >>> paired_proportions([True, True, False], [True, False, False]).value
        0.333...

    Reference:
        A. Agresti, Y. Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
        Medicine 2005.
    """
    n = len(a)
    if n < 1 or n != len(b):
        raise RecipeError(f"{n} and {len(b)} items, expected the same items, one or more.")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    adjusted = n + 2
    difference = (only_a - only_b) / adjusted
    half = _normal(level) * math.sqrt(only_a + only_b + 1 - adjusted * difference**2) / adjusted
    return Estimate((only_a - only_b) / n, max(difference - half, -1.0), min(difference + half, 1.0), n)


def by_group(values: Sequence[float], groups: Sequence[object], *, level: float = 0.95) -> Estimate:
    """Mean of values in [0, 1] whose groups, such as questions, are the unit of sampling.

    Where each value is a group of its own and all are 0 or 1, or where all are the same, this is :func:`wilson` on the
    groups; else the linearised ratio of :func:`ratio`, cut to [0, 1].

    Args:
        values: One number per item, at least one.
        groups: The group of each.
        level: Confidence, in (0, 1).

    Returns:
        The mean over the items, and how many there are.

    Example:
        >>> by_group([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "c"]).value
        0.5
    """
    sums = _by_group(values, groups)
    value = math.fsum(values) / len(values) if values else math.nan
    if values and (value in (0, 1) or (len(sums) == len(values) and {*values} <= {0, 1})):
        return wilson(round(value * len(sums)), len(sums), level=level)._replace(value=value, n=len(values))
    _, low, high, _ = ratio([x for x, _ in sums], [n for _, n in sums], level=level)
    return Estimate(value, low and max(low, 0.0), high and min(high, 1.0), len(values))


def by_group_difference(
    a: Sequence[float], b: Sequence[float], groups: Sequence[object], *, level: float = 0.95
) -> Estimate:
    """Difference of two means of the same items, a − b; see :func:`by_group` and :func:`paired_proportions`.

    Args:
        a: One number in [0, 1] per item for the first model.
        b: The same for the second, in the same order.
        groups: The group of each item.
        level: Confidence, in (0, 1).

    Example:
        >>> by_group_difference([1.0, 1.0, 0.0], [1.0, 0.0, 0.0], ["a", "a", "b"]).value
        0.333...
    """
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    sums = _by_group(gaps, groups)
    if len({*gaps}) == 1 or (len(sums) == len(gaps) and {*a, *b} <= {0, 1}):
        # Without spread the linearised interval would have no width.
        size, plain = len(sums), {*a, *b} <= {0, 1}
        first, second = (a, b) if plain and size == len(gaps) else ([gaps[0] > 0] * size, [gaps[0] < 0] * size)
        found = paired_proportions([*map(bool, first)], [*map(bool, second)], level=level)
        return found._replace(value=math.fsum(gaps) / len(gaps), n=len(gaps))
    return ratio([x for x, _ in sums], [n for _, n in sums], level=level)._replace(n=len(gaps))


def _by_group(values: Sequence[float], groups: Sequence[object]) -> list[tuple[float, int]]:
    """Return sum and number of the values of each group, in the order in which groups first come."""
    found: dict[object, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        found.setdefault(group, []).append(value)
    return [(math.fsum(each), len(each)) for each in found.values()]


def bootstrap(values: Sequence[float], *, resamples: int = 1000, level: float = 0.95, rng: torch.Generator) -> Estimate:
    """Mean with the percentile interval of the bootstrap over items.

    Use it where the values of an item are bounded and far from normal, such as the share of a query's answers that are
    unsafe. All values being equal, the interval has no width: take :func:`wilson` for shares then.

    Args:
        values: One number per item, at least one.
        resamples: How often as many items are drawn with replacement.
        level: Confidence, in (0, 1).
        rng: Draws the items.

    Example:
        >>> import torch
        >>> bootstrap([0.0, 1.0, 1.0, 1.0], resamples=200, rng=torch.Generator().manual_seed(0)).value
        0.75

    Reference:
        B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    import torch  # intervals of reports are read, not drawn

    tail = 1 - _level(level)
    n = len(values)
    if n < 1 or resamples < 1:
        raise RecipeError(f"{n} items and {resamples} resamples, expected one or more of each.")
    value = math.fsum(values) / n
    if n == 1:
        return Estimate(value, None, None, 1)
    items = torch.tensor(values, dtype=torch.float64)
    means = torch.stack([items[torch.randint(n, (n,), generator=rng)].mean() for _ in range(resamples)])
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high, n)


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise RecipeError(f"level is {level}, expected a confidence between 0 and 1, such as 0.95.")
    return 0.5 + level / 2


def _normal(level: float) -> float:
    return NormalDist().inv_cdf(_level(level))


def _student(level: float, freedom: int) -> float:
    from scipy.special import stdtrit  # a report reads facts of measures, and computes no interval

    return float(stdtrit(freedom, _level(level)))
