"""Choose which positions of each row are corrupted; the objective decides which ids are written there."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import guarded
from modicum.philox import words
from modicum.types import NonNegativeInt, PositiveInt, UnitInterval

Sampling: TypeAlias = Literal["fixed_count", "bernoulli"]


@guarded
def select_positions(
    eligible: Bool[Tensor, "b t"],
    keys: Int64[Tensor, " b"],
    *,
    ratio: UnitInterval,
    real: Bool[Tensor, "b t"] | None = None,
    sampling: Sampling = "fixed_count",
    min_masks: NonNegativeInt = 1,
    spans: PositiveInt = 1,
    shared: bool = False,
) -> Bool[Tensor, "b t"]:
    """Select eligible positions at random, an exact count per row or each with the same probability.

    Each position holds a random word that follows from the row's key and the number of real tokens before it, so
    padding does not move the draw. The smallest words win; with ``spans`` a whole stretch holds one word.

    Args:
        eligible: Positions that may be selected.
        keys: One key per row.
        ratio: Share to select.
        real: Positions that count as the row's tokens; all when not given.
        sampling: ``fixed_count`` selects ``max(min_masks, floor(ratio * eligible))``, ``bernoulli`` each on its own.
        min_masks: Least count of a row that has eligible positions, for ``fixed_count``.
        spans: Length of a stretch that is selected together; the last may be cut to keep the count exact.
        shared: Use the first row's words, by column, for every row.

    Example:
        >>> from modicum.philox import row_keys
        >>> keys = row_keys(range(2), seed=0, method="doc")
        >>> select_positions(torch.ones(2, 10, dtype=torch.bool), keys, ratio=0.3).sum(-1)
        tensor([3, 3])
    """
    rows, length = eligible.shape
    if not 1 <= spans <= max(length, 1):
        raise RecipeError(f"spans is {spans}, expected 1 to {length}, the length of the row.")
    if ratio == 0 or eligible.numel() == 0:
        return torch.zeros_like(eligible)
    index = torch.arange(length, device=eligible.device).expand(rows, length)
    if shared:
        keys = keys[:1].expand(rows)
    elif real is not None:
        index = (real.cumsum(-1) - 1).clamp(min=0)
    # The words of equal keys are equal, so a shared draw needs one row of them.
    source = keys[:1] if shared else keys
    stretch = index if spans == 1 else (index + words(source, 1, stream=1) % spans) // spans
    word = words(source, length + (spans > 1)).expand(rows, -1).gather(1, stretch)
    if sampling == "bernoulli":
        return eligible & (word < round(ratio * 2**32))
    # The index makes the order strict: ties cannot change the count, and a stretch is taken from its beginning.
    order = (word << length.bit_length()) | index
    order = order.masked_fill(~eligible, torch.iinfo(torch.int64).max)
    available = eligible.sum(-1, keepdim=True)
    # In double precision, as int(n * ratio) is in Python.
    count = (available.double() * ratio).floor().long().clamp(min=min_masks).minimum(available)
    most = min(max(int(length * ratio), min_masks), length)
    if most == 0:
        return torch.zeros_like(eligible)
    smallest = order.topk(most, dim=-1, largest=False, sorted=True).values
    limit = smallest.gather(1, (count - 1).clamp(min=0))
    return eligible & (order <= limit) & (count > 0)
