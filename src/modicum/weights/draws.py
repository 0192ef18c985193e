"""Random numbers for masks: 16 bits a draw, so that a probability is exact to 1/65536 at a quarter of a float's cost.

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


def draw(size: int, rng: np.random.Generator) -> Words:
    """Return ``size`` numbers, evenly distributed over ``0 … LEVELS - 1``."""
    return rng.integers(0, 1 << 64, -(-size // 4), dtype=np.uint64).view(np.uint16)[:size]


def keep_(delta: Tensor, mask: NDArray[Any]) -> Tensor:
    """Set to zero where ``mask`` is false."""
    if delta.device.type == "cpu":
        np.multiply(delta.numpy(), mask, out=delta.numpy())
        return delta
    return delta.mul_(torch.from_numpy(mask).to(delta.device))
