"""Trim small changes, elect a sign for each entry, average what agrees.

For experts whose changes overlap and disagree. ``density`` 0.2 is the paper's; deltas of large or long trainings want
more. Choose ``scale`` on validation data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.blocks import as_vector, fold, per_expert
from modicum.weights.selection import Cut, find_cuts


@merge_method("ties", paper="arXiv:2306.01708", laws={"permutation", "zero_delta", "scale", "shift", "copies"})
def ties(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    density: Fraction | list[Fraction],
    scale: float = 1.0,
    weights: list[float] | None = None,
    normalize: bool = True,
) -> Tensor:
    r"""Trim each expert's delta, elect a sign per entry, average the deltas that agree with it.

    .. math::
        \hat\tau_t = \operatorname{trim}(\theta_t - \theta_0), \quad
        \gamma = \operatorname{sign}\Big(\sum_t w_t \hat\tau_t\Big), \quad
        \theta = \theta_0 + \lambda \frac{\sum_{t \in A} w_t \hat\tau_t}{\sum_{t \in A} w_t}, \quad
        A = \{t : w_t \hat\tau_t \gamma > 0\}

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        density: Share of entries that each expert keeps, by magnitude, in (0, 1]; one value or one for each.
        scale: Factor on the merged delta (lambda in the paper).
        weights: One for each expert; all 1 when not given.
        normalize: Divide by the weights that agree; otherwise the agreeing deltas are summed.

    Returns:
        The merged tensor.

    Raises:
        RecipeError: The number of weights or densities is wrong.

    Example:
        >>> import torch
        >>> base, a, b = torch.zeros(3), torch.tensor([3.0, 1.0, -2.0]), torch.tensor([1.0, -4.0, -4.0])
        >>> ties(base, [a, b], density=1.0)
        tensor([ 2., -4., -3.])

    Cost:
        Two passes: one to find the thresholds, one to merge.

    Deviates:
        The paper trims over the whole model; this trims within each tensor, as other tools do, which streams. At least
        one entry of a tensor is kept. Entries of equal magnitude are kept by position, first ones first. A sum of
        exactly zero elects +1; the paper takes the model's majority.

    Reference:
        Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv:2306.01708,
        Algorithm 1.
    """
    w = as_vector(per_expert(weights, len(experts)), base)
    cuts = trim_cuts(base, experts, per_expert(density, len(experts)))

    def kernel(deltas: Tensor) -> Tensor:
        for delta, cut in zip(deltas, cuts):
            if cut:
                cut.trim_(delta)
        return scale * elect(deltas, w, normalize=normalize)

    return fold(base, experts, kernel)


def trim_cuts(base: Tensor, experts: Sequence[Tensor], density: Sequence[float]) -> list[Cut | None]:
    """Return what each expert's trim drops; ``None`` where it drops nothing."""
    n = base.numel()
    keep = [max(1, int(share * n)) for share in density]
    cuts: list[Cut | None] = [None] * len(experts)
    trimmed = [t for t, k in enumerate(keep) if k < n]
    if trimmed:
        found = find_cuts(base, [experts[t] for t in trimmed], [keep[t] for t in trimmed])
        for t, cut in zip(trimmed, found):
            cuts[t] = cut
    return cuts


def elect(deltas: Tensor, weights: Tensor, *, normalize: bool) -> Tensor:
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
