"""How much two adapters, or an adapter and a full update, have in common."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def principal_angles(X: Float[Tensor, "k n"], Y: Float[Tensor, "l n"]) -> Float[Tensor, " angles"]:
    """Return the angles between two row spaces in radians, smallest first: 0 where they share a direction.

    Args:
        X: Rows that span the first space.
        Y: Rows that span the second.

    Example:
        >>> principal_angles(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([1.5708], dtype=torch.float64)
    """
    bases = [_row_basis(rows) for rows in (X, Y)]
    return torch.linalg.svdvals(bases[0] @ bases[1].mT).clamp(0, 1).acos()


def mean_angle(X: Float[Tensor, "k n"], Y: Float[Tensor, "l n"]) -> float | None:
    """Return the mean angle between two row spaces in degrees, or ``None`` where one of them is empty.

    Args:
        X: Rows that span the first space.
        Y: Rows that span the second.

    Example:
        >>> mean_angle(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        45.0
    """
    return round(float(principal_angles(X, Y).mean().rad2deg()), 2) if X.any() and Y.any() else None


def captured(M: Float[Tensor, "out in"], A: Float[Tensor, "r in"]) -> Float[Tensor, ""]:
    """Return the share of a matrix' energy that lies in the row space of ``A``: what a LoRA with this A can learn.

    Args:
        M: The change to be learned.
        A: Rows that span the space.

    Example:
        >>> captured(torch.eye(2), torch.tensor([[3.0, 0.0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    M = M.double()
    return (M @ _row_basis(A).mT).square().sum() / M.square().sum()


def _row_basis(rows: Tensor) -> Tensor:
    """Return orthonormal rows that span the same space; rows that add nothing are left out."""
    _, S, Vh = torch.linalg.svd(rows.double(), full_matrices=False)
    return Vh[1e-10 * S.max() < S]
