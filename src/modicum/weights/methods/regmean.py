"""The linear layer whose outputs are closest to every expert's on that expert's own inputs (RegMean).

Needs statistics: the Gram matrix of each layer's inputs on each expert's data, kept as a checkpoint of the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import UnitInterval
from modicum.weights.kernels.blocks import working_dtype
from modicum.weights.statistics import required


@merge_method(
    "regmean",
    paper="arXiv:2212.09849",
    laws={"copies"},
    base=False,
    supplied={"statistics"},
    statistics="required",
    measure="gram",
)
def regmean(
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    shrink: UnitInterval = 0.9,
    statistics: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""Solve the least squares problem that makes one layer answer like all experts.

    .. math::
        W = \Big(\sum_t W_t \hat G_t\Big) \Big(\sum_t \hat G_t\Big)^{-1}, \quad G_t = X_t^T X_t, \quad
        \hat G = \alpha G + (1 - \alpha) \operatorname{diag}(G)

    Args:
        base: Not used, except that the result has its dtype when it is given.
        experts: One tensor ``(out, in)`` of each model.
        shrink: Share of the off-diagonal entries kept (alpha).
        statistics: Each expert's ``(in, in)`` Gram matrix.

    Returns:
        The merged tensor.

    Raises:
        RecipeError: There are no statistics, or not as many as experts.

    Example:
        >>> import torch
        >>> grams = [torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)]
        >>> regmean(None, [torch.zeros(1, 2), torch.ones(1, 2)], statistics=grams)
        tensor([[0.2500, 0.5000]])

    Cost:
        One solve of the input side, in float64.

    Deviates:
        Tensors that are no matrices, or whose inputs were not measured, are averaged, as in the paper; the merge's
        notes name them. Where the sum of Gram matrices is singular, the solution of least change is taken.

    Reference:
        Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, arXiv:2212.09849,
        Equations 2 and 3.
    """
    like = experts[0] if base is None else base
    found = required("regmean", statistics, len(experts))
    first = experts[0].to(working_dtype(like))
    if like.ndim != 2:
        moved = torch.stack([expert.to(first.dtype) - first for expert in experts]).mean(0)
        return (first + moved).to(like.dtype)
    grams = [shrink * g.double() + (1 - shrink) * g.double().diagonal().diag() for g in found]
    # Differences from the first expert, so that equal experts come out exactly.
    target = sum(((e.double() - first.double()) @ g for e, g in zip(experts, grams)), torch.zeros_like(first.double()))
    total = torch.stack(grams).sum(0)
    solution = torch.linalg.lstsq(total, target.T, driver="gelsd" if total.device.type == "cpu" else None).solution.T
    return (first + solution.to(first)).to(like.dtype)
