"""Merge LoRA experts in the space that their deltas span together, where their entries can be compared (KnOTS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from modicum.linalg import truncated_svd
from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.kernels.blocks import per_expert
from modicum.weights.kernels.matrices import merge_matrices
from modicum.weights.methods.task_arithmetic import task_arithmetic
from modicum.weights.methods.ties import ties


@merge_method(
    "knots",
    paper="arXiv:2410.19735",
    laws={"bounded", "permutation", "zero_delta", "scale", "shift"},
    matrix=True,
    factors="left",
)
def knots(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    inner: Literal["ties", "task_arithmetic"] = "ties",
    density: Fraction = 1.0,
    scale: float = 1.0,
    weights: list[float] | None = None,
) -> Tensor:
    r"""Align the deltas by a joint decomposition, merge their coefficients, and map back.

    .. math::
        [\tau_1 \dots \tau_T] = U \Sigma [V_1^T \dots V_T^T], \quad
        \theta = \theta_0 + U \cdot \operatorname{merge}(\Sigma V_1^T, \dots, \Sigma V_T^T)

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        inner: How the coefficients are merged: ``ties``, or ``task_arithmetic``, which changes nothing.
        density: Share of coefficients kept, for ``ties``.
        scale: Factor on the merged delta.
        weights: One for each expert; all 1 when not given.

    Returns:
        The merged tensor. Tensors that are not matrices get the mean of the deltas.

    Example:
        >>> import torch
        >>> a, b = torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 3.0]))
        >>> knots(torch.zeros(2, 2), [a, b], inner="task_arithmetic")
        tensor([[2., 0.],
                [0., 3.]])

    Cost:
        One symmetric eigendecomposition of the output side, or of the factors' rank for adapters.

    Deviates:
        The paper trims over all layers together, this within each matrix. Singular values below 1e-6 of the largest are
        dropped, where the authors' code drops below 1e-5.

    Reference:
        Stoica et al., "Model merging with SVD to tie the Knots", ICLR 2025, arXiv:2410.19735, Section 4.
    """
    w = per_expert(weights, len(experts))

    def merge(deltas: list[Tensor]) -> Tensor:
        joint = torch.cat(deltas, 1)
        svd = truncated_svd(joint, min(joint.shape))
        U = svd.U[:, svd.S.gt(1e-6 * svd.S.max())]
        if not U.shape[1]:
            return torch.zeros_like(deltas[0])
        coefficients = [U.T @ delta for delta in deltas]
        zero = torch.zeros_like(coefficients[0])
        if inner == "ties":
            return U @ ties(zero, coefficients, density=density, scale=scale, weights=w)
        return U @ task_arithmetic(zero, coefficients, scale=scale, weights=w)

    return merge_matrices(base, experts, merge)
