"""Counting contradicting signs in one tensor of several experts: packed signs, integer counters, block by block."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.weights.kernels.blocks import delta_blocks, working_dtype
from modicum.weights.kernels.combine import trim_cuts
from modicum.weights.kernels.selection import Cut

Aggregate: TypeAlias = Literal["pairwise_mean", "any"]
Weight: TypeAlias = Literal["count", "magnitude"]
Denoise: TypeAlias = Literal["topk", "sigma", "none"]
Counts: TypeAlias = list[list[float]]  # for each pair of experts, or for all together: what disagrees, what is active


def conflict_counts(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    aggregate: Aggregate = "pairwise_mean",
    weight: Weight = "count",
    denoise: Denoise = "topk",
    keep: float = 0.2,
    sigma: float = 1.0,
) -> Counts:
    """Return what disagrees and what is active in one tensor: for each pair of experts in order, or for all together.

    Example:
        >>> conflict_counts(torch.zeros(2), [torch.tensor([1.0, 2]), torch.tensor([1.0, -2])], denoise="none")
        [[1, 2]]
    """
    cuts = _cuts(base, experts, denoise=denoise, keep=keep, sigma=sigma)
    count = _weigh if weight == "magnitude" else _count
    total: NDArray[Any] | None = None
    for _, _, deltas in delta_blocks(base, experts):
        found = count(deltas, cuts, together=aggregate == "any")
        total = found if total is None else total + found
    pairs = 1 if aggregate == "any" else math.comb(len(experts), 2)
    return [[0, 0]] * pairs if total is None else total.tolist()


def _cuts(
    base: Tensor, experts: Sequence[Tensor], *, denoise: Denoise, keep: float, sigma: float
) -> Sequence[Cut | None]:
    if denoise == "none" or not base.numel():
        return [None] * len(experts)
    if denoise == "topk":
        return trim_cuts(base, experts, [keep] * len(experts))
    squares = torch.zeros(len(experts), dtype=torch.float64)
    for _, _, deltas in delta_blocks(base, experts):
        squares += deltas.double().square_().sum(1).cpu()
    rms = (squares / base.numel()).sqrt()
    return [Cut(value, 0, False) for value in (sigma * rms).to(working_dtype(base)).tolist()]


def _count(deltas: Tensor, cuts: Sequence[Cut | None], *, together: bool) -> NDArray[Any]:
    """Count entries by their packed signs: eight to a byte, so that a pair of experts costs little."""
    planes = [_planes(delta, cut) for delta, cut in zip(deltas, cuts)]
    up, down = (np.packbits(np.stack(plane), axis=1) for plane in zip(*planes))
    if together:
        active = up | down
        seen, twice = np.zeros_like(active[0]), np.zeros_like(active[0])
        for bits in active:
            twice |= seen & bits
            seen |= bits
        both = np.bitwise_or.reduce(up) & np.bitwise_or.reduce(down)
        return np.array([[_ones(both), _ones(twice)]], np.int64)
    found = []
    for s, t in combinations(range(len(planes)), 2):
        against = _ones((up[s] & down[t]) | (down[s] & up[t]))
        found.append([against, against + _ones((up[s] & up[t]) | (down[s] & down[t]))])
    return np.array(found, np.int64)


def _planes(delta: Tensor, cut: Cut | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return where a delta is kept and positive, and where it is kept and negative."""
    low = 0.0
    if cut is not None and (cut.exhaustive or cut.spare):
        cut.trim_(delta)  # of equal magnitudes some are kept: only the cut itself knows which
    elif cut is not None:
        low = cut.value
    numbers = delta.cpu().numpy()
    return numbers > low, numbers < -low


def _ones(bits: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))


def _weigh(deltas: Tensor, cuts: Sequence[Cut | None], *, together: bool) -> NDArray[Any]:
    """Sum magnitudes in place of counting entries."""
    for delta, cut in zip(deltas, cuts):
        if cut is not None:
            cut.trim_(delta)
    numbers = deltas.cpu().numpy()
    sizes = np.abs(numbers)
    if together:
        second = np.partition(sizes, -2, axis=0)[-2]
        both = (numbers > 0).any(0) & (numbers < 0).any(0)
        return np.array([[second[both].sum(dtype=np.float64), second.sum(dtype=np.float64)]])
    found = []
    for s, t in combinations(range(len(numbers)), 2):
        least = np.minimum(sizes[s], sizes[t])
        against = np.signbit(numbers[s]) != np.signbit(numbers[t])
        found.append([least[against].sum(dtype=np.float64), least.sum(dtype=np.float64)])
    return np.array(found, np.float64)


def ratio(counts: Sequence[Counts]) -> float:
    """Return the conflict of a layer from the counts of its tensors; see :func:`conflict_counts`.

    Example:
        >>> ratio([[[2, 3]], [[0, 97]]])
        0.02
    """
    sums = [[math.fsum(part) for part in zip(*pair)] for pair in zip(*counts)]
    return statistics.fmean(against / active if active else 0.0 for against, active in sums)
