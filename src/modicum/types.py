"""Ranges that several methods share. A knob annotated with one of them is checked wherever it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

Fraction: TypeAlias = Annotated[float, Gt(0), Le(1)]  # a share that must not be empty
UnitInterval: TypeAlias = Annotated[float, Ge(0), Le(1)]
Decay: TypeAlias = Annotated[float, Ge(0), Lt(1)]  # a moving average's memory
Positive: TypeAlias = Annotated[float, Gt(0)]
NonNegative: TypeAlias = Annotated[float, Ge(0)]
PositiveInt: TypeAlias = Annotated[int, Gt(0)]
NonNegativeInt: TypeAlias = Annotated[int, Ge(0)]


class Unbounded:
    """Marks a knob whose infinity means something: no limit. Any other number that is not finite is refused."""


PositiveOrInfinite: TypeAlias = Annotated[float, Gt(0), Unbounded()]  # inf: no limit

SIGNS = ("gt", "ge", "lt", "le")  # what annotated_types calls its bounds


def bounds_of(marks: Iterable[Any]) -> list[tuple[str, Any]]:
    """Return the bounds among the marks of an annotation, each by its sign.

    Example:
        >>> bounds_of([Gt(0), Le(1), Unbounded()])
        [('gt', 0), ('le', 1)]
    """
    return [(sign, getattr(mark, sign)) for mark in marks for sign in SIGNS if hasattr(mark, sign)]


def range_in_words(bounds: Mapping[str, Any]) -> str:
    """Return a range as it follows the word for a number; nothing where there are no bounds.

    Example:
        >>> range_in_words({"gt": 0, "le": 1}), range_in_words({"ge": 2})
        ('in (0, 1]', 'of at least 2')
    """
    low, high = ([sign for sign in pair if sign in bounds] for pair in (("gt", "ge"), ("lt", "le")))
    if low and high:
        ends = "(" if low[0] == "gt" else "[", ")" if high[0] == "lt" else "]"
        return f"in {ends[0]}{bounds[low[0]]:g}, {bounds[high[0]]:g}{ends[1]}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    return " ".join(f"{words[sign]} {bounds[sign]:g}" for sign in SIGNS if sign in bounds)


IGNORED = -100  # the label that carries no loss, as everywhere in PyTorch and transformers

MEASURES_GET = frozenset(  # what the job gives to a measure's functions, beside their knobs
    {"level", "seed", "max_length", "data_path", "tokens_of", "read_lines", "reference_of", "judge_of"}
)
