"""Tasks of the LM Evaluation Harness: which score counts, what is refused, and the harness itself where it is there."""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from modicum.errors import CheckpointError, MissingExtraError, RecipeError
from modicum.evaluate.measures.lm_eval import lm_eval
from modicum.evaluate.rows import Rows
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.record import read_record
from modicum.registry import measure

ROWS = Rows("text", [{"text": "sums", "folder": "somewhere"}])
SUBJECT = SimpleNamespace(model=None, tokenizer=SimpleNamespace(chat_template=None))
SAMPLES = [
    {"doc_id": 1, "filter": "none", "metrics": ["acc", "acc_norm"], "acc": 0.0, "acc_norm": 1.0},
    {"doc_id": 0, "filter": "none", "metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": 0.0},
    {"doc_id": 0, "filter": "other", "metrics": ["acc"], "acc": 0.5},
]
YAML = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def harness(monkeypatch):
    """A stand-in that returns samples, and remembers how it was called."""
    called = {}

    def evaluate(**arguments):
        called.update(arguments, allowed=os.environ.get("HF_ALLOW_CODE_EVAL"))
        if called.get("fails"):
            raise called["fails"]
        return {"samples": {"sums": called.get("samples", SAMPLES)}}

    tasks = SimpleNamespace(all_subtasks=["sums"])
    modules = {
        "lm_eval": {"simple_evaluate": evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **_: "model"},
        "lm_eval.tasks": {"TaskManager": lambda **_: tasks},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return called


def test_the_usual_metric_of_the_first_reading_counts(harness):
    assert [item["score"] for item in lm_eval(ROWS, SUBJECT, seed=3)] == [0.0, 1.0]
    assert [item["score"] for item in lm_eval(ROWS, SUBJECT, score="acc", seed=3)] == [1.0, 0.0]
    assert harness["confirm_run_unsafe_code"] is False and harness["allowed"] is None
    assert harness["fewshot_random_seed"] == 3 and harness["apply_chat_template"] is False
    lm_eval(ROWS, SUBJECT, unsafe_code=True, seed=0)
    assert harness["confirm_run_unsafe_code"] and harness["allowed"] == "1" and "HF_ALLOW_CODE_EVAL" not in os.environ


def test_what_the_harness_cannot_do_is_one_line(harness, tmp_path):
    with pytest.raises(RecipeError, match="has no metric 'bleu'"):
        lm_eval(ROWS, SUBJECT, score="bleu", seed=0)
    with pytest.raises(RecipeError, match="defines no task 'sum' of the harness. Did you mean 'sums'"):
        lm_eval(Rows("text", [{"text": "sum", "folder": "x"}]), SUBJECT, seed=0)
    harness["fails"] = ValueError("Attempted to run task: sums which is marked as unsafe.")
    with pytest.raises(RecipeError, match="Set unsafe_code: true"):
        lm_eval(ROWS, SUBJECT, seed=0)
    harness["fails"] = ConnectionError("Couldn't reach the Hub\nmore")
    with pytest.raises(CheckpointError, match="Task sums of the harness cannot be run: Couldn't reach the Hub.$"):
        lm_eval(ROWS, SUBJECT, seed=0)
    harness["fails"] = None
    harness["samples"] = [{"doc_id": 0, "metrics": ["ppl"], "ppl": (1.0, 2.0)}]
    with pytest.raises(RecipeError, match=r"ppl of a question is \(1.0, 2.0\), expected a number"):
        lm_eval(ROWS, SUBJECT, seed=0)
    task = {"kind": "lm_eval", "task": "sums", "data": str(tmp_path / "none")}
    with pytest.raises(CheckpointError, match="is not a folder, expected one that holds the YAML file"):
        plan(parse({"job": "evaluate", "model": "m", "tasks": {"a": task}}))


def test_a_missing_harness_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match="eval"):
        lm_eval(ROWS, SUBJECT, seed=0)


def test_shares_have_wilson_s_interval_and_other_scores_student_s():
    facts = measure["lm_eval"].facts
    items = [{"score": score, "metric": "acc"} for score in (0.0, 1.0, 1.0)]
    other = [{"score": score, "metric": "f1"} for score in (0.5, 0.25, 1.0)]
    assert facts.estimate(items, level=0.9).low > 0 and facts.estimate(other, level=0.9).value == pytest.approx(
        1.75 / 3
    )
    assert facts.difference(items, other, level=0.9).value == pytest.approx(0.25 / 3)
    assert facts.difference(items, items, level=0.9).value == 0


def test_a_task_of_one_s_own_runs_through_the_harness(tiny_model, tmp_path):
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "choices": [" 5", " 7"], "answer": int(i > 4)} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(file, (1, 1))
    (folder / "sums.yaml").write_text(YAML.format(file=file))
    task = {"kind": "lm_eval", "task": "sums", "data": str(folder), "chat": False}
    recipe = parse({"job": "evaluate", "model": str(tiny_model), "tasks": {"sums": task}})
    assert "task sums of the LM Evaluation Harness" in plan(recipe)[0]
    execute(recipe, tmp_path / "run", quiet=True)
    [cell] = read_record(tmp_path / "run")["metrics"]["cells"]
    assert cell["n"] == 6 and cell["harness_metric"] == "acc" and cell["metric"] == "harness_score"

    file.write_text("".join(json.dumps(row | {"answer": 1 - row["answer"]}) + "\n" for row in rows))
    os.utime(file, (1, 1))  # a cache by names and times would take them for those of before
    execute(recipe, tmp_path / "again", quiet=True)
    [other] = read_record(tmp_path / "again")["metrics"]["cells"]
    assert other["value"] == pytest.approx(1 - cell["value"])
