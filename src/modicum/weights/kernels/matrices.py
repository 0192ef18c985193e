"""Methods that treat a weight as a linear map: one matrix at a time, everything else averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modicum.weights.kernels.blocks import fold, working_dtype


def merge_matrices(base: Tensor, experts: Sequence[Tensor], merge: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return ``base + merge(deltas)`` for a matrix, and for each matrix of a stack of them.

    Vectors and scalars get the mean of the deltas. A tensor that no expert has changed stays as it is, and costs no
    decomposition: adapters leave most of a model alone.

    Args:
        base: The tensor that the deltas are taken from.
        experts: Tensors of its shape.
        merge: From the deltas of one matrix, in float32 or float64, to the merged delta, which is 0 where all are.
    """
    base, experts = base.detach(), [expert.detach() for expert in experts]
    if experts and all(torch.equal(expert, base) for expert in experts):
        return base.clone()
    if base.ndim < 2 or not base.numel():
        return fold(base, experts, lambda deltas: deltas.mean(0))
    if base.ndim > 2:
        return torch.stack([merge_matrices(base[i], [e[i] for e in experts], merge) for i in range(len(base))])
    origin = base.to(working_dtype(base))
    return (origin + merge([expert.to(origin.dtype) - origin for expert in experts])).to(base.dtype)
