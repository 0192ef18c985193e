"""Some tokens of a batch: those that still run, packed so that a layer computes no others."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_WORTH = 0.9  # share of a batch's tokens up to which packing them pays
_MANY = 8  # a batch of single tokens costs no less unless so many leave: two to eight rows take as long to multiply


class Some:
    """Which tokens a layer runs on: whole sequences, or the same number of tokens of each.

    Args:
        active: Which of all tokens run (b, t).
        rows: The sequences of which some do (r,).
        width: Tokens of each; None for all.
    """

    def __init__(self, active: Bool[Tensor, "b t"], rows: Int[Tensor, " r"], width: int | None = None) -> None:
        self.active, self.rows = active, rows
        self.places: Tensor | None = None
        self.size = active.shape[0], active.shape[1]
        self.shape = len(rows), width or self.size[1]
        if width is not None:
            mine = active[rows]
            # Those that run come first, in order; what fills a row up is a token of it that does not.
            places = mine.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
            self.places, self.runs = places, mine.gather(1, places)

    @cached_property
    def _flat(self) -> Tensor:
        """Where the tokens lie among all of the batch."""
        assert self.places is not None  # noqa: S101
        return (self.rows[:, None] * self.size[1] + self.places).flatten()

    @cached_property
    def _kept(self) -> Tensor | None:
        """Which of the packed tokens run, when some do not."""
        return None if bool(self.runs.all()) else self.runs.flatten().nonzero()[:, 0]

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the tokens, which lie along ``dim`` of ``x``; sequences are the first dimension."""
        if self.places is None:
            return x.index_select(0, self.rows) if len(x) > 1 else x
        x = x.movedim(dim, 1)
        flat = self._flat if len(x) > 1 else self.places.flatten()
        return x.flatten(0, 1).index_select(0, flat).view(*self.shape, *x.shape[2:]).movedim(1, dim)

    def put(self, new: Tensor, old: Tensor, dim: int = 1) -> Tensor:
        """Return ``old`` with these tokens replaced by ``new``."""
        if self.places is None:
            return old.index_copy(0, self.rows, new)
        old, new, flat = old.movedim(dim, 1), new.movedim(dim, 1).flatten(0, 1), self._flat
        if self._kept is not None:
            new, flat = new.index_select(0, self._kept), flat[self._kept]
        return old.flatten(0, 1).index_copy(0, flat, new).view(old.shape).movedim(1, dim)

    def arguments(self, value: Any) -> Any:
        """Return a layer's arguments for these tokens; what does not go by token stays as it is."""
        if isinstance(value, Tensor):
            b, t = self.size
            if value.dim() < 2 or len(value) not in (1, b):
                return value
            dim = 2 if value.dim() == 4 else 1  # masks are (b, 1, t, s), the rest is (b, t, …)
            if self.places is not None and value.shape[dim] == t:
                return self.take(value, dim)
            return value.index_select(0, self.rows) if len(value) == b > 1 else value
        if isinstance(value, dict):
            return {name: self.arguments(part) for name, part in value.items()}
        return tuple(self.arguments(part) for part in value) if isinstance(value, tuple) else value

    def causal(self, keys: int, like: Tensor) -> Tensor | None:
        """Return the additive mask by which each token sees ``keys`` up to its own; None where nothing is packed."""
        if self.places is None:
            return None
        seen = torch.arange(keys, device=like.device) <= self.places[..., None] + keys - self.size[1]
        return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)[:, None]


def those_running(active: Bool[Tensor, "b t"] | None) -> Some | None:
    """Return the tokens that run, or None where too few have left to gain from packing the others."""
    if active is None:
        return None
    counts, (b, t) = active.sum(-1), active.shape
    rows = counts.nonzero()[:, 0]
    if not len(rows) or (t == 1 and len(rows) > 1 and b - len(rows) < _MANY):
        return None
    width = int(counts.amax())
    if width < t and len(rows) * width <= _WORTH * b * t:
        return Some(active, rows, width)
    return Some(active, rows) if len(rows) < b else None
