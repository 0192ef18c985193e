"""Where things go on a line chart: round numbers along an axis, points worth drawing, labels that keep apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

MOST_POINTS = 400  # per line; more than a screen can show only makes the page heavy

Point: TypeAlias = tuple[float, float | None]  # None where the value is missing or not finite: the line breaks there


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return round numbers that enclose ``low`` and ``high``, about ``count`` of them.

    Example:
        >>> ticks(0.13, 2.4, 4)
        [0.0, 1.0, 2.0, 3.0]
        >>> ticks(1, 30, 5, whole=True)
        [0.0, 10.0, 20.0, 30.0]
    """
    # Equal values, or values that differ only by rounding, still need an axis of some length.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 × powers of ten (or powers of ten alone over many decades) that enclose two positive numbers.

    Example:
        >>> log_ticks(0.3, 8)
        [0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    marks = [float(f"{f}e{e}") for e in range(first, last + 1) for f in factors]
    start = max((i for i, mark in enumerate(marks) if mark <= low), default=0)
    stop = min((i for i, mark in enumerate(marks) if mark >= high), default=len(marks) - 1)
    return marks[start : max(stop, start + 1) + 1]


def thin(points: Sequence[Point]) -> list[Point]:
    """Keep the extremes of each stretch of a long series, so that no spike disappears."""
    if len(points) <= MOST_POINTS:
        return list(points)
    width = math.ceil(2 * len(points) / MOST_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        known = [i for i, (_, y) in enumerate(stretch) if y is not None]
        lows = (
            [min(known, key=lambda i: stretch[i][1] or 0), max(known, key=lambda i: stretch[i][1] or 0)]
            if known
            else []
        )
        gap = [i for i, (_, y) in enumerate(stretch) if y is None][:1]
        kept += [stretch[i] for i in sorted({*lows, *gap})]
    return kept


def spread(tops: Sequence[float], gap: float, height: float) -> list[float]:
    """Move sorted positions apart until neighbours keep ``gap``, as little as possible, inside ``height``.

    Example:
        >>> spread([10, 12, 100], 10, 200)
        [6.0, 16.0, 100.0]
    """

    def inside(centre: float, count: int) -> float:
        half = (count - 1) * gap / 2
        return min(max(centre, half), max(half, height - half))

    groups: list[tuple[float, int]] = []  # centre and number of labels that have been pushed together
    for top in tops:
        centre, count = inside(top, 1), 1
        while groups and groups[-1][0] + groups[-1][1] * gap / 2 > centre - count * gap / 2:
            other, others = groups.pop()
            count += others
            centre = inside((other * others + centre * (count - others)) / count, count)
        groups.append((centre, count))
    return [centre + (i - (count - 1) / 2) * gap for centre, count in groups for i in range(count)]
