"""Rounding by chance, which on average does not lose what is smaller than the last bit of a 16-bit weight."""

from __future__ import annotations

import torch
from torch import Tensor

# Bits of a float32 below the last one that the 16-bit format keeps.
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether updates to weights of this dtype need stochastic rounding."""
    return dtype in _DROPPED


def place_noise(key: int, start: int, rows: int, width: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Return 32 random bits for each entry of some rows of a tensor: a function of key, row and column alone.

    No generator is advanced from entry to entry, so the noise of an entry is the same in whatever shard, block or
    device it is asked for. Rows and columns are hashed each by themselves and then together, which takes no index
    beyond 32 bits.

    Args:
        key: 63-bit name of the draw.
        start: Number of the first row in the whole tensor.
        rows: How many rows.
        width: Entries of a row.
        device: Where the bits are wanted.

    Example:
        >>> whole = place_noise(7, 0, 5, 3)
        >>> torch.equal(whole[2:4], place_noise(7, 2, 2, 3)), torch.equal(whole, place_noise(8, 0, 5, 3))
        (True, False)
    """
    low, high = key & 0xFFFFFFFF, key >> 32
    by_row = _mixed(_word(torch.arange(start, start + rows, device=device) + low))
    # Hashed twice, so that rows and columns never change places, whatever the two halves of the key.
    by_column = _mixed(_mixed(_word(torch.arange(width, device=device) + high)))
    return _mixed(by_row[:, None] ^ by_column)


def _word(values: Tensor) -> Tensor:
    """Cut integers to 32 bits, read as signed ones."""
    return ((values + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)


def _mixed(x: Tensor) -> Tensor:
    """Return Wellons' 32-bit hash "lowbias32", in place; products wrap, and the masks make the shifts unsigned."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def stochastic_round(values: Tensor, dtype: torch.dtype, *, noise: Tensor) -> Tensor:
    """Round float32 ``values`` up or down to ``dtype``, by chance, so that the mean is the value.

    Exact for normal numbers; below the smallest normal float16 the final cast rounds to nearest.

    Args:
        values: What to round.
        dtype: bfloat16 or float16.
        noise: 32 random bits for each value, in its order.

    Example:
        >>> rounded = stochastic_round(torch.full((10_000,), 1.001), torch.bfloat16, noise=place_noise(0, 0, 10_000, 1))
        >>> abs(rounded.float().mean().item() - 1.001) < 1e-4
        True
    """
    bits = values.to(torch.float32).contiguous().view(torch.int32)
    low = 1 << _DROPPED[dtype]
    # Adding noise below the kept bits carries into them with just the right probability; the mask then truncates.
    rounded = (noise.view(bits.shape).bitwise_and(low - 1).add_(bits)).bitwise_and_(-low).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(dtype)
