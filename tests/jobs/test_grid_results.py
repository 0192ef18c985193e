"""What a grid says of its cells, by records that are written here: no cell is run."""

import json

import pytest

from modicum.errors import RecipeError
from modicum.jobs.grids.results import grid_json, over_seeds
from modicum.jobs.stages.foresight import predicted
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


SCORED = {  # of each variant: helpful, honest
    "scale=0.1": (0.9, 0.1),
    "scale=0.2": (0.5, 0.45),
    "scale=0.3": (0.3, 0.5),
}


def tuned(**choice):
    """Return a grid whose knob of one method is chosen by a stage of two tasks, over two seeds."""
    data = recipe(seeds=[0, 1], choose={"method": {"by": "validation"} | choice})
    data["axes"]["method"] = {"sum": {"method": {"name": "task_arithmetic"}, "tune": {"method.scale": [0.1, 0.2, 0.3]}}}
    test = data["stages"].pop()
    data["stages"] += [test | {"name": "validation"}, test]
    return data


def by_variant(cell, _model, task):
    return SCORED[cell.at["method.tune"]][[*TASKS].index(task)] if cell.stage == "validation" else 0.5


@pytest.mark.parametrize(
    ("choice", "best", "scores"),
    [
        ({}, "scale=0.1", [0.5, 0.475, 0.4]),
        ({"score": "worst"}, "scale=0.2", [0.1, 0.45, 0.3]),
        ({"task": "honest"}, "scale=0.3", [0.1, 0.45, 0.5]),
        ({"task": "helpful"}, "scale=0.1", [0.9, 0.5, 0.3]),
    ],
)
def test_a_knob_is_chosen_by_the_score_that_the_recipe_names(tmp_path, choice, best, scores):
    found = result(tmp_path, tuned(**choice), by_variant)
    assert [pick["value"] for pick in found["chosen"]] == [best, best]  # for each seed
    assert [*found["chosen"][0]["scores"].values()] == pytest.approx(scores)
    tested = {score["of"]["axes"]["method.tune"] for score in found["scores"] if score["stage"] == "test"}
    assert tested == {best}


def test_a_choice_across_seeds_is_one_for_all(tmp_path):
    def by_seed(cell, model, task):
        lead = {("scale=0.2", 1): 0.5, ("scale=0.3", 0): 0.3}  # each seed has a favourite of its own
        return by_variant(cell, model, task) + lead.get((cell.at.get("method.tune"), cell.at["seed"]), 0.0)

    alone = result(tmp_path / "alone", tuned(), by_seed)
    assert [pick["value"] for pick in alone["chosen"]] == ["scale=0.3", "scale=0.2"]
    found = result(tmp_path / "across", tuned(across=["seed"]), by_seed)
    assert {pick["value"] for pick in found["chosen"]} == {"scale=0.2"}
    assert found["chosen"][0]["scores"] == found["chosen"][1]["scores"]


def test_an_axis_without_knobs_is_chosen_among_its_values(tmp_path):
    data = recipe(choose={"method": "validation"})
    test = data["stages"].pop()
    data["stages"] += [test | {"name": "validation"}, test | {"over": []}]
    found = result(tmp_path, data, lambda cell, *_: {"ties": 0.2, "average": 0.6}.get(cell.at.get("method"), 0.5))
    (chosen,) = found["chosen"]
    assert (chosen["axis"], chosen["value"], chosen["scores"]) == ("method", "average", {"ties": 0.2, "average": 0.6})
    assert {score["arm"] for score in found["scores"] if score["stage"] == "test"} == {"merged average"}


@pytest.mark.parametrize(
    ("choice", "score", "message"),
    [
        ({"task": "hlpful"}, by_variant, "choose.method: stage 'validation' has no task 'hlpful'"),
        ({}, lambda *_: None, "expected finite scores"),
    ],
)
def test_scores_that_choose_nothing_are_refused(tmp_path, choice, score, message):
    with pytest.raises(RecipeError, match=message):
        result(tmp_path, tuned(**choice), score)


def test_the_time_that_is_left_is_told_by_the_cells_of_the_same_stage(tmp_path):
    plan = parse(recipe()).plan
    kinds = {cell.name: cell.stage for cell in plan.cells.values()}
    assert predicted(kinds, tmp_path) == ["no cell is finished yet, so no time can be predicted"]
    folders = ran(tmp_path, plan, lambda *_: 0.5)
    assert predicted(kinds, tmp_path) == ["all 6 are finished"]
    first, second = (next(name for name in kinds if kinds[name] == stage) for stage in ("expert", "merged"))
    for name in (first, second):  # one of two is left of each; a minute each is what the others took
        (folders[name] / "record.json").unlink()
    assert predicted(kinds, tmp_path) == ["4 finished; the other 2 take about 2 min 00 s of one worker"]
    for name, stage in kinds.items():
        if stage == "test":
            (folders[name] / "record.json").unlink()
    told = "2 finished; the other 4 take about 2 min 00 s of one worker, and 2 of a kind that has not been run yet"
    assert predicted(kinds, tmp_path) == [told]
