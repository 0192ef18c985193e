"""What the experts look like beside each other, tensor by tensor, and whether they and the result are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.errors import CheckpointError
from modicum.weights.kernels import fused
from modicum.weights.kernels.blocks import delta_blocks

PIECE, PIECES = 1 << 13, 16  # a large tensor is compared by so many pieces of it, evenly spread
MOST = 32  # experts of which each pair is compared: records of more would grow as their square
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK = 1 << 18  # entries whose bit patterns fit into a cache


def compare(base: Tensor, experts: Sequence[Tensor]) -> dict[str, Any]:
    """Measure the experts' deltas from ``base``; of more than 131,072 entries, a sample of so many speaks for all.

    Returns:
        ``norms`` (n), the deltas' Frobenius norms; ``cosines``, for each pair in order, of at most 32 experts;
        ``conflict``, the share of entries, among those that at least two experts change, in which their signs differ.
    """
    n, size = len(experts), base.numel()
    base, *experts = (_sample(tensor) for tensor in (base, *experts))
    gram = torch.zeros(n, n, dtype=torch.float64, device=base.device)
    conflicting = shared = 0
    for _, _, deltas in delta_blocks(base, experts):
        gram += deltas @ deltas.T
        if n > 1:
            numbers = deltas.cpu().numpy()  # whose comparisons are five times faster than torch's
            rising, falling = numbers > 0, numbers < 0
            conflicting += int(np.count_nonzero(rising.any(0) & falling.any(0)))
            shared += int(np.count_nonzero((rising | falling).sum(0, dtype=np.uint16) > 1))
    squares = (gram.diagonal() * (size / max(1, base.numel()))).tolist()
    norms = [math.sqrt(max(square, 0.0)) if math.isfinite(square) else square for square in squares]
    found: dict[str, Any] = {"norms": norms, "conflict": conflicting / shared if shared else 0.0}
    if n > MOST:
        return found
    scale = gram.diagonal().clamp_min(0).sqrt().tolist()
    cosines = [
        gram[i, j].item() / (scale[i] * scale[j]) if scale[i] and scale[j] else 0.0
        for i, j in combinations(range(n), 2)
    ]
    return found | {"cosines": cosines}


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if len(flat) <= PIECE * PIECES:
        return flat
    return flat.unfold(0, PIECE, (len(flat) - PIECE) // (PIECES - 1))[:PIECES].reshape(-1)


def refuse_non_finite(name: str, tensors: Sequence[Tensor], models: Sequence[str]) -> None:
    """Refuse a NaN or an infinity in tensor ``name`` of one of the ``models``.

    Raises:
        CheckpointError: There is one.
    """
    for model, tensor in zip(models, tensors):
        if not _is_finite(tensor):
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise CheckpointError(
                f"{model}: tensor {name!r} has {bad} values that are NaN or infinite. "
                "The training run diverged: use an earlier checkpoint."
            )


def refuse_overflow(name: str, result: Tensor, *, method: str, made: Tensor | None = None) -> None:
    """Refuse a result that has a NaN or an infinity.

    Args:
        name: The tensor.
        result: What would be written.
        method: What made it.
        made: The result before it was cast, where it was.

    Raises:
        CheckpointError: There is one.
    """
    if not result.is_floating_point() or _is_finite(result):
        return
    bad = result.numel() - int(torch.isfinite(result).sum())
    kind, most = str(result.dtype).removeprefix("torch."), torch.finfo(result.dtype).max
    what = f"tensor {name!r}: {method} gives {bad} values that are NaN or infinite in {kind}"
    finite = made is not None and bool(torch.isfinite(made).all())
    if finite or result.dtype == torch.float16:
        reached = f"; they reach {float(made.abs().max()):.3g}" if finite and made is not None else ""
        raise CheckpointError(f"{what}, which holds numbers up to {most:.3g}{reached}. Choose a dtype of wider range.")
    raise CheckpointError(f"{what}. Lower the method's scale or weights, or choose another method.")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or tensor.dtype.itemsize not in INTEGERS:
        return bool(torch.isfinite(tensor).all())
    if fused.usable(tensor):
        return fused.is_finite(tensor)
    if not tensor.numel():
        return True
    # As integers, infinities and NaNs are the largest bit patterns of either sign: two maxima, and no copy.
    integer = INTEGERS[tensor.dtype.itemsize]
    infinity = int(torch.tensor(math.inf, dtype=tensor.dtype).view(integer))
    signed = tensor.detach().reshape(-1).view(integer).numpy()
    unsigned = signed.view(f"u{signed.dtype}")
    negative = 1 << (8 * signed.dtype.itemsize - 1)
    # Block by block, so that the second maximum finds the numbers in the cache.
    starts = range(0, len(signed), BLOCK)
    return all(
        signed[start : start + BLOCK].max() < infinity and unsigned[start : start + BLOCK].max() < infinity + negative
        for start in starts
    )
