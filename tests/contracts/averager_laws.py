"""Laws of averagers, over numbers of checkpoints and knobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from laws import Draw, knobs, law

from modicum.registry import Entry, averager


def coefficients(entry: Entry[Any], draw: Draw, n: int) -> list[float]:
    return list(entry.function(list(range(n)), **knobs(entry, draw)))


def sums_to_n(checkpoints: Sequence[object]) -> list[float]:
    return [1.0] * len(checkpoints)


@law(averager, "there is a number for each checkpoint, and they sum to 1", broken=sums_to_n)
def sums_to_one(entry: Entry[Any], draw: Draw) -> None:
    n = draw(st.integers(1, 9))
    found = coefficients(entry, draw, n)
    assert len(found) == n and all(map(math.isfinite, found))
    assert math.isclose(sum(found), 1, rel_tol=1e-9)
