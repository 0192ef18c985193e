"""Classifiers that judge what they never saw: rows or whole groups of rows are held out in turn."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.evaluate.logistic import fit


def held_out(
    x: Tensor,
    labels: Tensor,
    *,
    folds: int,
    generator: torch.Generator,
    l2: float,
    groups: Sequence[Hashable] | None = None,
) -> Tensor:
    """Return the log-odds of each row by a logistic classifier that never saw it.

    Args:
        x: Rows, (n, d).
        labels: Whether each is of the second class, (n,).
        folds: Parts that are held out in turn; each has its share of both classes.
        generator: Draws the parts, by index.
        l2: Penalty of the classifier.
        groups: Of each row; rows of one group are held out together.

    Raises:
        RecipeError: There are more folds than rows of a class or than groups, or what is left of some lacks a class.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> said = held_out(x, x[:, 0] > 1, folds=2, generator=torch.Generator().manual_seed(0), l2=0.1)
        >>> (said > 0).tolist()
        [False, False, True, True]
    """
    fewest = min(int(labels.sum()), int((~labels).sum()))
    if not 2 <= folds <= fewest:
        raise RecipeError(f"folds is {folds}, expected 2 to {fewest}, the rows of the smaller set.")
    fold = _by_row(labels, folds, generator) if groups is None else _by_group(labels, folds, generator, groups)
    said = torch.empty(len(x), dtype=torch.float64)
    for part in range(folds):
        said[fold == part] = fit(x[fold != part], labels[fold != part], l2=l2)(x[fold == part])
    return said


def _by_row(labels: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    fold = torch.empty(len(labels), dtype=torch.long)
    for label in (False, True):
        rows = (labels == label).nonzero()[:, 0]
        fold[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % folds
    return fold


def _by_group(labels: Tensor, folds: int, generator: torch.Generator, groups: Sequence[Hashable]) -> Tensor:
    if len(groups) != len(labels):
        raise RecipeError(f"{len(groups)} groups, expected one for each of {len(labels)} rows.")
    has: dict[Hashable, bool] = {}
    for group, label in zip(groups, labels.tolist(), strict=True):
        has[group] = has.get(group, False) or label
    if folds > len(has):
        raise RecipeError(f"folds is {folds}, expected {len(has)} or fewer, the groups of rows.")
    order: list[Hashable] = []
    for label in (False, True):  # groups with a row of the second class are spread over the folds, too
        alike = [group for group, found in has.items() if found is label]
        order += [alike[i] for i in torch.randperm(len(alike), generator=generator).tolist()]
    place = {group: number % folds for number, group in enumerate(order)}
    return torch.tensor([place[group] for group in groups])
