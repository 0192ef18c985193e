"""Numbers, durations and names as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeGuard

from modicum.credentials import redact as redact

MISSING = "–"
MINUS = "\N{MINUS SIGN}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number that can be squared; ``True`` and ``False`` are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e150 < value < 1e150


def number(value: object, digits: int = 3) -> str:
    """Write a number with ``digits`` significant digits, integers in full.

    Example:
        >>> number(0.123456), number(-12.0), number(1234567), number(2e-5), number(None)
        ('0.123', '−12.0', '1,234,567', '2e−5', '–')
    """
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if not is_number(value):
        return MISSING
    size = abs(value)
    if isinstance(size, int) or size == 0 or size >= 10**digits:
        text = f"{size:,.0f}"
    elif size >= 1e-3:
        text = f"{size:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    else:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa}e{MINUS if exponent[0] == '-' else ''}{exponent[1:].lstrip('0')}"
    return f"{MINUS}{text}" if value < 0 else text


def axis(marks: Sequence[float]) -> list[str]:
    """Write the numbers along an axis, all with as many decimals as their distance needs.

    Example:
        >>> axis([0.5, 1.0, 1.5]), axis([0.0, 1000.0]), axis([0.0, 1e-4])
        (['0.5', '1.0', '1.5'], ['0', '1,000'], ['0', '1e−4'])
    """
    step = min((b - a for a, b in pairwise(marks)), default=abs(marks[0]) or 1.0)
    if step < 1e-3 or max(map(abs, marks)) >= 1e6:
        return [number(mark, 2) for mark in marks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{mark:,.{decimals}f}".replace("-", MINUS) for mark in marks]


def measure(value: object, unit: str) -> str:
    """Write a value in its unit: shares as percentages, everything else with three digits.

    Example:
        >>> measure(0.7125, "share"), measure(12.345, "number")
        ('71.2%', '12.3')
    """
    if not is_number(value) or unit != "share":
        return number(value)
    return f"{MINUS if value < 0 else ''}{100 * abs(value):.1f}%"


def change(value: object, unit: str) -> str:
    """Write a difference of two values, with its sign; shares differ by percentage points.

    Example:
        >>> change(0.1, "share"), change(-0.25, "number")
        ('+10.0 pp', '−0.250')
    """
    if not is_number(value):
        return number(value)
    text = f"{100 * abs(value):.1f} pp" if unit == "share" else number(abs(value))
    return f"{MINUS if value < 0 else '+'}{text}"


def duration(seconds: object) -> str:
    """Write a time span.

    Example:
        >>> duration(0.04), duration(9.44), duration(252), duration(3780)
        ('0.04 s', '9.4 s', '4 min 12 s', '1 h 03 min')
    """
    if not is_number(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def phrase(items: Iterable[str]) -> str:
    """Join items as prose does.

    Example:
        >>> phrase(["a", "b", "c"])
        'a, b and c'
    """
    *head, last = list(items) or [""]
    return f"{', '.join(head)} and {last}" if head else last


def plural(count: int, noun: str) -> str:
    """Write a count with its noun.

    Example:
        >>> plural(1, "run"), plural(2, "run")
        ('1 run', '2 runs')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def plain(name: str) -> str:
    """Write the name of a metric or job without underscores."""
    return name.replace("_", " ")
