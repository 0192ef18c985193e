"""What a seam needs to know of a conversion of models and of a store of experts; see :mod:`modicum.facts`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from modicum.errors import RecipeError
from modicum.facts import Facts


@dataclass(frozen=True, kw_only=True)
class StoreFacts(Facts):
    """Facts of a way to store an expert's difference from a dense layer.

    Attributes:
        drawn: What is kept is drawn from a seed, whatever the weights: its places need not be stored.
        unbiased: The stored difference is the true one on average over seeds.
        factors: It takes an adapter's factors as they are; the dense layer is then the base.
        scales: It keeps one size for each matrix, which can be fitted to the expert's answers.
    """

    drawn: bool = False
    unbiased: bool = False
    factors: bool = False
    scales: bool = False
    supplied: Collection[str] = frozenset({"key"})


def check_centred(dense: str, store: str, facts: StoreFacts) -> None:
    """Refuse to add weights of experts less 1/T where that is another mixture: stored differences must sum to zero.

    Args:
        dense: What the differences are from.
        store: Its name, for the message.
        facts: Of the store.

    Raises:
        RecipeError: The dense weights are not the average of the experts, or the store shrinks what it keeps.
    """
    if dense != "average":
        raise RecipeError("centred needs dense: average, because experts less the base do not sum to zero.")
    if not facts.unbiased:
        raise RecipeError(
            f"centred needs a store without bias, such as random_rescaled; {store} has one. Leave it out."
        )


@dataclass(frozen=True, kw_only=True)
class ModelFacts(Facts):
    """Facts of a conversion of models.

    Attributes:
        several: It is made of several models, so a training cannot convert its one to it.
    """

    several: bool = False
