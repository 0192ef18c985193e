"""Random numbers for masks: at most 16 bits each, so that a probability is exact to 1/65536, far cheaper than a float.

Draws and comparisons are NumPy's, which are several times faster than torch's on a processor.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVELS = 1 << 16
Words: TypeAlias = NDArray[np.uint16]
Mask: TypeAlias = NDArray[np.bool_]


def draw(size: int, rng: np.random.Generator) -> Words:
    """Return ``size`` numbers, evenly distributed over ``0 … LEVELS - 1``."""
    return _bytes(2 * size, rng).view(np.uint16)


def draw_mask(size: int, level: int, rng: np.random.Generator) -> Mask:
    """Return ``size`` truth values, each true with probability ``level / LEVELS``.

    A draw's upper byte decides all but one in 256; a lower byte is drawn for these alone, and not at all where the
    probability is a multiple of 1/256.
    """
    upper, lower = divmod(level, 256)
    first = _bytes(size, rng)
    mask: Mask = first < upper
    if lower:
        open_ = np.flatnonzero(first == upper)
        mask[open_] = _bytes(open_.size, rng) < lower
    return mask


def _bytes(size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    return rng.integers(0, 1 << 64, -(-size // 8), dtype=np.uint64).view(np.uint8)[:size]


def keep_(delta: Tensor, mask: NDArray[Any]) -> Tensor:
    """Set to zero where ``mask`` is false."""
    if delta.device.type == "cpu":
        np.multiply(delta.numpy(), mask, out=delta.numpy())
        return delta
    return delta.mul_(torch.from_numpy(mask).to(delta.device))
