"""Elect one shared delta, and keep a mask and a factor for each expert to come back to its own (EMR).

Not one model but one for each expert: choose ``expert`` to get its model, or nothing for the shared one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import merge_method
from modicum.types import NonNegativeInt
from modicum.weights.kernels.blocks import delta_blocks, fold


@merge_method("emr", paper="arXiv:2405.17461", laws={"bounded", "zero_delta", "scale", "shift"})
def emr(base: Tensor, experts: Sequence[Tensor], *, expert: NonNegativeInt | None = None) -> Tensor:
    r"""Take the largest delta that has the elected sign, masked and rescaled for one expert when asked.

    .. math::
        \gamma = \operatorname{sign}\Big(\sum_t \tau_t\Big), \quad
        \tau_{uni} = \gamma \odot \max_t\, [\gamma \odot \tau_t > 0]\, |\tau_t|, \quad
        \theta_t = \theta_0 + \frac{\sum |\tau_t|}{\sum |m_t \odot \tau_{uni}|}\, m_t \odot \tau_{uni}, \quad
        m_t = [\tau_t \odot \tau_{uni} > 0]

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        expert: Whose model to reconstruct, counted from 0; the shared delta as it is when not given.

    Returns:
        The merged tensor.

    Raises:
        RecipeError: There is no such expert.

    Example:
        >>> import torch
        >>> emr(torch.zeros(2), [torch.tensor([1.0, -3.0]), torch.tensor([2.0, 1.0])])
        tensor([ 2., -3.])

    Cost:
        One pass, two for one expert's model.

    Deviates:
        The paper takes the factor over the model, this over the tensor. A sum of zero elects −1, as in the authors'
        code.

    Reference:
        Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS 2024, arXiv:2405.17461,
        Section 3.
    """
    if expert is None:
        return fold(base, experts, _unify)
    if expert >= len(experts):
        raise RecipeError(f"emr: expert is {expert}, but there are {len(experts)}, counted from 0.")
    sums = torch.zeros(2, dtype=torch.float64, device=base.device)
    for _, _, deltas in delta_blocks(base, experts):
        own = deltas[expert].clone()
        sums += torch.stack([own.abs().sum(), _masked(own, _unify(deltas)).abs().sum()]).double()
    factor = float(sums[0] / sums[1]) if sums[1] > 0 else 0.0

    def kernel(deltas: Tensor) -> Tensor:
        own = deltas[expert].clone()
        return factor * _masked(own, _unify(deltas))

    return fold(base, experts, kernel)


def _unify(deltas: Tensor) -> Tensor:
    sign = torch.where(deltas.sum(0) > 0, 1.0, -1.0).to(deltas.dtype)
    return sign * (deltas * sign).clamp_min_(0).amax(0)


def _masked(own: Tensor, unified: Tensor) -> Tensor:
    return unified * (own * unified > 0)
