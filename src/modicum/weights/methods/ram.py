"""Keep what one expert alone changed, average what several changed: for experts trained by reinforcement (RAM).

Such training changes few entries, so averaging would halve what is one expert's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from modicum.registry import merge_method
from modicum.types import NonNegative
from modicum.weights.kernels.blocks import delta_blocks, fold


@merge_method("ram", paper="arXiv:2601.13572", laws={"bounded", "permutation", "zero_delta", "shift", "copies"})
def ram(
    base: Tensor, experts: Sequence[Tensor], *, eps: NonNegative = 1e-5, r: NonNegative = 0.0, alpha: NonNegative = 0.2
) -> Tensor:
    r"""Sum changes that are unique to an expert, average shared ones.

    .. math::
        m_t = [|\tau_t| > \epsilon], \quad n_i = \sum_t m_{t,i}, \quad
        \theta_i = \theta_{0,i} + \frac{1}{n_i} \sum_t s_{t,i}\, m_{t,i}\, \tau_{t,i}

    with :math:`s_{t,i} = 1 + r \min(\rho_t, \alpha)` where :math:`n_i = 1`, else 1, and :math:`\rho_t` the ratio of
    shared to unique entries of expert t in the tensor.

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        eps: Smaller changes count as none.
        r: Strengthens unique entries of experts that share much; 0 is RAM, 0.1 RAM+.
        alpha: Most of the ratio that counts.

    Returns:
        The merged tensor.

    Example:
        >>> import torch
        >>> ram(torch.zeros(3), [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, 0.0, 0.0])])
        tensor([2., 1., 0.])

    Cost:
        One pass, two with ``r``.

    Reference:
        Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, arXiv:2601.13572.
    """
    n = len(experts)
    factors = torch.ones(n, dtype=torch.float64)
    if r:
        counts = torch.zeros(2, n, dtype=torch.float64)
        for _, _, deltas in delta_blocks(base, experts):
            changed = deltas.abs() > eps
            alone = changed.sum(0) == 1
            counts += torch.stack([(changed & ~alone).sum(1), (changed & alone).sum(1)]).double().cpu()
        ratio = torch.where(counts[1] > 0, counts[0] / counts[1].clamp_min(1), 0.0)
        factors = 1 + r * ratio.clamp(0, alpha)

    def kernel(deltas: Tensor) -> Tensor:
        deltas = hardshrink(deltas, eps)
        count = deltas.sign().abs_().sum(0)  # several times faster than counting what is not zero
        if r:
            deltas *= torch.where(count == 1, factors.to(deltas)[:, None], 1.0)
        return deltas.sum(0).div_(count.clamp_min_(1))

    return fold(base, experts, kernel)
