"""Dropout on the output of every attention and feed-forward block: a baseline for input masking over many epochs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from modicum.errors import ModicumError, RecipeError
from modicum.objectives.batch import Batch, keys_of
from modicum.philox import dense_uniform
from modicum.registry import objective
from modicum.types import UnitInterval


@objective("dropout", laws={"labels_untouched"}, acts_on="hidden_states")
def dropout(batch: Batch, *, ratio: UnitInterval = 0.1, rng: torch.Generator | Int64[Tensor, " b"]) -> Batch:
    r"""Set a share of ``hidden_states`` to zero and scale up the rest.

    .. math::
        h' = \frac{m \odot h}{1 - P}, \qquad m \sim \mathrm{Bernoulli}(1 - P)

    Args:
        batch: ``hidden_states``, the output of a block.
        ratio: Probability P of each entry to be dropped; in [0, 1).
        rng: A generator, or one key per row.

    Returns:
        The batch with other hidden states.

    Raises:
        ModicumError: There are no hidden states, or the ratio is 1.

    Example:
        >>> dropout({"hidden_states": torch.ones(1, 2, 3)}, ratio=0.5, rng=torch.Generator())["hidden_states"].unique()
        tensor([0., 2.])

    Cost:
        One draw per entry.

    Deviates:
        The entries that stay are scaled up in training; the paper scales weights down when the trained model is used.

    Reference:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014.
    """
    hidden: Any = batch.get("hidden_states")
    if hidden is None:
        raise ModicumError(f"dropout needs hidden_states, the batch has {', '.join(sorted(batch))}.")
    if ratio >= 1:
        raise RecipeError(f"ratio is {ratio}, expected a share below 1: dropping everything leaves nothing to learn.")
    lot = dense_uniform(keys_of(rng, hidden.shape[0], hidden.device), hidden.shape[1:], device=hidden.device)
    return {**batch, "hidden_states": torch.where(lot >= ratio, hidden / (1 - ratio), 0)}
