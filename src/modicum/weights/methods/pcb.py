"""Weigh each entry by how important it is to its expert and how it competes with the others' (PCB).

``ratio`` 0.05 to 0.2 and ``scale`` 1.2 are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.kernels.blocks import working_dtype

CLIP = 1e-4  # share of magnitudes cut off at each end before they are normalised


def _floats(n: int, _: Mapping[str, Any]) -> float:
    return n + 10


@merge_method(
    "pcb",
    paper="arXiv:2410.02396",
    laws={"bounded", "permutation", "zero_delta", "shift"},
    floats=_floats,
)
def pcb(base: Tensor, experts: Sequence[Tensor], *, ratio: Fraction = 0.1, scale: float = 1.2) -> Tensor:
    r"""Average deltas with weights from competition within and between experts, for the top share of entries.

    .. math::
        \beta_t = \exp\big(T\, N(|\tau_t|)^2\big) \odot \tanh\big(\tau_t \textstyle\sum_u \tau_u\big), \quad
        \theta = \theta_0 + \lambda \frac{\sum_t \hat\beta_t \tau_t}{\sum_t \hat\beta_t}

    where N is min-max normalisation, T the number of experts, and :math:`\hat\beta_t` is :math:`\beta_t` clamped below
    at its quantile ``1 - ratio`` and min-max normalised.

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        ratio: Share of entries that keep a weight.
        scale: Factor on the merged delta (lambda).

    Returns:
        The merged tensor.

    Example:
        >>> import torch
        >>> pcb(torch.zeros(2), [torch.tensor([2.0, 0.0])], ratio=0.5, scale=1.0)
        tensor([2., 0.])

    Cost:
        Three copies of the tensor for each expert; two sorts of each.

    Deviates:
        The paper works on the flattened model, this on each tensor, which streams; its evolutionary search of one
        lambda for each expert is left to the caller.

    Reference:
        Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024, arXiv:2410.02396, Section 3.
    """
    dtype = working_dtype(base)
    origin = base.to(dtype)
    deltas = [(expert.to(dtype) - origin).reshape(-1) for expert in experts]
    if not base.numel():
        return base.clone()
    total = torch.stack(deltas).sum(0)
    merged, weight = torch.zeros_like(total), torch.zeros_like(total)
    for delta in deltas:
        magnitude = delta.abs()
        magnitude = magnitude.clamp(_quantile(magnitude, CLIP), _quantile(magnitude, 1 - CLIP))
        score = (len(deltas) * _min_max(magnitude) ** 2).exp() * (delta * total).tanh()
        score = _min_max(score.clamp_min(_quantile(score, 1 - ratio)))
        merged += score * delta
        weight += score
    merged = torch.where(weight > 0, merged / weight.clamp_min(torch.finfo(dtype).tiny), 0.0)
    return (origin + scale * merged.view(base.shape)).to(base.dtype)


def _quantile(values: Tensor, share: float) -> Tensor:
    """Return the smallest value that at least ``share`` of the values do not exceed."""
    k = min(len(values), max(1, int(-(-share * len(values) // 1))))
    return torch.kthvalue(values, k).values


def _min_max(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / torch.where(high > low, high - low, 1.0)
