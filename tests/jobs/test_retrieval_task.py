import gzip
import json

import pytest

from modicum.errors import ModicumError
from modicum.jobs.task import Task
from modicum.report.runs import load
from modicum.report.sections.retrieval import retrieval


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(" ".join(f"Sentence {i} tells of a quiet day in the town by the river." for i in range(200)))
    return {"path": str(path)}


def retrieval_task(**knobs):
    return Task.model_validate({"kind": "retrieval", **knobs})


def test_rows_carry_prompts_places_and_a_scorer(prose):
    task = retrieval_task(suite="needle", data=prose, lengths=(200, 400), depths=(0.0, 1.0), per_cell=2)
    rows = task.rows(0)
    assert rows.kind == "completion" and len(rows) == 8
    assert all(len(row["prompt"]) <= 4 * row["length"] for row in rows.rows)
    assert rows.score(0, f"It is {rows.rows[0]['completion']}.") == 1.0 and rows.score(0, "no") == 0.0


def test_lengths_count_the_tokens_of_a_model_when_told(prose, tiny_model):
    task = retrieval_task(
        suite="needle", data=prose, lengths=(300,), depths=(0.5,), per_cell=1, tokenizer=str(tiny_model)
    )
    [row] = task.rows(0).rows
    assert 200 < len(row["prompt"].encode()) <= 300  # a byte is a token


def test_the_public_files_are_read_packed_or_plain(tmp_path):
    row = {"question": "who?", "answers": ["Lee"], "ctxs": [{"title": "T", "text": "x", "isgold": True}]}
    plain, packed = tmp_path / "nq.jsonl", tmp_path / "nq.jsonl.gz"
    plain.write_text(json.dumps(row) + "\n\n")
    with gzip.open(packed, "wt") as file:
        file.write(json.dumps(row) + "\n")
    for path in (plain, packed):
        assert len(retrieval_task(suite="lost_in_the_middle", file=str(path)).rows(0)) == 1
    plain.write_text("{")
    with pytest.raises(ModicumError, match="line 1: not valid JSON"):
        retrieval_task(suite="ruler", file=str(plain)).rows(0)
    with pytest.raises(ModicumError, match="Cannot read"):
        retrieval_task(suite="ruler", file=str(tmp_path / "none")).rows(0)


def test_the_file_identifies_the_run(tmp_path):
    (tmp_path / "nq.jsonl").write_text("{}")
    task = retrieval_task(suite="ruler", file=str(tmp_path / "nq.jsonl"))
    assert list(task.inputs())[1:] == [str(tmp_path / "nq.jsonl")]
    assert all(name.startswith("python==") for name in retrieval_task(suite="needle").inputs())


def test_a_file_belongs_to_the_public_suites_alone():
    with pytest.raises(ValueError, match="set file for"):
        retrieval_task(suite="needle", file="x.jsonl")
    with pytest.raises(ValueError, match="set file for"):
        retrieval_task(suite="ruler")


def test_the_report_draws_a_heat_map_of_depth_by_length(prose, tmp_path):
    task = retrieval_task(suite="needle", data=prose, lengths=(200, 400), depths=(0.0, 1.0), per_cell=1)
    scores = zip(task.rows(0).rows, [1.0, 0.0, 0.5, 0.25], strict=True)
    items = [{"depth": row["depth"], "length": row["length"], "score": score} for row, score in scores]
    grid = task.ask(task.measure.facts.details, items)["grid"]
    assert grid["values"] == ((1.0, 0.5), (0.0, 0.25)) and grid["lengths"] == (200, 400)
    run = tmp_path / "run"
    run.mkdir()
    cell = {"model": "<base>", "task": "needle", "metric": "recall", "value": 0.44, "n": 4, "grid": grid}
    record = {"job": "evaluate", "status": "done", "metrics": {"cells": [cell]}, "outputs": {}, "notes": []}
    (run / "record.json").write_text(json.dumps(record))
    (run / "recipe.yaml").write_text("job: evaluate\n")
    section = retrieval(load([run]))
    assert section is not None and section.body.count("<rect") == 4
    assert "&lt;base&gt;: needle" in section.body and "depth 1" in section.body


def test_runs_without_retrieval_have_no_section(tmp_path):
    (tmp_path / "record.json").write_text(
        json.dumps({"job": "train", "status": "done", "metrics": {"train_loss": 1.0}})
    )
    (tmp_path / "recipe.yaml").write_text("job: train\n")
    assert retrieval(load([tmp_path])) is None


def test_the_evaluate_job_scores_retrieval_by_place_and_compares_models(prose, tmp_path, tiny_model):
    from modicum.jobs.evaluate import EvaluateRecipe, evaluate
    from modicum.record import Run

    task = {
        "kind": "retrieval",
        "suite": "needle",
        "data": prose,
        "lengths": [52],
        "depths": [0.0, 1.0],
        "per_cell": 1,
        "max_new_tokens": 4,
    }
    recipe = EvaluateRecipe(models={"a": str(tiny_model), "b": str(tiny_model)}, tasks={"needle": task})
    with Run(tmp_path / "run", job="evaluate", recipe=recipe.model_dump(mode="json"), quiet=True) as run:
        evaluate(recipe, run)
    metrics = run.record["metrics"]
    assert [cell["metric"] for cell in metrics["cells"]] == ["recall", "recall"]
    assert metrics["cells"][0]["n"] == 2 and metrics["cells"][0]["value"] == 0.0
    assert metrics["pairs"][0]["difference"] == 0.0
    section = retrieval(load([tmp_path / "run"]))
    assert section is not None and "a: needle" in section.body and "b: needle" in section.body
