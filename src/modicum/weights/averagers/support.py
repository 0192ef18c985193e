"""What several averagers share: plain means of some checkpoints, and refusals of a wrong K."""

from __future__ import annotations

import math
from collections.abc import Collection

from modicum.errors import RecipeError


def mean_of(chosen: Collection[int], n: int) -> list[float]:
    """Return the coefficients of the plain mean of some of n checkpoints.

    Example:
        >>> mean_of([0, 2], 3)
        [0.5, 0.0, 0.5]
    """
    return [1 / len(chosen) if i in chosen else 0.0 for i in range(n)]


def some_of(n: int) -> int:
    """Return how many of n checkpoints to take where nobody says: some, not all, and 5 of many.

    Example:
        >>> some_of(1), some_of(4), some_of(20)
        (1, 2, 5)
    """
    return min(5, math.ceil(n / 2))


def check_k(method: str, k: int, n: int, *, knob: str = "k") -> None:
    """Refuse to take more checkpoints than there are.

    Raises:
        RecipeError: There are fewer than ``k``.
    """
    if k > n:
        raise RecipeError(
            f"{method}: {knob} is {k}, but there are {n} checkpoints. Lower it, or save more: a trainer's "
            "save_total_limit deletes all but the latest."
        )


def label_of(chosen: Collection[int]) -> str:
    """Name a choice by its checkpoints, counted from 1.

    Example:
        >>> label_of([2, 0])
        '1+3'
    """
    return "+".join(str(i + 1) for i in sorted(chosen))
