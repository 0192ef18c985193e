"""Words and choices of rows that are made from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from modicum.random import derive_seed

ADJECTIVES = "quiet old bright small heavy green patient careful early narrow gentle distant".split()  # noqa: SIM905
NOUNS = "river baker window garden teacher train letter mountain clock sailor market bridge".split()  # noqa: SIM905
VERBS = "follows paints remembers crosses finds repairs watches carries".split()  # noqa: SIM905


class Draws:
    """A stream of choices named by seed, split and row."""

    def __init__(self, *names: str | int, seed: int) -> None:
        self._rng = Random(derive_seed(seed, "pairs", *names))  # noqa: S311  # no secret, and no torch to import

    def below(self, limit: int) -> int:
        """Return a number from 0 to ``limit - 1``."""
        return self._rng.randrange(limit)

    def one(self, items: Sequence[str]) -> str:
        """Return one of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[str], count: int) -> list[str]:
        """Return different items."""
        return self._rng.sample(list(items), count)


def sentence(draws: Draws) -> str:
    """Return a sentence of seven words and a full stop."""
    a, b = draws.some(ADJECTIVES, 2)
    x, y = draws.some(NOUNS, 2)
    return f"The {a} {x} {draws.one(VERBS)} the {b} {y}."
