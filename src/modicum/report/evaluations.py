"""Evaluation results as a table: which model did how well on which task. Shared by the page and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from modicum.report.metrics import Better, Metric, Unit, metric_of
from modicum.report.runs import RunView
from modicum.report.text import is_number


@dataclass(frozen=True)
class Cell:
    """One model on one task."""

    model: str
    task: str
    metric: Metric
    value: float
    low: float | None
    high: float | None
    n: int | None
    seconds: float | None


@dataclass(frozen=True)
class Board:
    """All results under one metric; models and tasks keep the order in which they were evaluated."""

    metric: str
    better: Better | None
    unit: Unit
    cells: Mapping[tuple[str, str], Cell]

    @cached_property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(dict.fromkeys(model for model, _ in self.cells))

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(dict.fromkeys(task for _, task in self.cells))

    def value(self, model: str, task: str) -> float | None:
        """Return the value of a model on a task; nothing while it is not measured."""
        cell = self.cells.get((model, task))
        return cell.value if cell else None

    def column(self, task: str) -> dict[str, float]:
        """Return the values on one task by model."""
        return {model: value for model in self.models if (value := self.value(model, task)) is not None}

    @cached_property
    def means(self) -> dict[str, float]:
        """Mean over the tasks, of those models that were evaluated on all of them."""
        return {model: sum(values) / len(values) for model, values in self._complete()}

    @cached_property
    def worst_tasks(self) -> dict[str, float]:
        """Value on the task where the model does worst, of those models that were evaluated on all of them."""
        pick = _WORST.get(self.better)
        return {model: pick(values) for model, values in self._complete()} if pick else {}

    def best(self, values: Mapping[str, float]) -> set[str]:
        """Return the models with the best value; none when all are equal or nothing says which values are better."""
        return _at(values, _BEST.get(self.better))

    def worst(self, values: Mapping[str, float]) -> set[str]:
        """Return the models with the worst value; none when all are equal or nothing says which values are better."""
        return _at(values, _WORST.get(self.better))

    def _complete(self) -> Iterable[tuple[str, list[float]]]:
        for model in self.models:
            values = [self.value(model, task) for task in self.tasks]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                yield model, known


_BEST: Mapping[Better | None, Callable[[Iterable[float]], float]] = MappingProxyType({"higher": max, "lower": min})
_WORST: Mapping[Better | None, Callable[[Iterable[float]], float]] = MappingProxyType({"higher": min, "lower": max})


def boards(evaluations: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Board]:
    """Sort the cells of one or several evaluations by metric.

    Args:
        evaluations: Name and metrics of each run. A model that two of them measured on one task carries the run's name.
    """
    cells = [(run, _cell(raw)) for run, metrics in evaluations for raw in _raw(metrics)]
    sources: dict[tuple[Metric, str, str], set[str]] = {}
    for run, cell in cells:
        sources.setdefault((cell.metric, cell.model, cell.task), set()).add(run)
    twice = {model for (_, model, _), runs in sources.items() if len(runs) > 1}
    sorted_cells: dict[Metric, dict[tuple[str, str], Cell]] = {}
    for run, cell in cells:
        named = replace(cell, model=f"{cell.model} · {run}") if cell.model in twice else cell
        sorted_cells.setdefault(named.metric, {})[named.model, named.task] = named
    return [Board(*metric, found) for metric, found in sorted_cells.items()]


def evaluations(run: RunView) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield name and metrics of every run that tells results of its own: a grid sums up those of its cells."""
    yield run.name, run.metrics
    for stage in () if run.job == "grid" else run.stages:
        yield from evaluations(stage)


def _raw(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    cells = metrics.get("cells")
    rows = cells if isinstance(cells, list) else []
    return [raw for raw in rows if isinstance(raw, Mapping) and is_number(raw.get("value"))]


def _cell(raw: Mapping[str, Any]) -> Cell:
    low, high, n, seconds = (raw[key] if is_number(raw.get(key)) else None for key in ("low", "high", "n", "seconds"))
    return Cell(
        model=str(raw.get("model", "?")),
        task=str(raw.get("task", "?")),
        metric=metric_of(raw),
        value=float(raw["value"]),
        low=low,
        high=high,
        n=None if n is None else int(n),
        seconds=seconds,
    )


def _at(values: Mapping[str, float], pick: Callable[[Iterable[float]], float] | None) -> set[str]:
    if pick is None or not values:
        return set()
    wanted = pick(values.values())
    found = {model for model, value in values.items() if value == wanted}
    return found if len(found) < len(values) else set()
