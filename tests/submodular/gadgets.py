"""Pairs of agents with a trap, side by side, whose labels may be flipped."""

from __future__ import annotations

import torch

from modicum.submodular import FacilityLocation


def gadgets(pairs=10, *, flipped=False, delta=0.01, eps=0.1):
    """Return the objective of so many pairs: two agents with two actions each, a sum over the pairs."""
    one = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, delta, 0, 0], [0, 0, 0, eps]], dtype=torch.float64)
    if flipped:
        one = one[:, [1, 0, 3, 2]]
    return FacilityLocation(torch.block_diag(*[one] * pairs))


def flipping(rounds_each=250, pairs=10):
    """Return the objective of each round: the labels change over and over."""
    both = gadgets(pairs), gadgets(pairs, flipped=True)
    return lambda number: both[number // rounds_each % 2]
