"""Keep the entries that several experts find important in the summed delta.

Removes what one expert alone wants, and what none does. ``threshold`` is worth a search on validation data among 0.2
to 0.6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import NonNegative, PositiveInt
from modicum.weights.kernels.blocks import fold


@merge_method(
    "consensus", paper="arXiv:2405.07813", laws={"bounded", "permutation", "zero_delta", "scale", "shift"}, experts=2
)
def consensus(
    base: Tensor, experts: Sequence[Tensor], *, threshold: NonNegative = 0.4, agree: PositiveInt = 2, scale: float = 1.0
) -> Tensor:
    r"""Sum the deltas where enough experts' own delta is large beside the others' (TALL masks).

    .. math::
        m_{t} = [\,|\tau_t| > \lambda_t |\tau - \tau_t|\,], \quad \tau = \sum_t \tau_t, \quad
        \theta = \theta_0 + \alpha\, [\textstyle\sum_t m_t \ge k] \odot \tau

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        threshold: How large an expert's delta must be beside the sum of the others' (lambda).
        agree: How many experts must find an entry important (k).
        scale: Factor on the merged delta (alpha).

    Returns:
        The merged tensor.

    Example:
        >>> import torch
        >>> consensus(torch.zeros(3), [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.1, 1.0])])
        tensor([2., 0., 0.])

    Cost:
        One pass.

    Deviates:
        One ``threshold`` for all experts; the paper searches one for each. The summed delta is plain task arithmetic.

    Reference:
        Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024,
        arXiv:2405.07813, Sections 4 and 5.
    """

    def kernel(deltas: Tensor) -> Tensor:
        total = deltas.sum(0)
        important = torch.zeros_like(total)
        for delta in deltas:
            important += torch.gt(delta.abs(), threshold * (total - delta).abs())
        return scale * total.mul_(important >= agree)

    return fold(base, experts, kernel)
