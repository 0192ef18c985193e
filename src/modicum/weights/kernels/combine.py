"""How sparsified deltas become one: summed, or summed over those that agree on a sign."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.errors import RecipeError
from modicum.weights.kernels.blocks import Sum, cancels
from modicum.weights.kernels.fused import Parts
from modicum.weights.kernels.selection import Cut, find_cuts

Elect: TypeAlias = Literal["none", "ties"]
Kernel: TypeAlias = Callable[[Tensor], Tensor]


def combiner(weights: Tensor, *, elect: Elect, normalize: bool, scale: float = 1.0) -> Sum | Election:
    """Return what merges deltas ``(n, block)``, which it may overwrite, into one; valid until its next call.

    Args:
        weights: One for each expert.
        elect: ``none`` sums all; ``ties`` sums those that have the elected sign.
        normalize: Divide by the weights that took part.
        scale: Factor on the result.

    Raises:
        RecipeError: All take part, and their weights sum to zero.
    """
    if elect == "ties":
        return Election(weights, normalize=normalize, scale=scale)
    total = float(weights.sum())
    if normalize and cancels(weights.tolist()):
        raise RecipeError(f"The weights {weights.tolist()} sum to 0 and cannot be normalized. Set normalize: false.")
    shares = weights * (scale / total if normalize else scale)
    return Sum(shares)


class Election:
    """Merges deltas entry by entry over those that have the elected sign.

    A sum of zero elects +1, and an entry that is zero agrees with nobody. The entries that share the sign of S have
    total magnitude (Σ|x| + |S|) / 2: no comparison, no cancellation. The weights that took part come from the signs in
    the same way, or are counted where all are 1. Intermediate results have buffers of their own, as fresh memory costs
    more than the sums.
    """

    def __init__(self, weights: Tensor, *, normalize: bool, scale: float) -> None:
        if normalize and bool((weights == weights[0]).all()) and weights[0]:
            weights = torch.ones_like(weights)  # a common factor cancels
        self.weights, self.normalize, self.scale = weights, normalize, scale
        self.halves = torch.full_like(weights, 0.5)
        self.weighted = bool((weights != 1).any())
        self.positive = float(weights.min()) if bool((weights > 0).all()) else None
        self.buffers = weights.new_empty(len(weights) + 4, 0)

    @property
    def parts(self) -> Parts:
        return Parts(self.weights, elected=(self.weighted, self.normalize, self.positive, self.scale))

    def __call__(self, deltas: Tensor) -> Tensor:
        n = deltas.shape[1]
        if n > self.buffers.shape[1]:  # the first block is the largest
            self.buffers = deltas.new_empty(len(self.buffers), n)
        signs, (total, merged, divisor, spare) = self.buffers[4:, :n], self.buffers[:4, :n].unbind()
        if self.weighted:
            deltas.mul_(self.weights[:, None])
        torch.mv(deltas.T, self.halves, out=total).add_(0.0)  # adding zero makes −0 positive
        if self.normalize:
            self._agreeing(deltas, total, out=divisor, signs=signs, spare=spare)
        torch.mv(deltas.abs_().T, self.halves, out=merged)
        merged.add_(torch.abs(total, out=spare))
        torch.copysign(merged, total, out=merged)
        if self.normalize:
            merged.div_(divisor)
        return merged if self.scale == 1 else merged.mul_(self.scale)

    def _agreeing(self, deltas: Tensor, total: Tensor, *, out: Tensor, signs: Tensor, spare: Tensor) -> None:
        """Sum the weights of those that have the sign of ``total``; where nobody has, any but zero will do."""
        if not self.weighted and deltas.device.type == "cpu" and len(deltas) < 256:
            np.maximum(_count_agreeing(deltas.numpy(), total.numpy()), 1, out=out.numpy())
            return
        torch.sign(deltas, out=signs)
        torch.mv(signs.T, self.weights, out=out)
        out.mul_(torch.copysign(spare.fill_(1), total, out=spare))
        out.add_(torch.mv(signs.abs_().T, self.weights, out=spare)).mul_(0.5)
        if self.positive is not None:
            out.clamp_min_(self.positive)
        else:
            out[out.abs() < 1e-8] = 1


@dataclass(frozen=True)
class Trimmed:
    """Sets to zero what cuts drop, then merges the deltas.

    Attributes:
        cuts: For each expert what is kept, and which of that are outliers that are not; ``None`` keeps all or has none.
        then: Merges what is left.
    """

    cuts: Sequence[tuple[Cut | None, Cut | None]]
    then: Sum | Election

    def __call__(self, deltas: Tensor) -> Tensor:
        for delta, (within, without) in zip(deltas, self.cuts):
            outliers = without.trim_(delta.clone()) if without else None
            if within:
                within.trim_(delta)
            if outliers is not None:
                delta.sub_(outliers)
        return self.then(deltas)

    @property
    def parts(self) -> Parts:
        return self.then.parts._replace(cuts=self.cuts)


def _count_agreeing(deltas: NDArray[Any], total: NDArray[Any]) -> NDArray[np.uint8]:
    """Return how many of fewer than 256 deltas ``(n, block)`` are not zero and have the sign of ``total``."""
    count = np.zeros(total.size, np.uint8)
    elected, agrees, present = np.signbit(total), np.empty(total.size, bool), np.empty(total.size, bool)
    for delta in deltas:
        np.equal(np.signbit(delta, out=agrees), elected, out=agrees)
        np.logical_and(agrees, np.not_equal(delta, 0, out=present), out=agrees)
        np.add(count, agrees.view(np.uint8), out=count)
    return count


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
