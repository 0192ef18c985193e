"""Add the experts' deltas to the base.

``scale`` around 0.3 to 0.5 suits several experts; with ``scale = 1 / n`` it is their average. It is the baseline that
every cleverer merge should be compared with, after choosing ``scale`` on validation data for both.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modicum.registry import merge_method
from modicum.weights.kernels.blocks import Sum, as_vector, fold, per_expert


@merge_method(
    "task_arithmetic",
    paper="arXiv:2212.04089",
    laws={"bounded", "propagates", "permutation", "zero_delta", "scale", "shift"},
    factors="both",
)
def task_arithmetic(
    base: Tensor, experts: Sequence[Tensor], *, scale: float = 1.0, weights: list[float] | None = None
) -> Tensor:
    r"""Add the weighted sum of the deltas to the base.

    .. math::
        \theta = \theta_0 + \lambda \sum_t w_t (\theta_t - \theta_0)

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        scale: Factor on the merged delta (lambda in the paper).
        weights: One for each expert; all 1 when not given.

    Returns:
        The merged tensor.

    Raises:
        RecipeError: The number of weights is wrong.

    Example:
        >>> import torch
        >>> task_arithmetic(torch.ones(2), [torch.zeros(2), 4 * torch.ones(2)], scale=0.5)
        tensor([2., 2.])

    Cost:
        One pass.

    Deviates:
        Weights of single experts are an addition; the paper has one factor for all.

    Reference:
        Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089, Section 2.
    """
    w = scale * as_vector(per_expert(weights, len(experts)), base)
    return fold(base, experts, Sum(w))
