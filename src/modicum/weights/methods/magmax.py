"""Take, entry by entry, the delta of largest magnitude.

Made for experts trained one after another on one model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.weights.kernels.blocks import fold


@merge_method("magmax", paper="arXiv:2407.06322", laws={"bounded", "zero_delta", "scale", "shift"})
def magmax(base: Tensor, experts: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    r"""Keep of each entry the delta that moved furthest.

    .. math::
        \theta_i = \theta_{0,i} + \lambda\, \tau_{t^*, i}, \quad t^* = \arg\max_t |\tau_{t,i}|

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        scale: Factor on the merged delta (lambda; 0.5 in the paper's experiments).

    Returns:
        The merged tensor.

    Example:
        >>> import torch
        >>> magmax(torch.zeros(2), [torch.tensor([1.0, -3.0]), torch.tensor([-2.0, 1.0])])
        tensor([-2., -3.])

    Cost:
        One pass.

    Deviates:
        Of equal magnitudes the later expert's is taken. The paper trains experts one after another; any will do here.

    Reference:
        Marczak et al., "MagMax: Leveraging Model Merging for Seamless Continual Learning", ECCV 2024,
        arXiv:2407.06322, Section 4.
    """

    def kernel(deltas: Tensor) -> Tensor:
        best = deltas[0]
        for delta in deltas[1:]:
            best = torch.where(delta.abs() >= best.abs(), delta, best)
        return scale * best

    return fold(base, experts, kernel)
