"""Sum the deltas, then calm the directions in which several experts say the same thing (SVC).

What experts share is added once for each of them; this scales such directions back to what one expert says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.linalg import truncated_svd
from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.kernels.matrices import merge_matrices


@merge_method(
    "svc",
    paper="arXiv:2602.05536",
    laws={"bounded", "permutation", "zero_delta", "scale", "shift"},
    matrix=True,
    factors="both",
)
def svc(base: Tensor, experts: Sequence[Tensor], *, scale: float = 1.0, alpha: Fraction = 1.0) -> Tensor:
    r"""Divide each singular value of the summed delta by how often the experts contribute its direction.

    .. math::
        \tau = \sum_t \tau_t = \sum_r \sigma_r u_r v_r^T, \quad
        s_r^t = \frac{\langle u_r^T \tau,\ u_r^T \tau_t \rangle}{\|u_r^T \tau_t\|^2}, \quad
        \sigma_r' = \frac{\sigma_r}{\operatorname{mean}_t \max(\alpha, s_r^t)}

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        scale: Factor on the merged delta.
        alpha: Least projection that counts; below 1 it strengthens directions that the others work against.

    Returns:
        The merged tensor. Tensors that are not matrices get the mean of the deltas.

    Example:
        >>> import torch
        >>> delta = torch.diag(torch.tensor([2.0, 1.0]))
        >>> svc(torch.zeros(2, 2), [delta, delta])
        tensor([[2., 0.],
                [0., 1.]])

    Cost:
        One symmetric eigendecomposition of the short side.

    Deviates:
        The projection coefficients are the published ones; how they make one factor (their mean, bounded below) is our
        choice. Experts without a part in a direction have no say in it.

    Reference:
        "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", 2026, arXiv:2602.05536.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        total = torch.stack(deltas).sum(0).double()
        svd = truncated_svd(total, min(total.shape))
        mine = svd.U.T @ total
        counts, votes = torch.zeros_like(svd.S), torch.zeros_like(svd.S)
        for delta in deltas:
            theirs = svd.U.T @ delta.double()
            energy = theirs.square().sum(1)
            live = energy > 1e-12 * svd.S.max() ** 2
            votes += torch.where(live, ((mine * theirs).sum(1) / energy.clamp_min(1e-300)).clamp_min(alpha), 0.0)
            counts += live
        factor = torch.where(counts > 0, counts / votes.clamp_min(1e-300), 0.0)
        return scale * ((svd.U * (svd.S * factor)) @ svd.V.T).to(deltas[0].dtype)

    return merge_matrices(base, experts, merge)
