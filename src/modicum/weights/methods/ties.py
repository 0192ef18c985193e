"""Trim small changes, elect a sign for each entry, average what agrees.

For experts whose changes overlap and disagree. ``density`` 0.2 is the paper's; deltas of large or long trainings want
more. Choose ``scale`` on validation data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Fraction, Unbounded
from modicum.weights.kernels.blocks import as_vector, delta_blocks, fold, per_expert
from modicum.weights.kernels.combine import Trimmed, combiner, trim_cuts
from modicum.weights.kernels.selection import Cut

Each = Callable[[Callable[[Tensor, Sequence[Tensor]], Any]], Mapping[str, Any]]
BUCKETS = 1 << 16


def survey(each: Each, *, density: float | list[float], trim_scope: str, **_: Any) -> dict[str, dict[str, Any]]:
    """Find the thresholds of a trim over the whole model, from two passes of histograms of float32 bit patterns.

    Bit patterns of positive numbers are ordered like the numbers: the first pass finds the upper half of the pattern
    of the k-th largest, the second the lower half, so the thresholds are exact.
    """
    if trim_scope == "tensor":
        return {}
    upper = _histograms(each, None)
    totals = upper.sum(1)
    shares = per_expert(density, len(totals), name="density")
    ranks = [max(1, int(share * int(total))) for share, total in zip(shares, totals)]
    prefixes, left = _locate(upper, ranks)
    patterns, _left = _locate(_histograms(each, prefixes), left)
    bits = torch.tensor([(high << 16) | low for high, low in zip(prefixes, patterns)], dtype=torch.int32)
    thresholds = bits.view(torch.float32).tolist()
    return {name: {"threshold": thresholds} for name in each(lambda *_: None)}


def _histograms(each: Each, prefixes: Sequence[int] | None) -> Tensor:
    """Count bit patterns of magnitudes by their upper half, or by their lower half among those of an upper half."""

    def count(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        found = torch.zeros(len(experts), BUCKETS, dtype=torch.int64)
        for _, _, deltas in delta_blocks(base.float(), experts):
            for t, pattern in enumerate(deltas.abs_().view(torch.int32).cpu()):
                high = pattern >> 16
                chosen = high if prefixes is None else (pattern & 0xFFFF)[high == prefixes[t]]
                found[t] += torch.bincount(chosen, minlength=BUCKETS)
        return found

    return torch.stack(list(each(count).values())).sum(0)


def _locate(histograms: Tensor, ranks: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return in which bucket each k-th largest lies, and its rank within the bucket."""
    buckets, left = [], []
    for histogram, rank in zip(histograms, ranks):
        above = histogram.flip(0).cumsum(0)
        position = int(torch.searchsorted(above, rank))
        buckets.append(BUCKETS - 1 - position)
        left.append(rank - (int(above[position - 1]) if position else 0))
    return buckets, left


@merge_method(
    "ties",
    paper="arXiv:2306.01708",
    laws={"bounded", "permutation", "zero_delta", "scale", "shift", "copies"},
    supplied={"threshold"},
    survey=survey,
)
def ties(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    density: Fraction | list[Fraction],
    scale: float = 1.0,
    weights: list[float] | None = None,
    normalize: bool = True,
    trim_scope: Literal["tensor", "model"] = "tensor",  # noqa: ARG001 - read by the survey
    threshold: Sequence[Annotated[float, Ge(0), Unbounded()]] | None = None,
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
        trim_scope: Trim within each tensor, or over the model as the paper does; a merge of whole models then reads
            them three times. A single tensor is its own model.
        threshold: Magnitude from which each expert's deltas are kept, found by a pass over the model.

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
        The paper trims over the whole model, this by default within each tensor, as other tools do. At least one entry
        of a tensor is kept, and entries of equal magnitude are kept by position, first ones first; over the model all
        entries that equal the threshold are kept. A sum of exactly zero elects +1; the paper takes the
        model's majority.

    Reference:
        Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv:2306.01708,
        Algorithm 1.
    """
    w = as_vector(per_expert(weights, len(experts)), base)
    cuts: Sequence[Cut | None]
    if threshold is None:
        cuts = trim_cuts(base, experts, per_expert(density, len(experts), name="density"))
    else:
        cuts = [Cut(value, 0, exhaustive=True) for value in threshold]

    elected = combiner(w, elect="ties", normalize=normalize, scale=scale)
    return fold(base, experts, Trimmed([(cut, None) for cut in cuts], elected))
