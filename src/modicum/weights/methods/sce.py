"""Select entries on which experts differ, weigh experts by the energy of their deltas, erase minority signs (SCE)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.kernels.blocks import delta_blocks, fold, multiply_, working_dtype
from modicum.weights.kernels.combine import kept_of
from modicum.weights.kernels.selection import find_cuts


@merge_method(
    "sce",
    paper="arXiv:2408.07990",
    laws={"bounded", "permutation", "zero_delta", "scale", "shift"},
    floats=0.1,
)
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
        Two passes; with ``select``, five and a bit for each entry.

    Deviates:
        Of entries that vary equally the first are kept.

    Reference:
        Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024, arXiv:2408.07990, Section 3.3.
    """
    n = len(experts)
    masks = _masks(base, experts, select) if select < 1 and n > 1 and base.numel() else None
    energy = torch.zeros(n, dtype=torch.float64, device=base.device)
    for i, (_, _, deltas) in enumerate(delta_blocks(base, experts)):
        if masks is not None:
            multiply_(deltas, np.unpackbits(masks[i], count=deltas.shape[1]))
        squares = deltas.square().sum(1)
        # Beyond the largest float32 they are summed again in float64.
        energy += squares if bool(squares.isfinite().all()) else deltas.double().square_().sum(1)
    weights = energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / n)
    weights = weights.to(working_dtype(base))
    parts = iter(masks or [])

    def kernel(deltas: Tensor) -> Tensor:
        if masks is not None:
            multiply_(deltas, np.unpackbits(next(parts), count=deltas.shape[1]))
        sign = torch.copysign(torch.ones_like(deltas[0]), deltas.sum(0).add_(0.0))
        deltas.mul_(sign).clamp_min_(0)
        merged = torch.mv(deltas.T, weights).mul_(sign)
        divisor = torch.mv(deltas.sign_().T, weights)
        return merged.div_(divisor.clamp_min_(torch.finfo(divisor.dtype).tiny))  # zero stays zero where nobody agrees

    return fold(base, experts, kernel)


def _masks(base: Tensor, experts: Sequence[Tensor], select: float) -> list[NDArray[np.uint8]]:
    """Say which entries are kept: those on which the experts differ most, and none on which all agree.

    Returns:
        A bit for each entry, block by block.
    """
    differing = sum(int(_variance(deltas).count_nonzero()) for _, _, deltas in delta_blocks(base, experts))
    ((cut,),) = find_cuts(base, experts, [[max(1, kept_of(differing, select))]], measure=_variance)
    kept = (cut.trim_(_variance(deltas)[0]) for _, _, deltas in delta_blocks(base, experts))
    return [np.packbits(variance.cpu().numpy() > 0) for variance in kept]


def _variance(deltas: Tensor) -> Tensor:
    """Return the variance of each entry between the experts as one row: zero where all are equal."""
    shares = deltas.new_full((len(deltas),), 1 / len(deltas))
    deltas -= deltas[0].clone()
    # Products are several times faster than torch's mean and variance along so short an axis.
    deltas -= torch.mv(deltas.T, shares)
    return torch.mv(deltas.square_().T, shares)[None]
