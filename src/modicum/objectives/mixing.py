r"""Mixtures of preference data: how many pairs of each dimension, which pairs, and weights that follow validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from modicum.errors import RecipeError
from modicum.random import generator

Rank: TypeAlias = Literal["agree", "min", "mean", "gated"]


def split_by_ratio(total: int, ratios: Sequence[float]) -> list[int]:
    r"""Return how many of ``total`` rows each dimension gets, by largest remainder.

    .. math:: n_d = \lfloor q_d \rfloor + [d \text{ has one of the largest remainders}], \quad q_d = N r_d / \sum r

    Args:
        total: :math:`N`.
        ratios: :math:`r`, at least 0, not all 0.

    Returns:
        Counts that sum to ``total``; equal remainders go to the earlier dimension.

    Raises:
        RecipeError: A ratio is negative or not finite, all are 0, or there is none.

    Example:
        >>> split_by_ratio(10, [1, 1, 1]), split_by_ratio(7, [0.5, 0.3, 0.2])
        ([4, 3, 3], [4, 2, 1])
    """
    if total < 0:
        raise RecipeError(f"total is {total}, expected at least 0.")
    _weights(ratios, "ratios")
    whole = math.fsum(ratios)
    quotas = [total * ratio / whole for ratio in ratios]
    # A quota that rounding has put just below a whole number is that number.
    counts = [math.floor(quota + 1e-9) for quota in quotas]
    left = total - sum(counts)
    order = sorted(range(len(ratios)), key=lambda d: (-round(quotas[d] - counts[d], 9), d))
    for d in order[:left]:
        counts[d] += 1
    return counts


def largest_total(sizes: Sequence[int], ratios: Sequence[float]) -> int:
    """Return how many rows can be drawn by ratios without taking one twice.

    Args:
        sizes: Rows of each dimension.
        ratios: As for :func:`split_by_ratio`.

    Raises:
        RecipeError: As for :func:`split_by_ratio`.

    Example:
        >>> largest_total([100, 20], [3, 1])
        80
    """
    _weights(ratios, "ratios")
    whole = math.fsum(ratios)
    return min(math.floor(size * whole / ratio + 1e-9) for size, ratio in zip(sizes, ratios, strict=True) if ratio > 0)


def drawn(size: int, count: int, seed: int, name: str) -> list[int]:
    """Return the places of rows that are drawn without replacement; beyond ``size`` all are drawn again.

    Args:
        size: Rows that there are.
        count: Rows that are wanted.
        seed: Names the draw, with ``name``.
        name: What is drawn from.

    Example:
        >>> sorted(drawn(3, 3, 0, "helpful")), len(drawn(3, 8, 0, "helpful"))
        ([0, 1, 2], 8)
    """
    import torch

    found: list[int] = []
    while size and len(found) < count:
        rng = generator(seed, "mixture", name, len(found) // size)
        found += torch.randperm(size, generator=rng).tolist()
    return found[:count]


def distinct_names(names: Sequence[str]) -> None:
    """Refuse names of dimensions that are empty, or the same but for white space and case.

    Raises:
        RecipeError: Both names are shown.

    Example:
        >>> distinct_names(["helpful", "honest"])
    """
    seen: dict[str, str] = {}
    for name in names:
        short = " ".join(name.split()).casefold()
        if not short:
            raise RecipeError(f"{name!r} cannot be the name of a dimension, expected letters.")
        if short in seen:
            raise RecipeError(f"the dimensions {seen[short]!r} and {name!r} have one name. Rename one.")
        seen[short] = name


def agreeing_pairs(
    margins: Sequence[Sequence[float]],
    *,
    rank: Rank = "agree",
    keep: float = 1.0,
    gates: Sequence[Sequence[float]] | None = None,
) -> list[int]:
    r"""Return the pairs on which several scorers agree, or those that they rank highest.

    A margin is :math:`\delta_h = s_h(y_w) - s_h(y_l)`, what scorer :math:`h` gives the chosen answer more.

    Args:
        margins: For each pair, the margins of all scorers.
        rank: ``agree`` takes pairs whose least margin is above 0, in their order. ``min`` and ``mean`` order all pairs
            by the least or the mean margin, ``gated`` by the mean weighted by ``gates``, the largest first.
        keep: Share of them that is kept, the first ones.
        gates: For ``gated``: weights of the scorers, for each pair.

    Returns:
        Numbers of the pairs; equal ones in their order.

    Raises:
        RecipeError: A margin is NaN (the pair is named), pairs have different numbers of margins, or a knob is out of
            range.

    Example:
        >>> margins = [[0.5, 0.2, 0.1], [0.9, -0.1, 0.4], [0.2, 0.2, 0.2], [-0.3, 0.8, 0.9]]
        >>> agreeing_pairs(margins), agreeing_pairs(margins, rank="min"), agreeing_pairs(margins, rank="mean", keep=0.5)
        ([0, 2], [2, 0, 1, 3], [3, 1])

    Reference:
        Several reward heads and a gate: Wang et al., "Interpretable Preferences via Multi-Objective Reward Modeling and
        Mixture-of-Experts", 2024, arXiv:2406.12845. Keeping pairs by agreement is our reading.
    """
    if not 0 < keep <= 1:
        raise RecipeError(f"keep is {keep}, expected a share in (0, 1].")
    if rank not in ("agree", "min", "mean", "gated"):
        raise RecipeError(f"rank is {rank!r}, expected agree, min, mean or gated.")
    margins = [[float(value) for value in row] for row in margins]
    for number, row in enumerate(margins):
        if not row or len(row) != len(margins[0]):
            raise RecipeError(f"Pair {number} has {len(row)} scores, expected {len(margins[0])} as the first pair.")
        if any(math.isnan(value) for value in row):
            raise RecipeError(f"Pair {number}: scorer {[*map(math.isnan, row)].index(True)} returned NaN.")
    if rank == "agree":
        order = [number for number, row in enumerate(margins) if min(row) > 0]
    else:
        scores = [_score(row, rank, gates, number) for number, row in enumerate(margins)]
        order = sorted(range(len(margins)), key=lambda number: (-scores[number], number))
    return order[: max(1, math.floor(keep * len(order) + 0.5))] if order else []


def _score(row: Sequence[float], rank: Rank, gates: Sequence[Sequence[float]] | None, number: int) -> float:
    if rank == "min":
        return min(row)
    if rank == "mean":
        return math.fsum(row) / len(row)
    if gates is None or len(gates) <= number or len(gates[number]) != len(row):
        raise RecipeError(f"rank 'gated' needs a weight for each scorer of pair {number}. Give gates.")
    _weights(gates[number], f"gates of pair {number}")
    return math.fsum(g * x for g, x in zip(gates[number], row)) / math.fsum(gates[number])


def hybrid_weights(weights: Sequence[float], accuracies: Sequence[float], *, eta: float = 1.0) -> list[float]:
    r"""Return the next round's weights of the dimensions: more for those that validate below the mean.

    .. math:: \lambda_d \propto \lambda_d\, e^{\eta (\bar a - a_d)}

    Args:
        weights: :math:`\lambda`, at least 0, not all 0.
        accuracies: :math:`a`: pair accuracy of each dimension on validation data.
        eta: How fast the weights follow.

    Returns:
        Weights that sum to 1.

    Raises:
        RecipeError: The numbers do not fit, or a weight is negative.

    Example:
        >>> [round(w, 6) for w in hybrid_weights([1, 1, 1], [0.9, 0.6, 0.6])]
        [0.270291, 0.364855, 0.364855]

    Deviates:
        The update is ours; sampling by dimension is from arXiv:2405.11647.
    """
    _weights(weights, "weights")
    if len(accuracies) != len(weights) or not all(map(math.isfinite, accuracies)):
        raise RecipeError(
            f"accuracies are {list(accuracies)}, expected a finite number for each of {len(weights)} weights."
        )
    if not (math.isfinite(eta) and eta >= 0):
        raise RecipeError(f"eta is {eta}, expected at least 0.")
    mean = math.fsum(accuracies) / len(accuracies)
    grown = [weight * math.exp(eta * (mean - a)) for weight, a in zip(weights, accuracies)]
    whole = math.fsum(grown)
    return [weight / whole for weight in grown]


def _weights(values: Sequence[float], name: str) -> None:
    if not values or any(not math.isfinite(value) or value < 0 for value in values) or math.fsum(values) <= 0:
        raise RecipeError(f"{name} are {list(values)}, expected numbers of at least 0 that do not sum to 0.")
