"""Dropping entries of deltas at random, and the random numbers for it.

These have at most 16 bits each, so that a probability is exact to 1/65536, and are far cheaper than floats. Draws and
comparisons are NumPy's, which are several times faster than torch's on a processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.weights.kernels.blocks import Sum, as_vector, delta_blocks, fold, multiply_
from modicum.weights.kernels.combine import Election
from modicum.weights.kernels.fused import Parts

LEVELS = 1 << 16
Words: TypeAlias = NDArray[np.uint16]
Mask: TypeAlias = NDArray[np.bool_]
Drop: TypeAlias = Callable[[int, int, Tensor], NDArray[Any] | None]
"""From an expert, the length of its next block and the delta there to factors, 0 for what is dropped; or to None.

A blind drop looks at the length alone, and gives truth values.
"""


def generators(n: int, rng: torch.Generator | None) -> list[np.random.Generator]:
    """Return NumPy's generators for ``n`` experts, seeded by ``rng`` or by a fixed one."""
    seeds = torch.randint(1 << 62, (n,), generator=rng or torch.Generator().manual_seed(0))
    return [np.random.default_rng(seed) for seed in seeds.tolist()]


def levels(shares: Sequence[float], rng: torch.Generator | None) -> list[int]:
    """Return for each share one of the two levels around it, drawn so that the share is exact on average.

    A share below the least level gets that level.
    """
    drawn = torch.rand(len(shares), generator=rng or torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    found = [math.floor(share * LEVELS + u) for share, u in zip(shares, drawn)]
    return [min(LEVELS, max(1, level)) for level in found]


def draw(size: int, rng: np.random.Generator) -> Words:
    """Return ``size`` numbers, evenly distributed over ``0 … LEVELS - 1``."""
    return _bytes(2 * size, rng).view(np.uint16)


def draw_mask(size: int, level: int, rng: np.random.Generator) -> Mask:
    """Return ``size`` truth values, each true with probability ``level / LEVELS``.

    A draw's upper byte decides all but one in 256; a lower byte is drawn for these alone, and not at all where the
    probability is a multiple of 1/256.
    """
    upper, lower = divmod(level, 256)
    first = _bytes(size, rng)
    mask: Mask = first < upper
    if lower:
        open_ = np.flatnonzero(first == upper)
        mask[open_] = _bytes(open_.size, rng) < lower
    return mask


def _bytes(size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    return rng.bit_generator.random_raw(-(-size // 8)).view(np.uint8)[:size]  # a fifth faster than integers()


def merge_dropped(
    base: Tensor,
    experts: Sequence[Tensor],
    drop: Drop,
    combine: Sum | Election,
    *,
    rescale: Sequence[float] | None,
    row: int = 1,
    blind: bool = False,
) -> Tensor:
    """Return the base plus what ``combine`` makes of the deltas, of which entries are dropped and the rest rescaled.

    Args:
        base: The tensor that the deltas are taken from.
        experts: Tensors of its shape.
        drop: Called for every block of every expert's delta, in order.
        combine: From deltas ``(n, block)`` to the merged delta.
        rescale: A factor for each expert. ``None`` restores each expert's L1 norm, in a second pass; a bit is kept for
            each entry in between.
        row: A block holds whole rows of so many entries.
        blind: ``drop`` is.
    """
    if rescale is None:
        drop, rescale = _keep_l1(base, experts, drop, row)
        blind = True
    return fold(base, experts, _Dropped(drop, as_vector(rescale, base), combine, blind), row=row)


@dataclass(frozen=True)
class _Dropped:
    drop: Drop
    ratios: Tensor
    then: Sum | Election
    blind: bool

    def __call__(self, deltas: Tensor) -> Tensor:
        for t, delta in enumerate(deltas):
            if (factors := self.drop(t, len(delta), delta)) is not None:
                multiply_(delta, factors)
        return self.then(deltas.mul_(self.ratios[:, None]))

    @property
    def parts(self) -> Parts | None:
        if not self.blind:
            return None
        nothing = self.ratios[:0]
        return self.then.parts._replace(factors=lambda t, n: self.drop(t, n, nothing), ratios=self.ratios)


def _keep_l1(base: Tensor, experts: Sequence[Tensor], drop: Drop, row: int) -> tuple[Drop, list[float]]:
    """Drop once, to learn each expert's sum of magnitudes over that of what stays; return also what drops the same."""
    before, after = [0.0] * len(experts), [0.0] * len(experts)
    stays: list[list[NDArray[np.uint8] | None]] = [[] for _ in experts]
    for _, _, deltas in delta_blocks(base, experts, row=row):
        for t, delta in enumerate(deltas.abs_()):
            before[t] += float(delta.sum())
            if (mask := drop(t, len(delta), delta)) is not None:
                multiply_(delta, mask)
            stays[t].append(None if mask is None else np.packbits(mask))
            after[t] += float(delta.sum())
    replay = [iter(bits) for bits in stays]

    def again(t: int, n: int, _: Tensor) -> NDArray[Any] | None:
        bits = next(replay[t])
        return None if bits is None else np.unpackbits(bits, count=n)

    # Where next to nothing is left there is nothing to restore the norm with.
    return again, [whole / kept if kept > 1e-12 * whole else 1.0 for whole, kept in zip(before, after)]
