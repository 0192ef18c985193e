"""A grid runs each cell once, in an order in which it can, and says what came of it."""

import copy
import json

import pytest

from modicum.errors import ModicumError, RecipeError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.record import read_record

METHODS = {"average": {"method.name": "linear"}, "sum": {"method.name": "task_arithmetic"}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, answer in (("a", "abc"), ("b", "xyz")):
        lines = (json.dumps({"text": f"{name} {i} {answer}"}) for i in range(8))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def recipe(model, rows, **changes):
    task = {"kind": "perplexity", "data": {"path": str(rows / "a.jsonl"), "size": 4, "max_length": 64}}
    return {
        "job": "grid",
        "axes": {
            "dimension": {name: {"data.path": str(rows / f"{name}.jsonl")} for name in "ab"},
            "method": copy.deepcopy(METHODS),
        },
        "stages": [
            {
                "name": "expert",
                "role": "expert",
                "over": ["dimension"],
                "job": "train",
                "model": str(model),
                "data": {"path": "set by the axis", "max_length": 32},
                "adapter": {"rank": 2},
                "trainer": {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 1},
            },
            {
                "name": "merged",
                "role": "merge",
                "over": ["method"],
                "job": "merge",
                "base": str(model),
                "experts": ["stage:expert"],
                "method": {"name": "set by the axis"},
            },
            {
                "name": "test",
                "over": ["method"],
                "job": "evaluate",
                "models": {"merged": "stage:merged"},
                "tasks": {"a": task},
            },
        ],
        **changes,
    }


def scores(folder):
    return json.loads((folder / "grid.json").read_text())["scores"]


def test_each_cell_is_a_run_that_is_done_once(tiny_model, rows, tmp_path):
    data = recipe(tiny_model, rows, seeds=[0, 1])
    run = execute(parse(data), tmp_path / "g", quiet=True, workers=1)
    found = json.loads((run.folder / "grid.json").read_text())
    assert [cell["stage"] for cell in found["cells"]].count("expert") == 4
    assert len(found["cells"]) == 12 and len(list((run.folder / "cells").iterdir())) == 12
    assert {(s["arm"], s["axes"]["seed"]) for s in found["scores"]} == {
        (f"merged {method}", seed) for method in METHODS for seed in (0, 1)
    }
    assert all((run.folder / score["items"]).is_file() for score in found["scores"])
    merged = next(cell for cell in found["cells"] if cell["stage"] == "merged" and cell["axes"]["seed"] == 1)
    experts = read_record(run.folder / merged["folder"])["inputs"]
    used = {cell["folder"] for cell in found["cells"] if cell["stage"] == "expert" and cell["axes"]["seed"] == 1}
    assert all(any(folder in name for name in experts) for folder in used)

    # One line more: what is there stays, and only the new cells are made.
    stamps = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.safetensors")}
    data["axes"]["method"]["ties"] = {"method": {"name": "ties", "density": 0.5}}
    again = execute(parse(data), tmp_path / "g", quiet=True, workers=1)
    assert {s["arm"] for s in scores(again.folder)} == {"merged average", "merged sum", "merged ties"}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_knobs_are_chosen_by_validation_and_reported_on_test(tiny_model, rows, tmp_path):
    data = recipe(tiny_model, rows, choose={"method": "validation"})
    data["axes"]["method"]["sum"]["tune"] = {"method.scale": [0.5, 1.0, 8.0]}
    data["stages"].insert(2, {**copy.deepcopy(data["stages"][2]), "name": "validation"})
    data["stages"][2]["tasks"]["a"]["data"]["size"] = 3
    run = execute(parse(data), tmp_path / "g", quiet=True, workers=1)
    found = json.loads((run.folder / "grid.json").read_text())
    (chosen,) = found["chosen"]
    assert chosen["axis"] == "method.tune" and chosen["at"] == {"method": "sum", "seed": 0}
    best = max(chosen["scores"], key=chosen["scores"].get)
    assert chosen["value"] == best and len(chosen["scores"]) == 3
    tested = [s for s in found["scores"] if s["stage"] == "test" and s["arm"] == "merged sum"]
    assert [s["of"]["cell"] for s in tested] == [chosen["cell"]]
    assert {cell["model"] for cell in run.record["metrics"]["cells"]} == {"merged average", "merged sum"}


def test_dimensions_may_come_one_after_another(tiny_model, rows, tmp_path):
    data = recipe(tiny_model, rows)
    data["stages"] = [
        data["stages"][0],
        {
            "name": "one_by_one",
            "over": ["dimension"],
            "job": "merge",
            "base": str(tiny_model),
            "start": str(tiny_model),
            "experts": ["stage:one_by_one[dimension=previous]", "stage:expert"],
            "method": "linear",
        },
        {**data["stages"][2], "over": [], "models": {"last": "stage:one_by_one[dimension=last]"}},
    ]
    del data["axes"]["method"]
    cells = parse(data).plan.cells
    first, second = (cell for cell in cells.values() if cell.stage == "one_by_one")
    expert_a, expert_b = (name for name, cell in cells.items() if cell.stage == "expert")
    assert first.recipe["experts"] == [str(tiny_model), f"stage:{expert_a}"]
    assert second.recipe["experts"] == [f"stage:{first.name}", f"stage:{expert_b}"]
    run = execute(parse(data), tmp_path / "g", quiet=True, workers=1)
    assert [s["of"]["cell"] for s in scores(run.folder)] == [second.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["stages"][0].update(over=["dimensoin"]), "no axis 'dimensoin'. Did you mean 'dimension'?"),
        (lambda d: d["axes"]["dimension"]["a"].update({"data.pth": 1}), "unknown key 'data.pth'"),
        (lambda d: d["axes"]["dimension"]["a"].update({"seed": 1}), "axes.dimension.a: seeds have a key of their own"),
        (lambda d: d["axes"]["dimension"]["a"].update({"job.x": 1}), "axes.dimension.a in stage 'expert'"),
        (lambda d: d["axes"]["dimension"]["a"].update({"dat": 1}), "no stage over dimension has 'dat'. Did you mean"),
        (lambda d: d["axes"]["method"]["sum"].update({"expert.data.path": 1}), "no stage over method has 'expert'"),
        (lambda d: d["axes"].update(other={"x": None}), "axes.other: no stage is over it"),
        (lambda d: d["axes"]["method"].update(same={"method.name": "linear"}), "are the same run"),
        (lambda d: d["axes"]["dimension"].update({"a ": None}), "is no name"),
        (lambda d: d["axes"]["dimension"].update({"A": None}), "the names 'a' and 'A' are one"),
        (
            lambda d: d["axes"]["dimension"].update(last=None),
            "axes.dimension: 'last' is what references call a value by",
        ),
        (lambda d: d["axes"]["dimension"].update(first=None), "'first' is what references call a value by its place"),
        (
            lambda d: d["axes"]["method"].update(previous=None),
            "'previous' is what references call a value by its place",
        ),
        (lambda d: d["axes"].update({"method.tune": {"x": None}}), "is what references call the knobs of an axis"),
        (lambda d: d["axes"].update(seed={"x": None}), "seeds have a key of their own"),
        (lambda d: d["stages"][2]["models"].update(x="stage:merged[method=tsv]"), "method has no 'tsv'"),
        (lambda d: d["stages"][1].update(base="stage:expert"), "stands for 2 cells where one is expected"),
        (lambda d: d["stages"][1].update(experts=["stage:test"]), "no earlier stage"),
        (lambda d: d["stages"][1].update(experts=["stage:tset"]), "Did you mean 'test'?"),
        (lambda d: d["axes"]["method"]["sum"].update(tune={"method.scale": [1, 2]}), "has knobs to tune"),
        (lambda d: d.update(seeds=[1, 1]), "a seed stands twice"),
        (lambda d: d.update(choose={"method": "merged"}), "evaluates nothing"),
        (
            lambda d: d["stages"][1].update(experts=["stage:expert/model"]),
            "cell 'merged average seed 0': 'stage:expert a seed 0/model': stage 'expert a seed 0' has no output",
        ),
        (lambda d: d["stages"].append(dict(d["stages"][0])), "Two stages are called 'expert'"),
        (lambda d: d["stages"][0].update(resources={"cpu": 1}), "Did you mean 'cpus'?"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(tiny_model, rows, change, message):
    data = recipe(tiny_model, rows)
    change(data)
    with pytest.raises(RecipeError) as caught:
        parse(data)
    assert message in str(caught.value)


def test_check_counts_the_cells_and_finds_what_run_would_refuse(tiny_model, rows, tmp_path):
    data = recipe(tiny_model, rows)
    lines = plan(parse(data), tmp_path / "g")
    assert "6 cells: 2 of job train, 2 of job merge, 2 of job evaluate; 0 choices" in lines
    assert "merged average seed 0: merge after expert a seed 0, expert b seed 0" in lines
    assert lines[-1] == "no cell is finished yet, so no time can be predicted"
    # A stage that waits for others is looked at, too.
    data["stages"][2]["tasks"]["a"]["data"]["path"] = str(rows / "missing.jsonl")
    with pytest.raises(ModicumError, match="test average seed 0: .*missing.jsonl"):
        plan(parse(data), tmp_path / "g")


@pytest.mark.parametrize("job", ["pipeline", "grid"])
@pytest.mark.parametrize("place", ["expert", "test"])
def test_check_refuses_whatever_run_refuses(tiny_model, rows, tmp_path, job, place):
    data = recipe(tiny_model, rows)
    del data["axes"]
    stages = data["stages"]
    for stage in stages:
        del stage["over"]
    stages[0]["data"]["path"], stages[1]["method"] = str(rows / "a.jsonl"), "linear"
    if job == "pipeline":
        data = {"job": "pipeline", "stages": [{k: v for k, v in stage.items() if k != "role"} for stage in stages]}
    section = stages[0]["data"] if place == "expert" else stages[2]["tasks"]["a"]["data"]
    section["path"] = "refernce:instructions"  # known to parse, since only reading tells
    told = []
    for act in (plan, lambda recipe: execute(recipe, tmp_path / job, quiet=True)):
        with pytest.raises(ModicumError) as caught:
            act(parse(data))
        told.append(str(caught.value))
    assert all("there is no data source 'refernce'. Did you mean 'preference'?" in line for line in told)
    assert not (tmp_path / job).exists()


@pytest.mark.parametrize("between", ["merge", "mixture", "choice", "nothing"])
def test_what_a_test_asks_is_not_taught_before(tiny_model, tmp_path, between):  # H18
    for name, asked in (("a", "Is 3 + 6 nine?"), ("b", "Is it so?"), ("test", "is  3 + 6 NINE")):
        rows = [{"prompt": f"{name} {i}" if i != 4 else asked, "chosen": "Yes.", "rejected": "No."} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = recipe(tiny_model, tmp_path)
    expert, _, test = data["stages"]
    expert["objective"] = "dpo"
    test["tasks"] = {"a": {"kind": "pairs", "data": {"path": str(tmp_path / "test.jsonl")}}}
    if between == "mixture":
        parts = {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}
        mixed = {k: v for k, v in expert.items() if k != "over"} | {"name": "mixed", "data": {"mix": parts}}
        data["stages"] = [mixed, test | {"over": [], "models": {"mixed": "stage:mixed"}}]
        data["axes"] = {}
    if between == "choice":
        data["choose"] = {"method": "validation"}
        other = {"a": {"kind": "pairs", "data": {"path": "task:instructions", "size": 4}}}
        data["stages"][2:] = [test | {"name": "validation", "tasks": other}, test | {"over": []}]
    if between == "nothing":
        data["axes"].pop("method")
        data["stages"] = [expert, test | {"over": ["dimension"], "models": {"one": "stage:expert"}}]
    told = []
    for act in (plan, lambda grid: execute(grid, tmp_path / "g", quiet=True, workers=1)):
        with pytest.raises(RecipeError) as caught:
            act(parse(data))
        told.append(str(caught.value))
    assert told[0] == told[1] and "\n" not in told[0] and not (tmp_path / "g").exists()
    assert "tasks.a of 'test" in told[0] and "row 4 ('is  3 + 6 NINE') asks what the data of" in told[0]
    assert (
        "'mixed seed 0', row" if between == "mixture" else "'expert a seed 0', row 4 ('Is 3 + 6 nine?') te"
    ) in told[0]


def test_an_adapter_may_be_trained_on_what_the_one_before_made(tiny_model, rows, tmp_path):
    data = recipe(tiny_model, rows)
    step, folded = data["stages"][:2]
    step |= {"name": "step", "role": "continual", "model": "stage:folded[dimension=previous]", "start": str(tiny_model)}
    folded |= {"name": "folded", "over": ["dimension"], "experts": ["stage:step"], "method": "linear"}
    del folded["base"], data["axes"]["method"]
    test = data["stages"][2] | {"over": [], "models": {"last": "stage:folded[dimension=last]"}}
    data["stages"] = [step, folded, test]
    run = execute(parse(data), tmp_path / "g", quiet=True, workers=1)
    (score,) = scores(run.folder)
    assert score["of"]["axes"]["dimension"] == "b" and score["of"]["stage"] == "folded"


def test_a_run_of_two_stages_is_one_cell_and_an_alias_of_yaml_is_set_in_one_place(tiny_model, rows):
    data = recipe(tiny_model, rows)
    copied = {**data["stages"][0], "name": "step", "model": "stage:step[dimension=previous]", "start": str(tiny_model)}
    data["stages"].insert(1, copied)  # its first cell is that of the expert
    shared = {"max_length": 32}
    data["stages"][0] |= {"data": {"path": "x", **shared}, "eval_data": shared}
    data["stages"][0]["eval_data"] = data["stages"][0]["data"]
    copied |= {"data": data["stages"][0]["data"], "eval_data": data["stages"][0]["data"]}
    cells = parse(data).plan.cells.values()
    assert [cell.stage for cell in cells].count("step") == 1
    expert = next(cell for cell in cells if cell.stage == "expert")
    assert expert.recipe["data"]["path"].endswith("a.jsonl") and expert.recipe["eval_data"]["path"] == "x"
