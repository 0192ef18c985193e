"""Task singular vectors: truncate each expert's delta, make the experts' singular directions orthogonal, add.

For experts whose changes share few directions it needs no scale: ``alpha = 1`` is the paper's. Without the cut-off
``whiten_rtol``, directions that two experts share are replaced by arbitrary ones at full strength. Its default cures
copies and experts that differ by a hundredth; experts still closer to each other than to the base (checkpoints or seeds
of one run) want 0.05, experts with nothing in common lose least with 0.0001.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.linalg import SVD, Solver, mixed_svd, polar, truncated_svd
from modicum.registry import merge_method
from modicum.types import PositiveInt, UnitInterval
from modicum.weights.kernels.matrices import merge_matrices

TAMING = 1e-4  # cut-off that keeps what whitening makes of an error of 1e-6 below 1e-4
NEGLIGIBLE = 1e-6  # of an expert's largest singular value: what float32 weights and a Gram matrix cannot tell from zero


@merge_method(
    "tsv",
    paper="arXiv:2412.00081",
    laws={"bounded", "permutation", "zero_delta", "scale", "shift"},
    matrix=True,
    supplied={"report"},
    factors="both",
)
def tsv(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    alpha: float = 1.0,
    rank: PositiveInt | None = None,
    whiten_rtol: UnitInterval = 1e-2,
    solver: Solver = "gram",
    report: list[dict[str, Any]] | None = None,
) -> Tensor:
    r"""Add the experts' leading singular components after making their directions orthogonal (TSV-M).

    .. math::
        \theta_t - \theta_0 \approx U_t \Sigma_t V_t^T, \quad
        U = [U_1 \dots U_T],\ V = [V_1 \dots V_T], \quad
        \theta = \theta_0 + \alpha\, U (U^T U)^{-1/2}\, \Sigma\, (V^T V)^{-1/2} V^T

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        alpha: Factor on the merged delta.
        rank: Singular vectors kept of each expert, at most the short side divided by the number of experts, which is
            also the default.
        whiten_rtol: Directions of a stack whose squared length is below this share of the largest are dropped; 0 keeps
            all, as published.
        solver: How the deltas are decomposed; see :func:`modicum.linalg.truncated_svd`.
        report: Gets for each matrix the ``ranks`` of the experts, the share of directions ``kept`` by the cut-off, and
            the squared length of the ``weakest`` of them beside the strongest.

    Returns:
        The merged tensor. Tensors that are not matrices get the mean of the deltas; of stacked matrices each is merged
        by itself.

    Example:
        >>> base = torch.zeros(2, 2)
        >>> tsv(base, [torch.diag(torch.tensor([2.0, 0.0])), torch.tensor([[0.0, 0.6], [0.0, 0.8]])])
        tensor([[ 1.8974,  0.3162],
                [-0.6325,  0.9487]])

    Cost:
        One symmetric eigendecomposition of the short side for each expert, two of the stack. Float64 inside, except
        where a bound holds float32 to a relative difference of about 2e-5: at a ``whiten_rtol`` of at least 0.0001 for
        deltas of which the smallest singular value kept is at least a twentieth of the largest, and at one of at least
        0.01 for the whitening too.

    Deviates:
        The cut-off ``whiten_rtol`` is ours; 0 is the published procedure. Singular values below 1e-6 of an expert's
        largest are left out, where the published procedure lets their arbitrary vectors take part.

    Reference:
        Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025,
        arXiv:2412.00081, Algorithm 1.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        k = ranks_of(deltas, rank)
        parts = [decompose(delta, k, solver, whiten_rtol=whiten_rtol) for delta in deltas]
        return (alpha * combine(parts, whiten_rtol=whiten_rtol, report=report)).to(deltas[0].dtype)

    return merge_matrices(base, experts, merge)


def ranks_of(deltas: Sequence[Tensor], rank: int | None) -> int:
    """Return how many singular vectors each delta contributes: together at most the short side."""
    room = max(1, min(deltas[0].shape) // len(deltas))
    return min(rank, room) if rank else room


def decompose(delta: Tensor, rank: int, solver: Solver, *, whiten_rtol: float) -> SVD:
    """Return the leading triplets, in float64 unless float32 proves as good and the cut-off tames its errors.

    Whitening divides an error by the length of the weakest direction that the cut-off leaves.
    """
    if solver == "gram" and delta.dtype == torch.float32 and whiten_rtol >= TAMING:
        return mixed_svd(delta, rank)
    part = truncated_svd(delta if solver == "randomized" else delta.double(), rank, solver=solver)
    return SVD(part.U.double(), part.S.double(), part.V.double())


def stack(parts: Sequence[SVD]) -> tuple[SVD, list[int]]:
    """Put the triplets side by side, without directions of no strength; return also how many each part has.

    Vectors of singular value zero are arbitrary; they must not take part in the whitening of the others.
    """
    live = [part.S.gt(NEGLIGIBLE * part.S.max()) for part in parts]
    U = torch.cat([part.U[:, keep] for part, keep in zip(parts, live)], 1)
    V = torch.cat([part.V[:, keep] for part, keep in zip(parts, live)], 1)
    return SVD(U, torch.cat([part.S[keep] for part, keep in zip(parts, live)]), V), [int(keep.sum()) for keep in live]


def combine(parts: Sequence[SVD], *, whiten_rtol: float, report: list[dict[str, Any]] | None = None) -> Tensor:
    """Return the sum of decomposed deltas whose singular directions were made orthogonal."""
    (U, S, V), ranks = stack(parts)
    if not len(S):
        return U.new_zeros(U.shape[0], V.shape[0])
    left, right = polar(U, rtol=whiten_rtol), polar(V, rtol=whiten_rtol)
    if report is not None:
        kept, weakest = min(left.kept, right.kept) / len(S), min(left.weakest, right.weakest)
        report.append({"ranks": ranks, "kept": kept, "weakest": weakest})
    return torch.linalg.multi_dot([left.basis, (left.root * S) @ right.root.T, right.basis.T])


def task_interference(deltas: Sequence[Tensor], *, rank: int | None = None) -> float:
    r"""Measure how much the leading singular directions of several deltas overlap (STI).

    .. math::
        \|(U^T U - I)\, \Sigma\, (V^T V - I)\|_1

    with the stacked leading vectors of all deltas; 0 when their subspaces are orthogonal. Vectors of singular value
    zero, which are arbitrary, are left out.

    Args:
        deltas: Matrices of one shape.
        rank: Leading vectors of each; the short side divided by their number when not given.

    Example:
        >>> task_interference([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
        0.0
    """
    return interference([truncated_svd(delta.double(), ranks_of(deltas, rank)) for delta in deltas])


def interference(parts: Sequence[SVD]) -> float:
    """Return the STI of decomposed deltas."""
    (U, S, V), _ = stack(parts)
    one = torch.eye(len(S), dtype=S.dtype, device=S.device)
    return float((((U.T @ U - one) * S) @ (V.T @ V - one)).abs().sum())
