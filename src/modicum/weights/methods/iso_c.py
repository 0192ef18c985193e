"""Sum the deltas and make all directions of the sum equally strong (Iso-C).

``scale`` around 1 to 1.5 suits several experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.linalg import truncated_svd
from modicum.registry import merge_method
from modicum.weights.kernels.matrices import merge_matrices


@merge_method(
    "iso_c",
    paper="arXiv:2502.04959",
    laws={"bounded", "permutation", "zero_delta", "scale", "shift", "transpose"},
    matrix=True,
)
def iso_c(base: Tensor, experts: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    r"""Replace the singular values of the summed delta by their mean.

    .. math::
        \sum_t \tau_t = U \operatorname{diag}(\sigma) V^T, \quad \theta = \theta_0 + \lambda\, \bar\sigma\, U V^T

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        scale: Factor on the merged delta (lambda).

    Returns:
        The merged tensor. Tensors that are not matrices get the mean of the deltas.

    Example:
        >>> import torch
        >>> iso_c(torch.zeros(2, 2), [torch.diag(torch.tensor([3.0, 1.0]))])
        tensor([[2., 0.],
                [0., 2.]])

    Cost:
        One symmetric eigendecomposition of the short side, in float64.

    Deviates:
        Directions in which the sum is zero stay zero; the published code gives them arbitrary vectors.

    Reference:
        Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML
        2025, arXiv:2502.04959, Algorithm 1.
    """
    return merge_matrices(base, experts, lambda deltas: scale * flatten_spectrum(torch.stack(deltas).sum(0)))


def flatten_spectrum(delta: Tensor) -> Tensor:
    """Return the matrix with the same singular vectors and all singular values equal to their mean."""
    svd = truncated_svd(delta.double(), min(delta.shape))
    # Of a direction without strength the vectors are noise.
    live = svd.S.gt(1e-6 * svd.S.max())
    return (svd.S.mean() * (svd.U[:, live] @ svd.V[:, live].T)).to(delta.dtype)
