"""What the experts look like beside each other, tensor by tensor, and whether they are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from modicum.errors import CheckpointError
from modicum.weights.blocks import delta_blocks


def compare(base: Tensor, experts: Sequence[Tensor]) -> dict[str, Any]:
    """Measure the experts' deltas from ``base``.

    Returns:
        ``norms`` (n), the deltas' Frobenius norms; ``cosines``, for each pair in order; ``conflict``, the share of
        entries, among those that at least two experts change, in which their signs differ. A delta or an input that is
        not finite shows as a norm that is not.
    """
    n = len(experts)
    gram = torch.zeros(n, n, dtype=torch.float64, device=base.device)
    counts = torch.zeros(2, dtype=torch.float64, device=base.device)
    for _, _, deltas in delta_blocks(base, experts):
        gram += deltas @ deltas.T
        if n > 1:
            # Signs of a thirty-second of each block tell the share to a percent, at a thirty-second of the cost.
            signs = deltas[:, ::32].sign()
            changed = signs.abs().sum(0) > 1
            counts += torch.stack([(changed & (signs.sum(0).abs() < signs.abs().sum(0))).sum(), changed.sum()])
    squares = gram.diagonal().tolist()
    norms = [math.sqrt(max(square, 0.0)) if math.isfinite(square) else square for square in squares]
    cosines = [
        gram[i, j].item() / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0
        for i, j in combinations(range(n), 2)
    ]
    conflict, changed = counts.tolist()
    return {"norms": norms, "cosines": cosines, "conflict": conflict / changed if changed else 0.0}


def refuse_non_finite(name: str, base: Tensor, experts: Sequence[Tensor], models: Sequence[str]) -> None:
    """Find which model has a NaN or an infinity in tensor ``name``; ``models`` names base and experts.

    Raises:
        CheckpointError: One has.
    """
    for model, tensor in zip(models, (base, *experts)):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise CheckpointError(
                f"{model}: tensor {name!r} has {bad} values that are NaN or infinite. "
                "The training run diverged: use an earlier checkpoint."
            )
