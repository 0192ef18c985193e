"""Merge experts one after another, each without what the merged ones already use (OPCM).

The continual way: the result of an earlier merge can stand for the experts merged into it, and the order matters.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modicum.linalg import truncated_svd
from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.kernels.matrices import merge_matrices


@merge_method(
    "opcm", paper="arXiv:2501.09522", laws={"bounded", "zero_delta", "scale", "shift"}, matrix=True, factors="both"
)
def opcm(base: Tensor, experts: Sequence[Tensor], *, alpha: Fraction = 0.5, scale: float = 1.0) -> Tensor:
    r"""Add each expert's delta after removing its part along what is merged so far.

    .. math::
        \tau^{(t)} = \frac{\lambda_{t-1} \tau^{(t-1)} + P^{(t-1)}(\tau_t)}{\lambda_t}, \quad
        P^{(t-1)}(\tau) = \sum_{i \ne j,\ \max(i, j) > k} (u_i^T \tau\, v_j)\, u_i v_j^T

    where :math:`u_i, v_j` are the singular vectors of :math:`\tau^{(t-1)}`, the first k of which hold the share
    ``alpha`` of the sum of its singular values, and :math:`\lambda_t` gives :math:`\tau^{(t)}` the mean norm of the
    deltas so far.

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert, in the order in which they come.
        alpha: Share of the merged spectrum that later experts stay out of.
        scale: Factor on the merged delta.

    Returns:
        The merged tensor. Tensors that are not matrices get the mean of the deltas.

    Example:
        >>> import torch
        >>> a, b = torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))
        >>> opcm(torch.zeros(2, 2), [a, b])
        tensor([[1.4142, 0.0000],
                [0.0000, 1.4142]])

    Cost:
        One symmetric eigendecomposition of the short side for each expert but the first.

    Deviates:
        The authors' code takes one factor for the whole model, this one for each matrix.

    Reference:
        Tang et al., "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model
        Merging", NeurIPS 2025, arXiv:2501.09522, Equations 4 and 5.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        merged = deltas[0].double()
        factor, norms = 1.0, float(merged.norm())
        for t, delta in enumerate(deltas[1:], 2):
            svd = truncated_svd(merged, min(merged.shape))
            k = int((svd.S.cumsum(0) < alpha * svd.S.sum()).sum()) + 1
            # Along a direction without strength the vectors are noise, and nothing is removed.
            live = svd.S.gt(1e-6 * svd.S.max())
            U, V = svd.U[:, live], svd.V[:, live]
            inside = U.T @ delta.double() @ V
            removed = inside.diagonal().diag()
            removed[:k, :k] = inside[:k, :k]
            rest = delta.double() - U @ removed @ V.T
            norms += float(delta.double().norm())
            total = factor * merged + rest
            target = norms / t
            factor = float(total.norm()) / target if target else 1.0
            merged = total / factor if factor else total
        return (scale * merged).to(deltas[0].dtype)

    return merge_matrices(base, experts, merge)
