"""Quality over bytes: which routed model or merge of a run an evaluation measured, and what it takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from modicum.report.charts import finite
from modicum.report.evaluations import boards
from modicum.report.metrics import Metric
from modicum.report.runs import RunView

MERGE = "merge"


class Cost(NamedTuple):
    """What a model takes.

    Attributes:
        kind: Name of the store; ``merge`` of a single model.
        routed: Layers kept apart.
        share: Of all experts as whole models.
        experts: How many there are.
    """

    kind: str
    routed: int
    share: float
    experts: int


class RoutePoint(NamedTuple):
    """One model under one metric: the mean of its scores on the tasks that the experts know."""

    model: str
    metric: Metric
    quality: float
    tasks: int
    cost: Cost


def route_points(run: RunView) -> list[RoutePoint]:
    """Return every routed model and merge that an evaluation beside it measured."""
    found: list[RoutePoint] = []
    for part in run.walk():
        if not part.stages:
            continue
        costs = _costs({stage.folder.name: (stage.job, stage.metrics) for stage in part.stages})
        if not any(cost.kind != MERGE for cost in costs.values()):
            continue
        unknown = _unknown(part.recipe.get("stages"))
        for cells, makers in _of_grid(part) if part.job == "grid" else _of_pipeline(part):
            known = [cell for cell in cells if cell.get("task") not in unknown]
            for board in boards([(part.name, {"cells": known})]):
                if board.better != "lower":
                    found += [
                        RoutePoint(
                            model,
                            Metric(board.metric, board.better, board.unit),
                            mean,
                            len(board.tasks),
                            costs[makers[model]],
                        )
                        for model, mean in board.means.items()
                        if makers.get(model) in costs
                    ]
    return found


def _costs(runs: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Cost]:
    """Return what each run's model takes, by the run's folder."""
    found: dict[str, Cost] = {}
    for name, (_, metrics) in runs.items():
        told, conflict = metrics.get("routing_bytes"), metrics.get("routing_conflict")
        if isinstance(told, Mapping) and isinstance(conflict, Mapping):
            share, count = finite(told.get("share")), finite(told.get("experts"))
            if share and count:
                found[name] = Cost(str(told.get("store")), len(conflict.get("routed") or ()), share, int(count))
    count = max((cost.experts for cost in found.values()), default=0)
    merges = [name for name, (job, metrics) in runs.items() if job == "merge" and name not in found and metrics]
    return found | ({name: Cost(MERGE, 0, 1 / count, count) for name in merges} if count else {})


def _unknown(stages: Any) -> set[str]:
    """Return the tasks of evaluations whose data is what no expert knows, by the recipes of the stages."""
    stages = [stage for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, list) else []
    new = {_path(data) for stage in stages for data in _items(stage.get("unknown")).values()}
    tasks = [(name, task) for stage in stages for name, task in _items(stage.get("tasks")).items()]
    return {name for name, task in tasks if isinstance(task, Mapping) and _path(task.get("data")) in new}


def _items(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _path(data: Any) -> str:
    return str(data.get("path") if isinstance(data, Mapping) else data)


def _of_pipeline(part: RunView) -> Iterator[tuple[list[Mapping[str, Any]], dict[str, str]]]:
    """Yield the cells of each evaluation, and for every model the folder of the stage that made it."""
    views = {stage.folder.name: stage for stage in part.stages}
    for stage in part.recipe.get("stages") or ():
        view = views.get(str(stage.get("name"))) if isinstance(stage, Mapping) else None
        if view is not None and isinstance(cells := view.metrics.get("cells"), list):
            models = _items(stage.get("models"))
            yield cells, {name: str(ref).removeprefix("stage:").partition("/")[0] for name, ref in models.items()}


def _of_grid(part: RunView) -> Iterator[tuple[list[Mapping[str, Any]], dict[str, str]]]:
    """Yield the scores of each seed and evaluation of a grid, a model going by its arm."""
    try:
        found = json.loads((part.folder / "grid.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    rows = _rows(found.get("scores")) if isinstance(found, Mapping) else []
    for seed in dict.fromkeys((row.get("stage"), _items(row.get("axes")).get("seed")) for row in rows):
        own = [row for row in rows if (row.get("stage"), _items(row.get("axes")).get("seed")) == seed]
        yield (
            [{**row, "model": row.get("arm")} for row in own],
            {str(row.get("arm")): str(_items(row.get("of")).get("cell")) for row in own},
        )


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, Iterable) else []
