"""Select entries on which experts differ, weigh experts by the energy of their deltas, erase minority signs (SCE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.blocks import BLOCK, delta_blocks, fold, working_dtype
from modicum.weights.combine import kept_of
from modicum.weights.selection import find_cuts


@merge_method("sce", paper="arXiv:2408.07990", laws={"permutation", "zero_delta", "scale", "shift"}, whole=True)
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
        Two passes; with ``select``, three and two copies of the tensor in float32.

    Deviates:
        None known. Of entries that vary equally the first are kept.

    Reference:
        Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024, arXiv:2408.07990, Section 3.3.
    """
    n = len(experts)
    kept = _kept(base, experts, select) if select < 1 and n > 1 and base.numel() else None
    energy = torch.zeros(n, dtype=torch.float64, device=base.device)
    for where, _, deltas in delta_blocks(base, experts):
        if kept is not None:
            deltas *= kept[where]
        energy += deltas.square_().sum(1)
    weights = energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / n)
    weights = weights.to(working_dtype(base))
    parts = iter(torch.split(kept, BLOCK)) if kept is not None else None

    def kernel(deltas: Tensor) -> Tensor:
        if parts is not None:
            deltas *= next(parts)
        sign = torch.copysign(torch.ones_like(deltas[0]), deltas.sum(0).add_(0.0))
        deltas.mul_(sign).clamp_min_(0)
        merged = torch.mv(deltas.T, weights).mul_(sign)
        divisor = torch.mv(deltas.sign_().T, weights)
        return merged.div_(torch.where(divisor > 0, divisor, 1.0))

    return fold(base, experts, kernel)


def _kept(base: Tensor, experts: Sequence[Tensor], select: float) -> Tensor:
    """Say which entries are kept: those on which the experts differ most, and none on which all agree."""
    variance = torch.empty(base.numel(), dtype=working_dtype(base), device=base.device)
    for where, _, deltas in delta_blocks(base, experts):
        # Several times faster than torch's variance along so short an axis, and zero where all are equal.
        deltas -= deltas[0].clone()
        variance[where] = deltas.sub_(deltas.mean(0)).square_().mean(0)
    keep = max(1, kept_of(int(variance.count_nonzero()), select))
    ((cut,),) = find_cuts(torch.zeros_like(variance), [variance], [[keep]])
    return cut.trim_(variance) > 0
