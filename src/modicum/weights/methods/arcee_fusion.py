"""Take over the entries of another model that stand out, judged by their size and by how far their row moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.weights.kernels.blocks import BLOCK, delta_blocks, fold, working_dtype

FLOOR = 1e-8  # of the probabilities, whose logarithm is taken
FENCE = 1.5  # interquartile ranges above the median


@merge_method("arcee_fusion", laws={"bounded", "zero_delta"}, most=1, two=True, floats=2.0)
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
    if not base.numel():
        return base.clone()
    width = base.shape[-1] if base.ndim else 1
    importance = torch.empty(base.numel(), dtype=working_dtype(base), device=base.device)
    for where, start, deltas in delta_blocks(base, experts, row=width):
        importance[where] = _importance(start.view(-1, width), deltas[0].view(-1, width)).view(-1)
    low, middle, high = _quartiles(importance)
    fence = middle + FENCE * (high - low)
    blocks = iter(torch.split(importance, max(1, BLOCK // width) * width))
    return fold(base, experts, lambda deltas: deltas[0].mul_(next(blocks) >= fence), row=width)


def _importance(start: Tensor, delta: Tensor) -> Tensor:
    q, p = (torch.softmax(rows, -1).add_(FLOOR) for rows in (start, start + delta))
    moved = (p * (p / q).log()).sum(-1, keepdim=True).clamp_min(0)
    return delta.abs() * moved


def _quartiles(numbers: Tensor) -> list[float]:
    places = [int(share * (len(numbers) - 1)) for share in (0.25, 0.5, 0.75)]
    if numbers.device.type != "cpu":
        return [float(numbers.kthvalue(place + 1).values) for place in places]
    return [float(x) for x in np.partition(numbers.numpy(), places)[places]]
