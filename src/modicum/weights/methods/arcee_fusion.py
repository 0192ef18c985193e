"""Take over the entries of another model that stand out, judged by their size and by how far their row moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.weights.kernels.blocks import working_dtype

FLOOR = 1e-8  # of the probabilities, whose logarithm is taken
FENCE = 1.5  # interquartile ranges above the median


@merge_method("arcee_fusion", laws={"bounded", "zero_delta"}, most=1, two=True, whole=True)
def arcee_fusion(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    r"""Keep the entries of the delta whose importance is an outlier.

    .. math::
        I_{ij} = |\tau_{ij}| \; \mathrm{KL}\big(\operatorname{softmax}(\theta_{1,i}) \,\|\,
        \operatorname{softmax}(\theta_{0,i})\big), \quad
        \theta = \theta_0 + \tau \cdot [\, I \ge Q_2 + 1.5\, (Q_3 - Q_1) \,]

    with the quartiles Q of all entries of I, and a row i along the last dimension.

    Args:
        base: The tensor to start from.
        experts: One tensor, whose outliers are taken over.

    Returns:
        The merged tensor.

    Example:
        >>> import torch
        >>> arcee_fusion(torch.zeros(5), [torch.tensor([0.1, 0.0, 0.0, 0.1, 3.0])])
        tensor([0., 0., 0., 0., 3.])

    Cost:
        Two passes of exponentials, and a selection of three quartiles.

    Deviates:
        The quartiles are those of all entries; the program that introduced the method takes them of a million entries
        drawn at random where there are more.

    Reference:
        Arcee AI, "Arcee Fusion", in mergekit's documentation of merge methods, 2025.
    """
    start, end = (tensor.to(working_dtype(base)) for tensor in (base, experts[0]))
    if not start.numel():
        return base.clone()
    rows = (start, end) if start.ndim else (start[None], end[None])
    q, p = (torch.softmax(row, -1) + FLOOR for row in rows)
    moved = (p * (p / q).log()).sum(-1, keepdim=True).clamp_min(0)
    importance = ((rows[1] - rows[0]).abs() * moved).reshape(-1)
    last = importance.numel() - 1
    low, middle, high = (importance.kthvalue(int(share * last) + 1).values for share in (0.25, 0.5, 0.75))
    taken = (importance >= middle + FENCE * (high - low)).view_as(start)
    return torch.where(taken, end, start).to(base.dtype)
