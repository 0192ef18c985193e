"""How sparsified deltas become one: summed, or summed over those that agree on a sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.weights.selection import Cut, find_cuts

Elect: TypeAlias = Literal["none", "ties"]


def combine(deltas: Tensor, weights: Tensor, *, elect: Elect, normalize: bool) -> Tensor:
    """Merge deltas ``(n, block)``, which may be overwritten, into one.

    Args:
        deltas: One row for each expert.
        weights: One for each expert.
        elect: ``none`` sums all; ``ties`` sums those that have the elected sign.
        normalize: Divide by the weights that took part.

    Raises:
        RecipeError: All take part, and their weights sum to zero.
    """
    if elect == "ties":
        return elect_signs(deltas, weights, normalize=normalize)
    merged = weights @ deltas
    if not normalize:
        return merged
    total = float(weights.sum())
    if total == 0:
        raise RecipeError(f"The weights {weights.tolist()} sum to 0 and cannot be normalized. Set normalize: false.")
    return merged.div_(total)


def elect_signs(deltas: Tensor, weights: Tensor, *, normalize: bool) -> Tensor:
    """Merge deltas ``(n, block)`` entry by entry over those that have the elected sign; ``deltas`` is overwritten.

    A sum of zero elects +1, and an entry that is zero agrees with nobody.
    """
    deltas.mul_(weights[:, None])
    sign = torch.copysign(torch.ones_like(deltas[0]), deltas.sum(0).add_(0.0))  # adding zero makes −0 positive
    deltas.mul_(sign).clamp_min_(0)
    merged = deltas.sum(0).mul_(sign)
    if not normalize:
        return merged
    # Kept as numbers throughout: comparisons that make booleans cost several times as much.
    divisor = weights @ deltas.sign_()
    if bool((weights > 0).all()):
        divisor.clamp_min_(weights.min())  # where nobody agrees the numerator is zero
    else:
        divisor[divisor.abs() < 1e-8] = 1
    return merged.div_(divisor)


def kept_of(n: int, density: float) -> int:
    """Return how many of ``n`` entries a density keeps: at least one.

    Example:
        >>> kept_of(10, 0.25), kept_of(2, 0.1)
        (2, 1)
    """
    return min(n, max(1, int(density * n)))


def trim_cuts(base: Tensor, experts: Sequence[Tensor], density: Sequence[float]) -> list[Cut | None]:
    """Return what keeping each expert's largest deltas drops; ``None`` where it drops nothing."""
    n = base.numel()
    cuts: list[Cut | None] = [None] * len(experts)
    trimmed = [t for t, share in enumerate(density) if kept_of(n, share) < n]
    if trimmed:
        found = find_cuts(base, [experts[t] for t in trimmed], [[kept_of(n, density[t])] for t in trimmed])
        for t, (cut,) in zip(trimmed, found):
            cuts[t] = cut
    return cuts
