"""What a grid says of its cells, by records that are written here: no cell is run."""

import json

from modicum.jobs.grids.results import grid_json, over_seeds
from modicum.recipe import parse
from modicum.report.dimensions import read

TASKS = {name: {"kind": "perplexity", "data": {"path": f"{name}.jsonl"}} for name in ("helpful", "honest")}


def recipe(**changes):
    return {
        "job": "grid",
        "axes": {
            "dimension": {name: {"data.path": f"{name}.jsonl"} for name in TASKS},
            "method": {"ties": {"method": {"name": "ties", "density": 0.5}}, "average": {"method": {"name": "linear"}}},
        },
        "stages": [
            {"name": "expert", "role": "expert", "over": ["dimension"], "job": "train", "model": "start"}
            | {"data": {"path": "set by the axis"}, "trainer": {"max_steps": 1}},
            {"name": "merged", "role": "merge", "over": ["method"], "job": "merge", "base": "start"}
            | {"experts": ["stage:expert"], "method": "set by the axis"},
            {"name": "test", "over": ["method"], "job": "evaluate", "models": {"merged": "stage:merged"}}
            | {"tasks": TASKS},
        ],
        **changes,
    }


def ran(folder, plan, score):
    """Write the record of every cell, and return the folders; ``score(cell, model, task)`` is what was measured."""
    folders = {}
    for cell in plan.cells.values():
        measured = [
            {"model": model, "task": task, "metric": "pair_accuracy", "better": "higher", "unit": "share", "n": 9}
            | {"value": score(cell, model, task), "low": 0.0, "high": 1.0}
            for model in cell.recipe.get("models", ())
            for task in cell.recipe["tasks"]
        ]
        folders[cell.name] = folder / "stages" / cell.name
        folders[cell.name].mkdir(parents=True)
        record = {"job": cell.recipe["job"], "status": "done", "seconds": 60.0, "outputs": {}}
        (folders[cell.name] / "record.json").write_text(json.dumps(record | {"metrics": {"cells": measured}}))
    return folders


def result(folder, data, score=lambda *_: 0.5):
    """Return the JSON of a grid whose cells measured ``score``, written where the report reads it."""
    grid = parse(data)
    found = grid_json(grid.plan, grid.choose, ran(folder, grid.plan, score))
    (folder / "grid.json").write_text(json.dumps(found))
    return found


def test_models_from_elsewhere_keep_their_names_and_scores(tmp_path):
    data = recipe()
    measured = {"base": 0.5, "rival": 0.7, "other": 0.9, "merged": 0.6}
    models = {"base": "start", "rival": "elsewhere/rival", "other": "elsewhere/other"}
    data["stages"].append({"name": "beside", "job": "evaluate", "models": models, "tasks": TASKS})
    found = result(tmp_path, data, lambda cell, model, task: measured[model])
    told = {(score["arm"], score["of"]["role"]) for score in found["scores"] if score["stage"] == "beside"}
    assert told == {("base", "base"), ("rival", "external"), ("other", "external")}
    arms = {arm.name: arm for arm in read(tmp_path).arms}
    assert {name: arms[name].score("honest").value for name in models} == {name: measured[name] for name in models}
    assert read(tmp_path).base.name == "base"
    means = {cell["model"]: cell["value"] for cell in over_seeds(found["scores"], (), {"beside": TASKS})}
    assert {name: means[name] for name in models} == {name: measured[name] for name in models}


def test_models_from_elsewhere_that_share_a_name_are_told_apart(tmp_path):
    data = recipe()
    data["axes"]["peer"] = {name: {"models.peer": f"elsewhere/{name}"} for name in ("a", "b")}
    data["stages"].append(
        {"name": "peers", "role": "rival", "over": ["peer"], "job": "evaluate", "models": {"peer": "x"}}
        | {"tasks": TASKS}
    )
    found = result(tmp_path, data, lambda cell, *_: {"a": 0.2, "b": 0.8}.get(cell.at.get("peer"), 0.5))
    values = {score["arm"]: score["value"] for score in found["scores"] if score["of"]["role"] == "rival"}
    assert values == {"peer elsewhere/a": 0.2, "peer elsewhere/b": 0.8}
