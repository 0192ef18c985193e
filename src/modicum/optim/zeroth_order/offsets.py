"""Where the weights are: the directions that are added to them right now."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

Key: TypeAlias = tuple[int, int]  # (step, query) names a direction
Offset: TypeAlias = dict[Key, float]  # the directions in the weights, in units of eps


@dataclass(frozen=True)
class Move:
    """From one offset of the weights to another."""

    here: Offset
    there: Offset

    @cached_property
    def shift(self) -> Offset:
        """What is to be added; empty when the weights are there already."""
        both = dict.fromkeys([*self.here, *self.there])
        change = {key: self.there.get(key, 0.0) - self.here.get(key, 0.0) for key in both}
        return {key: amount for key, amount in change.items() if amount}

    @property
    def turns(self) -> bool:
        """Whether it goes to the opposite point."""
        return {key: -amount for key, amount in self.here.items()} == self.there
