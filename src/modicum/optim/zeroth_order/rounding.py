"""In-place addition that does not lose what is smaller than the last bit of a 16-bit weight."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

# Bits of a float32 below the last one that the 16-bit format keeps.
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether updates to weights of this dtype need stochastic rounding."""
    return dtype in _DROPPED


def stochastic_round(values: Tensor, dtype: torch.dtype, *, rng: Generator) -> Tensor:
    """Round float32 ``values`` up or down to ``dtype``, by chance, so that the mean is the value.

    Exact for normal numbers; below the smallest normal float16 the final cast rounds to nearest.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> rounded = stochastic_round(torch.full((10_000,), 1.001), torch.bfloat16, rng=rng)
        >>> abs(rounded.float().mean().item() - 1.001) < 1e-4
        True
    """
    bits = values.to(torch.float32).contiguous().view(torch.int32)
    low = 1 << _DROPPED[dtype]
    noise = torch.randint(0, low, bits.shape, generator=rng, device=bits.device, dtype=torch.int32)
    # Adding noise below the kept bits carries into them with just the right probability; the mask then truncates.
    rounded = ((bits + noise) & -low).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(dtype)


def add_(target: Tensor, delta: Tensor, *, rng: Generator | None = None) -> None:
    """Add ``delta`` to ``target`` in place, rounding stochastically when ``rng`` is given and the dtype is short."""
    if rng is None or not is_low_precision(target.dtype):
        target.add_(delta)
    else:
        target.copy_(stochastic_round(target.float() + delta, target.dtype, rng=rng))
