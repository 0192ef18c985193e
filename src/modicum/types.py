"""Ranges that several methods share. A knob annotated with one of them is checked wherever it comes from."""

from __future__ import annotations

from typing import Annotated, TypeAlias

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

IGNORED = -100  # the label that carries no loss, as everywhere in PyTorch and transformers

MEASURES_GET = frozenset(  # what the job gives to a measure's functions, beside their knobs
    {"level", "seed", "max_length", "data_path", "tokens_of", "read_lines", "reference_of", "judge_of"}
)
