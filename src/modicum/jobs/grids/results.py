"""What came of a grid: the JSON of each cell, that of the whole, choices by scores, and means over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from modicum.durable import write_atomic
from modicum.errors import RecipeError
from modicum.jobs.grids.cells import Plan
from modicum.jobs.grids.parts import Cell, Choice, label
from modicum.jobs.stages.references import PREFIX, stage_of
from modicum.record import digest, read_record

FORM = 1  # of grid.json
BASE, EXTERNAL = "base", "external"  # roles of models that no cell made
STARTS = {"train": "model", "merge": "base"}  # for each job the key of the model that it starts from


def cell_json(cell: Cell, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the JSON of a finished cell says: nothing in it depends on when or how fast it was made."""
    return {
        "cell": cell.name,
        "stage": cell.stage,
        "job": record["job"],
        "role": cell.role,
        "axes": cell.at,
        "folder": f"stages/{cell.name}",
        "hash": digest(cell.recipe),
        "outputs": record["outputs"],
        "metrics": timeless(record["metrics"]),
    }


def timeless(value: Any) -> Any:
    """Return JSON-like data without what depends on the clock."""
    if isinstance(value, Mapping):
        return {key: timeless(item) for key, item in value.items() if key not in ("seconds", "runtime")}
    if isinstance(value, list):
        return [timeless(item) for item in value]
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file, unless it holds that content already."""
    text = json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n"
    if not path.is_file() or path.read_bytes() != text.encode():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picked(choice: Choice, settings: Any, folders: Mapping[str, Path]) -> tuple[str, list[float]]:
    """Return the best candidate, the first of equal ones, and the scores of all.

    Args:
        choice: Candidates and the cells that judge them.
        settings: ``by``, ``score`` (``mean`` or ``worst`` over tasks) and ``task`` of the recipe.
        folders: Of the finished cells.

    Raises:
        RecipeError: The judges' scores cannot be compared.
    """
    judged = [[_score(settings, choice, folders[name]) for name in names] for names in choice.judges]
    scores = [math.fsum(values) / len(values) for values in judged]
    return choice.candidates[max(range(len(scores)), key=lambda i: (scores[i], -i))], scores


def _score(settings: Any, choice: Choice, folder: Path) -> float:
    """Return what a judge says of its model, higher being better."""
    cells = read_record(folder)["metrics"]["cells"]
    if settings.task is not None:
        cells = [cell for cell in cells if cell["task"] == settings.task]
    where = f"choose.{choice.axis}: stage {settings.by!r}"
    if not cells:
        raise RecipeError(f"{where} has no task {settings.task!r}.")
    if len({cell["model"] for cell in cells}) > 1:
        raise RecipeError(f"{where} evaluates several models at once. Let it evaluate the one to be chosen.")
    if len({(cell["metric"], cell["better"]) for cell in cells}) > 1:
        raise RecipeError(f"{where} measures {len(cells)} tasks in different metrics. Name one: task: NAME.")
    values = [cell["value"] for cell in cells]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise RecipeError(f"{where} gave {values}, expected finite scores.")
    signed = [value if cell["better"] == "higher" else -value for cell, value in zip(cells, values)]
    return min(signed) if settings.score == "worst" else math.fsum(signed) / len(signed)


def grid_json(plan: Plan, choose: Mapping[str, Any], folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return the JSON of a grid; see :mod:`modicum.jobs.grid` for its form.

    Args:
        plan: All cells.
        choose: The recipe's choices.
        folders: Of the cells that are finished.
    """
    finished = {name: cell for name, cell in plan.cells.items() if name in folders}
    records = {name: read_record(folders[name]) for name in finished}
    made = {name: choice for name, choice in plan.choices.items() if all(c in folders for c in _judges(choice))}
    picks = {name: picked(choice, choose[choice.axis], folders) for name, choice in made.items()}
    return {
        "grid": FORM,
        "axes": {axis: list(values) for axis, values in plan.axes.items()},
        "seeds": list(plan.seeds),
        "cells": [cell_json(cell, records[name]) for name, cell in finished.items()],
        "chosen": [
            {
                "axis": choice.key,
                "at": choice.at,
                "value": plan.cells[picks[name][0]].at[choice.key],
                "cell": picks[name][0],
                "by": choose[choice.axis].by,
                "scores": {
                    str(plan.cells[c].at[choice.key]): score for c, score in zip(choice.candidates, picks[name][1])
                },
            }
            for name, choice in made.items()
        ],
        "scores": _told_apart(
            [
                score
                for name, cell in finished.items()
                if records[name]["job"] == "evaluate"
                for score in _scores(plan, cell, records[name], {key: pick for key, (pick, _) in picks.items()})
            ]
        ),
    }


def _judges(choice: Choice) -> list[str]:
    return [name for names in choice.judges for name in names]


def _scores(plan: Plan, cell: Cell, record: Mapping[str, Any], picks: Mapping[str, str]) -> list[dict[str, Any]]:
    models = cell.recipe.get("models") or {"model": cell.recipe.get("model")}
    starts = _starts(plan)
    found = []
    for row in timeless(record["metrics"]["cells"]):
        reference = str(models[row["model"]])
        if reference.startswith(PREFIX):
            who = _made(plan, reference, picks)
        else:
            role = BASE if reference in starts else cell.role or EXTERNAL
            who = {"arm": row["model"], "of": {"reference": reference, "role": role}}
        found.append(
            {"stage": cell.stage, "cell": cell.name, "axes": cell.at, **who}
            | {key: row.get(key) for key in ("model", "task", "metric", "better", "unit", "value", "low", "high", "n")}
            | {"items": f"stages/{cell.name}/items/{row['model']}.{row['task']}.jsonl"}
        )
    return found


def _made(plan: Plan, reference: str, picks: Mapping[str, str]) -> dict[str, Any]:
    """Say which cell made a model."""
    name = stage_of(reference)
    cell = plan.cells[picks.get(name, name)]
    output = reference.partition("/")[2]
    arm = " ".join(filter(None, (cell.stage, label(cell.at, tuned=False), output)))
    return {"arm": arm, "of": {"cell": cell.name, "stage": cell.stage, "role": cell.role, "axes": cell.at}}


def _starts(plan: Plan) -> set[str]:
    """Return the models that trainings and merges start from."""
    found = {str(template.start) for template in plan.templates.values() if template.start is not None}
    for cell in plan.cells.values():
        if (key := STARTS.get(str(cell.recipe.get("job")))) is not None:
            found.add(str(cell.recipe.get(key)))
    return found


def _told_apart(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return scores in which one name is one model: models from elsewhere that share a name get their reference."""
    named: dict[str, set[Any]] = {}
    for score in scores:
        named.setdefault(score["arm"], set()).add(score["of"].get("reference"))
    return [
        {**score, "arm": f"{score['arm']} {reference}"}
        if len(named[score["arm"]]) > 1 and (reference := score["of"].get("reference")) is not None
        else {**score}
        for score in scores
    ]


def over_seeds(
    scores: Sequence[Mapping[str, Any]], judges: Collection[str], tasks: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return means over seeds as cells of an evaluation, with intervals of Student's t over seeds.

    Args:
        scores: Of :func:`grid_json`.
        judges: Stages that only choose; they are left out where others evaluate.
        tasks: Of each stage, as the recipe has them. Tasks of one name that differ get the name of their stage.
    """
    from modicum.evaluate.intervals import mean

    stages = list(dict.fromkeys(score["stage"] for score in scores))
    shown = [stage for stage in stages if stage not in judges] or stages
    kinds: dict[str, list[Any]] = {}
    for stage in shown:
        for name, task in tasks.get(stage, {}).items():
            kinds.setdefault(name, []).append(task)
    clear = {name for name, found in kinds.items() if all(task == found[0] for task in found)}
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for score in scores:
        if score["stage"] in shown:
            task = score["task"] if score["task"] in clear else f"{score['stage']} {score['task']}"
            groups.setdefault((score["arm"], task), []).append(score)
    found = []
    for (arm, task), rows in groups.items():
        first = rows[0]
        low, high, value = first["low"], first["high"], first["value"]
        values = [row["value"] for row in rows]
        if len(rows) > 1 and all(isinstance(v, int | float) for v in values):
            value, low, high, _ = mean(values)
        found.append(
            {"model": arm, "task": task, "metric": first["metric"], "value": value, "low": low, "high": high}
            | {"n": first["n"], "better": first["better"], "unit": first["unit"], "seeds": len(rows)}
        )
    return found
