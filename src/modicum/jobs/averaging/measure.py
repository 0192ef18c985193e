"""What is measured beside the choice: each checkpoint alone, other rules, and the rolling mean along the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modicum.evaluate.intervals import Estimate
from modicum.evaluate.intervals import mean as mean_of_losses
from modicum.weights.average import Choice, choose

if TYPE_CHECKING:
    from modicum.jobs.average import AverageRecipe
    from modicum.weights.search import Landscape


def measure(recipe: AverageRecipe, landscape: Landscape, chosen: Choice) -> dict[str, Any]:
    """Return losses on the held-out data, or on the data where none is held out.

    Intervals are over batches. Differences are those to the choice on the same batches; below zero is better.
    """
    n = len(landscape.checkpoints)
    units = [[float(i == j) for j in range(n)] for i in range(n)]
    found: dict[str, Any] = {
        "measured_on": "held_out" if landscape.held_out is not None else "data",
        "single": [_round(landscape.score(unit)) for unit in units],
        "rules": [_row("the choice", chosen, chosen, landscape)],
    }
    for rule in recipe.compare:
        method: Any = rule
        told = choose(
            landscape.checkpoints,
            method=method.name,
            landscape=landscape,
            fallback=False,
            seed=recipe.seed,
            **method.knobs,
        )
        found["rules"].append(_row(describe(method), told, chosen, landscape))
    if recipe.curve is not None:
        last = recipe.curve.last
        windows = [[1 / last if end - last < i <= end else 0.0 for i in range(n)] for end in range(last - 1, n)]
        found["curve"] = {"last": last, "loss": [_round(landscape.score(window)) for window in windows]}
    return found


def describe(method: Any) -> str:
    """Return a rule with the knobs that are not its defaults."""
    from modicum.registry import averager

    usual = averager[method.name].schema.model_fields
    knobs = [f"{key} {value}" for key, value in method.knobs.items() if value != usual[key].default]
    return f"{method.name} ({', '.join(knobs)})" if knobs else str(method.name)


def _row(name: str, rule: Choice, chosen: Choice, landscape: Landscape) -> dict[str, Any]:
    losses = landscape.losses(rule.coefficients, held_out=True)
    own = landscape.losses(chosen.coefficients, held_out=True)
    row: dict[str, Any] = {
        "name": name,
        "coefficients": rule.coefficients,
        "loss": _estimate(losses),
        "difference": _estimate([a - b for a, b in zip(losses, own)]),
    }
    return row | ({"passes": rule.passes, "trace": rule.trace} if rule.passes else {})


def _estimate(values: Sequence[float]) -> list[float | None]:
    found: Estimate = mean_of_losses(values)
    return [None if end is None else _round(end) for end in found[:3]]


def _round(value: float) -> float:
    return round(value, 7)
