"""Select entries on which experts differ, weigh experts by the energy of their deltas, erase minority signs (SCE)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.kernels import fused
from modicum.weights.kernels.blocks import block_size, delta_blocks, fold, multiply_, result_like, working_dtype
from modicum.weights.kernels.selection import Cut, find_variance_cut

SEQUENTIAL = 16  # so many experts' deltas torch adds one after the other


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
    selecting = select < 1 and n > 1 and base.numel()
    cut = find_variance_cut(base, experts, select, variance=_variance) if selecting else None
    if n <= SEQUENTIAL and fused.usable(base, *experts):
        selected = fused.Selected(base, experts, cut)
        energy = _total(base, (squares.sum(1) for squares in selected.squares(block_size(base, 1))), n)
        if bool(energy.isfinite().all()):
            selected.merge(_weights(energy, base), out := result_like(base))
            return out
    masks = None if cut is None else _masks(base, experts, cut)

    def squares() -> Iterator[Tensor]:
        for i, (_, _, deltas) in enumerate(delta_blocks(base, experts)):
            if masks is not None:
                multiply_(deltas, np.unpackbits(masks[i], count=deltas.shape[1]))
            sums = deltas.square().sum(1)
            # Beyond the largest float32 they are summed again in float64.
            yield sums if bool(sums.isfinite().all()) else deltas.double().square_().sum(1)

    weights = _weights(_total(base, squares(), n), base)
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


def _total(base: Tensor, sums: Iterable[Tensor], n: int) -> Tensor:
    energy = torch.zeros(n, dtype=torch.float64, device=base.device)
    for some in sums:
        energy += some
    return energy


def _weights(energy: Tensor, base: Tensor) -> Tensor:
    """Return each expert's share of the energy."""
    shares = energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / len(energy))
    return shares.to(working_dtype(base))


def _masks(base: Tensor, experts: Sequence[Tensor], cut: Cut) -> list[NDArray[np.uint8]]:
    """Return a bit for each entry, block by block: whether the experts differ on it as much as the cut asks for."""
    kept = (cut.trim_(_variance(deltas)[0]) for _, _, deltas in delta_blocks(base, experts))
    return [np.packbits(variance.cpu().numpy() > 0) for variance in kept]


def _variance(deltas: Tensor) -> Tensor:
    """Return the variance of each entry between the experts as one row: zero where all are equal."""
    shares = deltas.new_full((len(deltas),), 1 / len(deltas))
    deltas -= deltas[0].clone()
    # Products are several times faster than torch's mean and variance along so short an axis.
    deltas -= torch.mv(deltas.T, shares)
    return torch.mv(deltas.square_().T, shares)[None]
