"""Select entries on which experts differ, weigh experts by the energy of their deltas, erase minority signs (SCE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.blocks import working_dtype
from modicum.weights.combine import kept_of
from modicum.weights.selection import find_cuts


@merge_method("sce", paper="arXiv:2408.07990", laws={"permutation", "zero_delta", "scale", "shift"})
def sce(base: Tensor, experts: Sequence[Tensor], *, select: Fraction = 1.0) -> Tensor:
    r"""Average deltas over the elected signs, with one weight for each expert and tensor.

    .. math::
        w_t = \frac{\overline{\tau_t^2}}{\sum_u \overline{\tau_u^2}}, \quad
        \gamma = \operatorname{sign}\Big(\sum_t \tau_t\Big), \quad
        \theta = \theta_0 + \frac{\sum_{t \in A} w_t \tau_t}{\sum_{t \in A} w_t}, \quad
        A = \{t : \gamma \tau_t > 0\}

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        select: Share kept of the entries on which the experts differ: those whose deltas vary most between them.

    Returns:
        The merged tensor.

    Example:
        >>> import torch
        >>> sce(torch.zeros(2), [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0])])
        tensor([1.0000, 2.6667])

    Cost:
        ``n + 3`` copies of the tensor in float32.

    Deviates:
        None known. Of entries that vary equally the first are kept.

    Reference:
        Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024, arXiv:2408.07990, Section 3.3.
    """
    dtype = working_dtype(base)
    origin = base.to(dtype)
    deltas = torch.stack([(expert.to(dtype) - origin).reshape(-1) for expert in experts])
    size = base.numel()
    if select < 1 and len(experts) > 1 and size:
        # Several times faster than torch's variance along so short an axis, and zero where all are equal.
        beside = deltas - deltas[0]
        variance = (beside - beside.mean(0)).square_().mean(0)
        keep = max(1, kept_of(int(variance.count_nonzero()), select))
        ((cut,),) = find_cuts(torch.zeros_like(variance), [variance], [[keep]])
        deltas *= cut.trim_(variance) > 0  # an entry on which all agree is never kept
    energy = deltas.square().mean(1) if size else deltas.sum(1)
    weights = energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / len(energy))
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0).to(dtype)
    agree = (deltas * sign > 0).to(dtype)
    divisor = weights @ agree
    merged = (weights @ (deltas * agree)) / torch.where(divisor > 0, divisor, 1.0)
    return (origin + merged.view(base.shape)).to(base.dtype)
