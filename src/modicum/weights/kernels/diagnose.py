"""What a merge did to a tensor: how the experts' changes are spread, how they interfere, what storing them loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from modicum.linalg import SVD, truncated_svd
from modicum.weights.methods.resm import outliers_of
from modicum.weights.methods.tsv import interference, ranks_of

LEADING = 8  # singular values that are kept of each change
ENERGY = 0.9  # of the squares, for the energy rank
SIGMAS = 3.0


def diagnose(
    base: Tensor, experts: Sequence[Tensor], merged: Tensor, stored: Tensor, *, directions: bool
) -> dict[str, Any]:
    """Measure a merge of one tensor.

    Args:
        base: What the experts were trained from.
        experts: The experts' tensors.
        merged: The result in float32 or float64.
        stored: The result as it is written.
        directions: Look at singular values too: for matrices that are linear maps.

    Returns:
        ``outliers`` (n), the share of each delta's magnitudes that lies beyond three standard deviations; ``survival``,
        the share of changed entries that are still changed after the cast; ``cast_error``, the norm of what the cast
        changed beside that of the merged delta. With ``directions`` also ``spectra`` (n, 8), leading singular values;
        ``energy_ranks`` (n), how many directions hold nine tenths of the squares; ``interference``, STI.
    """
    origin = base.to(merged.dtype)
    deltas = [expert.to(merged.dtype) - origin for expert in experts]
    found: dict[str, Any] = {"outliers": [outlier_share(delta) for delta in deltas]}
    changed = merged != origin
    if count := int(changed.sum()):
        survivors = int((changed & (stored != base.to(stored.dtype))).sum())
        lost = (stored.to(merged.dtype) - merged).double().norm() / (merged - origin).double().norm()
        found |= {"survival": survivors / count, "cast_error": float(lost)}
    if directions and any(delta.any() for delta in deltas):
        parts = [truncated_svd(delta.double(), min(delta.shape)) for delta in deltas]
        k = ranks_of(deltas, None)
        found |= {
            "spectra": [part.S[:LEADING].tolist() for part in parts],
            "energy_ranks": [energy_rank(part.S) for part in parts],
            "interference": interference([SVD(part.U[:, :k], part.S[:k], part.V[:, :k]) for part in parts]),
        }
    return found


def outlier_share(delta: Tensor) -> float:
    """Return which share of the sum of magnitudes lies in outliers.

    Example:
        >>> import torch
        >>> outlier_share(torch.tensor([1.0] * 99 + [101.0]))
        0.505
    """
    found = outliers_of(delta, SIGMAS)
    return found.mass / found.total if found.total else 0.0


def energy_rank(values: Tensor, share: float = ENERGY) -> int:
    """Return how many of the singular values, largest first, hold ``share`` of the sum of squares; 0 when all are 0.

    Example:
        >>> import torch
        >>> energy_rank(torch.tensor([4.0, 1.0, 0.1])), energy_rank(torch.tensor([1.0, 1.0, 1.0]))
        (1, 3)
    """
    squares = values.double().square()
    total = squares.sum()
    return int((squares.cumsum(0) < share * total * (1 - 1e-12)).sum()) + 1 if total > 0 else 0
