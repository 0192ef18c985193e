"""The k-th largest magnitude of a delta, or of what is made of several, exactly, without sorting it or holding it.

A random sample brackets the value; one pass counts what lies above the bracket and keeps what lies in it. Comparisons
and picks are NumPy's on the CPU, where they are ten times faster than torch's, and torch's on an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.weights.kernels import fused
from modicum.weights.kernels.blocks import delta_blocks, wide

SMALL = 1 << 16  # entries up to which a tensor is looked at whole
Array: TypeAlias = NDArray[Any]


@dataclass
class Cut:
    """Keep magnitudes above ``value``, and the first ``spare`` entries that equal it.

    ``spare`` counts down as blocks are trimmed in order; ``exhaustive`` says that all entries of this value are kept.
    """

    value: float
    spare: int
    exhaustive: bool

    def trim_(self, delta: Tensor) -> Tensor:
        """Set to zero what the cut drops; blocks must come in order."""
        if self.exhaustive:
            return _shrink_(delta, _below(self.value, delta.dtype))
        if not self.spare:
            return _shrink_(delta, self.value)
        equal = _places(delta, self.value)
        delta[equal[self.spare :]] = 0
        self.spare = max(0, self.spare - len(equal))
        return _shrink_(delta, _below(self.value, delta.dtype))


def _shrink_(delta: Tensor, value: float) -> Tensor:
    """Set to zero what is not above ``value`` in magnitude."""
    torch.ops.aten.hardshrink.out(delta, value, out=delta)
    return delta


def _places(delta: Tensor, value: float) -> Tensor:
    """Return where the magnitude is ``value``."""
    if delta.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(np.abs(delta.numpy()) == value))
    return (delta.abs() == value).nonzero().view(-1)


@lru_cache(maxsize=32)  # every block of a tensor asks for the same
def _below(value: float, dtype: torch.dtype) -> float:
    """Return the next smaller number; below zero for zero, so that everything passes."""
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(-1.0, dtype=dtype)).item()


def find_cuts(
    base: Tensor,
    experts: Sequence[Tensor],
    keeps: Sequence[Sequence[int]],
    *,
    measure: Callable[[Tensor], Tensor] = torch.abs_,
) -> list[list[Cut]]:
    """Return the cuts that keep an expert's largest deltas; of equal ones those that come first.

    Args:
        base: The tensor that the deltas are taken from.
        experts: Tensors of its shape.
        keeps: For each expert, how many each of its cuts keeps; from 1 to the number of entries.
        measure: From deltas ``(n, block)``, which it may overwrite, to what is cut in their place: rows of numbers that
            are not negative, for each of which ``keeps`` has an item.
    """
    n = base.numel()
    if n <= SMALL:
        rows = (_row(base, experts, measure, i) for i in range(len(keeps)))
        return [[_cut_of(numbers, k) for k in ks] for numbers, ks in zip(rows, keeps)]
    where = _sample(n)
    sample = _look(base, where), [_look(expert, where) for expert in experts]
    counts = [
        [_Counts(*bracket) for bracket in _brackets(_row(*sample, measure, i), ks, n)] for i, ks in enumerate(keeps)
    ]
    plain = measure is torch.abs_ and fused.usable(base, *experts)
    found = fused.count(base, experts, [[(c.low, c.high) for c in several] for several in counts]) if plain else None
    if found is not None:
        counts = [[_Counts(c.low, c.high, f[:3], f[3:]) for c, f in zip(*pair)] for pair in zip(counts, found)]
    else:
        for _, _, deltas in delta_blocks(base, experts, size=wide(base)):
            for several, numbers in zip(counts, measure(deltas)):
                for count in several:
                    count.add(numbers)
    # A sample that missed the value costs a second look at the whole, which is rare.
    return [
        [count.cut(k) or _cut_of(_row(base, experts, measure, i), k) for count, k in zip(several, ks)]
        for i, (several, ks) in enumerate(zip(counts, keeps))
    ]


def find_variance_cut(
    base: Tensor, experts: Sequence[Tensor], share: float, *, variance: Callable[[Tensor], Tensor]
) -> Cut:
    """Return the cut that keeps a share, at least one, of those entries whose variance between the experts is not zero.

    Args:
        base: The tensor that the deltas are taken from.
        experts: Tensors of its shape.
        share: In (0, 1).
        variance: From deltas ``(n, block)``, which it may overwrite, to the variances as one row.
    """
    n = base.numel()
    if n > SMALL and fused.usable(base, *experts):
        where = _sample(n)
        sample = _row(_look(base, where), [_look(expert, where) for expert in experts], variance, 0)
        likely = int(sample.count_nonzero()) / len(sample)
        margin = 5 * (likely * (1 - likely) / len(sample)) ** 0.5
        keeps = [max(1, int(share * n * p)) for p in (max(0.0, likely - margin), min(1.0, likely + margin))]
        (_, high), (low, _) = _brackets(sample, keeps, n)
        found = fused.count_variances(base, experts, low, high)
        if found is not None:
            differing, (*ends, inside) = found
            cut = _Counts(low, high, ends, [inside]).cut(max(1, int(share * differing)))
            if cut is not None:
                return cut
    differing = sum(int(variance(deltas).count_nonzero()) for _, _, deltas in delta_blocks(base, experts))
    ((cut,),) = find_cuts(base, experts, [[max(1, int(share * differing))]], measure=variance)
    return cut


def _row(base: Tensor, experts: Sequence[Tensor], measure: Callable[[Tensor], Tensor], i: int) -> Tensor:
    """Return a whole row of the numbers that are cut; only one at a time, as each may be large."""
    if measure is torch.abs_:  # of one expert alone; with many, the others would cost its square
        experts, i = experts[i : i + 1], 0
    return torch.cat([measure(deltas)[i].clone() for _, _, deltas in delta_blocks(base, experts)])


def _cut_of(magnitudes: Tensor, k: int) -> Cut:
    value = torch.kthvalue(magnitudes, len(magnitudes) - k + 1).values
    spare = k - int(torch.count_nonzero(magnitudes > value))
    return Cut(value.item(), spare, spare == int(torch.count_nonzero(magnitudes == value)))


@lru_cache(maxsize=32)  # a model has few sizes of tensor
def _sample(n: int) -> Tensor:
    """Return places to look at, in order so that reading them is quick; the same ones for the same size.

    A sample of s costs s, the bracket it leaves holds about n / √s entries: at n^(2/3) both cost the same.
    """
    size = round(n ** (2 / 3))
    return torch.randint(n, (size,), generator=torch.Generator().manual_seed(0)).sort().values


def _look(tensor: Tensor, where: Tensor) -> Tensor:
    return tensor.reshape(-1).index_select(0, where.to(tensor.device))  # a third of the time that indexing takes


def _brackets(sample: Tensor, keeps: Sequence[int], n: int) -> list[tuple[float, float]]:
    """Return for each k two magnitudes between which the k-th largest of ``n`` lies, five standard deviations sure."""
    size, ordered = len(sample), np.sort(sample.cpu().numpy())
    brackets = []
    for k in keeps:
        share = k / n
        middle, margin = (1 - share) * size, 5 * (size * share * (1 - share)) ** 0.5 + 2
        low, high = max(0, int(middle - margin)), min(size - 1, int(middle + margin))
        brackets.append((ordered[low].item(), ordered[high].item()))
    return brackets


class _Counts:
    """What one pass learns about the magnitudes around a bracket: how many are where, and which lie inside."""

    def __init__(self, low: float, high: float, ends: Sequence[int] = (0, 0, 0), inside: Sequence[Array] = ()) -> None:
        self.low, self.high = low, high
        self.above, self.at_high, self.at_low = ends
        self.inside = list(inside)

    def add(self, row: Tensor) -> None:
        if row.device.type != "cpu":
            self._add_there(row)
            return
        magnitudes = row.numpy()
        # Numbers of the checkpoint's few bits leave many deltas equal to an end of the bracket: these are only counted.
        above, from_high = magnitudes > self.high, magnitudes >= self.high
        above_count, from_high_count = np.count_nonzero(above), np.count_nonzero(from_high)
        self.above += int(above_count)
        self.at_high += int(from_high_count - above_count)
        if self.low == self.high:
            return
        above_low = magnitudes > self.low
        self.at_low += int(np.count_nonzero(magnitudes >= self.low) - np.count_nonzero(above_low))
        # Few lie between: their places are found faster than a mask of all is applied.
        self.inside.append(magnitudes[np.flatnonzero(above_low ^ from_high)])

    def _add_there(self, magnitudes: Tensor) -> None:
        """Count on an accelerator, and bring over what lies inside."""
        ends = [(magnitudes > self.high), (magnitudes == self.high), (magnitudes == self.low)]
        above, at_high, at_low = torch.stack([torch.count_nonzero(end) for end in ends]).tolist()
        self.above += above
        self.at_high += at_high
        if self.low == self.high:
            return
        self.at_low += at_low
        self.inside.append(magnitudes[(magnitudes > self.low) & (magnitudes < self.high)].cpu().numpy())

    def cut(self, k: int) -> Cut | None:
        """Return the cut at the k-th largest, or ``None`` when it lies outside the bracket."""
        rank = k - self.above
        if rank <= 0:
            return None
        if rank <= self.at_high:
            return Cut(self.high, rank, rank == self.at_high)
        rank -= self.at_high
        inside = np.concatenate(self.inside) if self.inside else np.empty(0)
        if rank <= inside.size:
            value = np.sort(inside)[inside.size - rank]  # partition() takes ten times as long where many are equal
            spare = rank - int(np.count_nonzero(inside > value))
            return Cut(float(value), spare, spare == int(np.count_nonzero(inside == value)))
        rank -= inside.size
        return Cut(self.low, rank, rank == self.at_low) if 0 < rank <= self.at_low else None
