r"""A loss of coefficients as a quadratic: its best subset of each size, its windows, and its best weights.

.. math::
    F(w) \approx F(u) + c^T w + \tfrac12 w^T A w, \qquad u = (1/n, \dots, 1/n)

with A symmetric and :math:`A u = 0`, which is all that matters where the coefficients sum to 1. NumPy in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
from numpy.typing import NDArray

ENUMERATED = 1_000_000  # subsets of a size; above, they are sought by exchanges
CHUNK = 1 << 15
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Surrogate:
    """The quadratic.

    Args:
        value: At the uniform mean.
        slope: There, ``(n,)``.
        curvature: A, ``(n, n)``.
    """

    value: float
    slope: Array
    curvature: Array

    @classmethod
    def of(cls, value: float, slope: Array, moved: Array, eps: float) -> Surrogate:
        """Return the quadratic that has these slopes at the uniform mean u and at ``u + eps (e_j - u)``.

        Args:
            value: At u.
            slope: At u.
            moved: At the others, ``(n, n)``, a row for each j.
            eps: How far they lie.
        """
        n = len(slope)
        P = np.eye(n) - 1 / n
        A = P @ (moved - slope).T / eps @ P
        return cls(value - float(slope.mean()), slope, (A + A.T) / 2)

    def __call__(self, w: Array) -> Array:
        """Return the loss of coefficients ``(..., n)``."""
        found: Array = self.value + w @ self.slope + 0.5 * ((w @ self.curvature) * w).sum(-1)
        return found

    def subset(self, k: int) -> list[tuple[float, tuple[int, ...]]]:
        """Return the three best subsets of size ``k``, with the loss of their plain means; of too many to try, one."""
        n = len(self.slope)
        if math.comb(n, k) > ENUMERATED:
            return [self._exchanged(k)]
        best: list[tuple[float, tuple[int, ...]]] = []
        for chunk in _chunks(combinations(range(n), k)):
            w = np.zeros((len(chunk), n))
            np.put_along_axis(w, chunk, 1 / k, 1)
            losses = self(w)
            order = np.argsort(losses, kind="stable")[:3]
            best = sorted([*best, *((float(losses[i]), tuple(map(int, chunk[i]))) for i in order)])[:3]
        return best

    def _exchanged(self, k: int) -> tuple[float, tuple[int, ...]]:
        """Return a subset that no exchange of one for another improves, from the k of smallest slope."""
        n = len(self.slope)

        def loss(chosen: Iterable[int]) -> float:
            w = np.zeros(n)
            w[list(chosen)] = 1 / k
            return float(self(w))

        chosen = set(map(int, np.argsort(self.slope, kind="stable")[:k]))
        now = loss(chosen)
        while True:
            tries = [(loss(chosen - {i} | {j}), i, j) for i in chosen for j in set(range(n)) - chosen]
            value, i, j = min(tries, default=(now, 0, 0))
            if value >= now - 1e-15:
                return now, tuple(sorted(chosen))
            chosen, now = chosen - {i} | {j}, value

    def windows(self) -> list[tuple[float, int, int]]:
        """Return loss, start and length of every contiguous window, the best first; of equal ones the longest."""
        n = len(self.slope)
        found = []
        for length in range(1, n + 1):
            for start in range(n - length + 1):
                w = np.zeros(n)
                w[start : start + length] = 1 / length
                found.append((float(self(w)), start, length))
        return sorted(found, key=lambda item: (item[0], -item[2], -item[1]))

    def weights(self) -> Array:
        """Return the best weights on the simplex found from its centre and all of its corners."""
        n = len(self.slope)
        starts = np.vstack([np.full((1, n), 1 / n), np.eye(n) * 0.9 + 0.1 / n])
        rate = 1 / max(float(np.linalg.norm(self.curvature, 2)), 1e-12 * float(np.abs(self.slope).max()), 1e-300)
        w = momentum = starts
        for step in range(4000):
            after = _project(momentum - rate * (self.slope + momentum @ self.curvature))
            # Each start begins its momentum anew where it would climb, which a quadratic that is not convex allows.
            climbs = ((momentum - after) * (after - w)).sum(1, keepdims=True) > 0
            share = np.where(climbs, 0.0, step / (step + 3))
            momentum, moved = after + share * (after - w), float(np.abs(after - w).max())
            w = after
            if step > 10 and moved < 1e-13:
                break
        found: Array = w[int(np.argmin(self(w)))]
        return np.where(found < 1e-9, 0, found) / found[found >= 1e-9].sum()


def _chunks(subsets: Iterator[tuple[int, ...]]) -> Iterator[NDArray[np.intp]]:
    while part := list(islice(subsets, CHUNK)):
        yield np.array(part, dtype=np.intp)


def _project(v: Array) -> Array:
    """Project rows onto the simplex (Held, Wolfe and Crowder)."""
    ordered = -np.sort(-v, axis=1)
    sums = np.cumsum(ordered, 1) - 1
    count = (ordered - sums / np.arange(1, v.shape[1] + 1) > 0).sum(1)
    shift = sums[np.arange(len(v)), count - 1] / count
    return np.maximum(v - shift[:, None], 0)
