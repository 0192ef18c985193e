"""Leave out each delta's outliers and its small bulk; add what is between.

The paper keeps about a tenth of the entries and leaves out the largest hundredth.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Fraction, UnitInterval
from modicum.weights.kernels.blocks import as_vector, fold, per_expert
from modicum.weights.kernels.combine import Elect, Trimmed, combiner, kept_of
from modicum.weights.kernels.selection import Cut, find_cuts


@merge_method("breadcrumbs", paper="arXiv:2312.06795", laws={"bounded", "permutation", "zero_delta", "scale", "shift"})
def breadcrumbs(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    density: Fraction | list[Fraction],
    gamma: UnitInterval | list[UnitInterval] = 0.01,
    elect: Elect = "none",
    scale: float = 1.0,
    weights: list[float] | None = None,
    normalize: bool = False,
) -> Tensor:
    r"""Keep the entries whose magnitude is neither among the largest nor among the smallest.

    .. math::
        \hat\tau_t = m_t \odot \tau_t, \quad
        m_{t,i} = [\, \lfloor \gamma n \rfloor < \operatorname{rank}(|\tau_{t,i}|) \le
        \lfloor \gamma n \rfloor + \lfloor d n \rfloor \,], \quad
        \theta = \theta_0 + \lambda \sum_t w_t \hat\tau_t

    with rank 1 for the largest.

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        density: Share of entries kept (d), in (0, 1]; one value or one for each.
        gamma: Share of largest entries left out; fewer when ``density`` asks for them.
        elect: ``ties`` sums only the deltas that have the elected sign, as in TIES.
        scale: Factor on the merged delta.
        weights: One for each expert; all 1 when not given.
        normalize: Divide by the weights that took part.

    Returns:
        The merged tensor.

    Raises:
        RecipeError: The number of weights or densities is wrong.

    Example:
        >>> import torch
        >>> breadcrumbs(torch.zeros(4), [torch.tensor([1.0, -9.0, 3.0, 4.0])], density=0.5, gamma=0.25)
        tensor([0., 0., 3., 4.])

    Cost:
        Two passes.

    Deviates:
        The authors' code ranks within each row, this within the tensor, as other tools do. At least one entry is kept.

    Reference:
        Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV 2024,
        arXiv:2312.06795, Section 3.
    """
    n, size = len(experts), base.numel()
    w = as_vector(per_expert(weights, n), base)
    windows = [
        _window(size, d, g) for d, g in zip(per_expert(density, n, name="density"), per_expert(gamma, n, name="gamma"))
    ]
    keeps = [[k for k in (top, top + kept) if 0 < k < size] for top, kept in windows]
    found = find_cuts(base, experts, keeps) if any(keeps) and size else [[] for _ in experts]
    cuts = [_pair(window, list(several), size) for window, several in zip(windows, found)]

    combine = combiner(w, elect=elect, normalize=normalize, scale=scale)
    return fold(base, experts, Trimmed(cuts, combine))


def _window(size: int, density: float, gamma: float) -> tuple[int, int]:
    """Return how many of the largest are left out, and how many after them are kept."""
    kept = kept_of(size, density)
    return min(int(gamma * size), size - kept), kept


def _pair(window: tuple[int, int], cuts: list[Cut], size: int) -> tuple[Cut | None, Cut | None]:
    """Return the cut that holds what is kept and what is left out at the top, and the one that holds the latter."""
    top, kept = window
    without = cuts.pop(0) if 0 < top < size else None
    return cuts.pop(0) if 0 < top + kept < size else None, without
