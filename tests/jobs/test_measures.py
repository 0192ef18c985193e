"""A new measure is one file: the toys here are registered, and the job, the record and the report do the rest."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import RecipeError
from modicum.evaluate.intervals import mean, paired_proportions, wilson
from modicum.evaluate.measures.exact_match import exact_match_measure, score
from modicum.facts import MeasureFacts
from modicum.jobs import evaluate as module
from modicum.jobs import execute, plan, task
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.jobs.data.tokens import encode
from modicum.jobs.subject import LocalSubject
from modicum.jobs.training.answers import AnswerLoss, answer_rows
from modicum.recipe import dump, parse
from modicum.record import read_record
from modicum.registry import measure
from modicum.report import terminal_table, write
from modicum.types import UnitInterval
from support import byte_tokenizer, tiny_llama, with_own_entries


@pytest.fixture
def toys(monkeypatch):
    """Two measures as later ones will be: a share of refusals, of which less is better, and an error of calibration."""
    with_own_entries(monkeypatch, measure)

    def refused(items, *, level):
        return wilson(sum(item["refused"] for item in items), len(items), level=level)

    def fewer(a, b, *, level):
        return paired_proportions(*([item["refused"] for item in items] for items in (a, b)), level=level)

    @measure("over_refusal", rows="completion", better="lower", unit="share", estimate=refused, difference=fewer)
    def over_refusal(rows, subject, *, phrase: str = "no", max_new_tokens: int = 3):
        """Share of harmless questions that are refused."""
        texts = subject.generate(rows.rows, max_new_tokens=max_new_tokens, batch_size=4)
        return [{"refused": len(subject.name) > 3 and phrase in f"{text} {phrase}"} for text in texts]

    def error(items, *, level, power: UnitInterval = 1.0, metric: str = "ece"):
        return mean([abs(item["confidence"] - item["right"]) ** power for item in items], level=level)

    def gap(a, b, *, level):
        return mean([x["confidence"] - y["confidence"] for x, y in zip(a, b, strict=True)], level=level)

    @measure("calibration", rows="completion", better="lower", estimate=error, difference=gap, metric="ece")
    def calibration(rows, subject):
        """Distance of confidence and accuracy."""
        found = subject.likelihoods(rows.rows)
        return [{"confidence": math.exp(-each.nats / each.tokens), "right": 0.0} for each in found]


@pytest.fixture
def recipe(tiny_model, tmp_path):
    data = tmp_path / "qa.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a" * (1 + i), "completion": str(i)}) + "\n" for i in range(6)))
    tasks = {
        "harmless": {"kind": "over_refusal", "data": {"path": str(data)}},
        "sure": {"kind": "calibration", "data": {"path": str(data)}, "power": 0.5},
    }
    models = {"meek": str(tiny_model), "ok": str(tiny_model)}
    return {"job": "evaluate", "models": models, "tasks": tasks}


def test_a_toy_measure_runs_is_recorded_and_is_ranked_by_what_it_says_of_itself(toys, recipe, tmp_path):
    run = execute(parse(recipe), tmp_path / "run", quiet=True)
    metrics = read_record(run.folder)["metrics"]
    cells = {(c["model"], c["task"]): c for c in metrics["cells"]}
    assert cells["meek", "harmless"]["value"] == 1.0 and cells["ok", "harmless"]["value"] == 0.0
    assert {(c["metric"], c["better"], c["unit"]) for c in cells.values()} == {
        ("over_refusal", "lower", "share"),
        ("ece", "lower", "number"),
    }
    assert {(p["metric"], p["better"], p["unit"]) for p in metrics["pairs"]} == {
        ("over_refusal", "lower", "share"),
        ("ece", "lower", "number"),
    }
    page = write([run.folder]).read_text()
    text = re.sub("<[^>]*>", "", page)
    assert "Over refusal, lower is better" in text and "left is better" in text
    assert "0.0% (best of the column)" in text and "100.0% (worst of the column)" in text
    assert "ok does best on harmless: over refusal 0.0%" in text
    [*_, first] = terminal_table(read_record(run.folder)).columns[1:2]
    assert "over refusal ↓" in str(first.header)
    assert [str(cell.style) for cell in first.cells] == ["", "bold"]


def test_knobs_of_every_function_of_a_measure_are_the_task_s_keys(toys, recipe):
    checked = parse(recipe)
    assert checked.tasks["sure"].knobs == {"power": 0.5, "metric": "ece"}
    assert parse(dump(checked)) == checked
    assert "harmless: over_refusal of 6 rows from each of 2 models" in plan(checked)[0]
    recipe["tasks"]["sure"]["power"] = 2
    with pytest.raises(RecipeError, match="tasks.sure: measure 'calibration': power: Input should be less than"):
        parse(recipe)
    recipe["tasks"]["sure"] = {"kind": "calibraton", "data": "x"}
    with pytest.raises(RecipeError, match="There is no measure 'calibraton'. Did you mean 'calibration'"):
        parse(recipe)


def test_the_job_names_no_measure_and_no_metric():
    trees = [ast.parse(inspect.getsource(each)) for each in (module, task)]
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = {*measure, *(e.facts.metric for e in measure.values()), *(e.facts.compares for e in measure.values())}
    assert not names & texts - {None}


@pytest.mark.parametrize("entry", measure.values(), ids=lambda entry: entry.name)
def test_a_measure_s_keys_do_not_hide_those_of_every_task(entry):
    assert not {"kind", "data"} & entry.parameters[1].keys()
    assert isinstance(entry.facts, MeasureFacts) and {*entry.facts.reads} <= entry.parameters[1].keys()


# Rewards and evaluation


def section_of(source, tmp_path):
    if source != "file":
        return DataSection(path=source, size=8)
    file = tmp_path / "a.jsonl"
    answers = ["cat", "The cat.", "-4", "4.5", "", "a", '"Yes"', "x\ny"]
    file.write_text("".join(json.dumps({"prompt": "?", "completion": answer}) + "\n" for answer in answers))
    return DataSection(path=str(file))


@pytest.mark.parametrize("source", ["file", "task:polarity", "task:parity", "task:order", "reasoning-gym:chain_sum"])
def test_a_reward_and_an_evaluation_of_one_task_agree_on_every_answer(source, tmp_path_factory):
    section = section_of(source, tmp_path_factory.mktemp("rows"))
    rows, knobs = load_rows(section), {"metric": "own", "max_new_tokens": 4}
    asked = answer_rows(rows, byte_tokenizer(), section, "reward", knobs, training=True, note=print)
    right = [row["completion"] for row in rows.rows]
    words = st.sampled_from([*right, *(f"the {text}." for text in right), *(f" {text.upper()}!" for text in right)])

    @settings(max_examples=30)
    @given(st.lists(words | st.text(max_size=6), min_size=len(right), max_size=len(right)))
    def agree(answers):
        subject = SimpleNamespace(generate=lambda *_, **__: answers)
        measured = exact_match_measure(rows, subject)
        assert [item["score"] for item in measured] == [
            asked.scorers[index](answer.strip()) for index, answer in enumerate(answers)
        ]
        for index, answer in enumerate(answers):
            if source.startswith("task:"):
                # Where the source scores nothing itself, its normalisation decides, and must be the scorer's.
                assert score(rows, index, answer, metric="exact_match") == score(rows, index, answer)

    agree()


def test_both_end_an_answer_at_the_same_tokens(tiny_model, monkeypatch):
    seen = []

    def generate(model, prompts, *, stop, **_):
        seen.append(set(stop))
        return [[65] for _ in prompts]

    monkeypatch.setattr("modicum.evaluate.generate", generate)
    model, tokenizer = tiny_llama(), byte_tokenizer()
    for path, line in (("task:parity", True), ("reasoning-gym:chain_sum", False)):
        section = DataSection(path=path, size=2)
        rows, knobs = load_rows(section), {"metric": "own", "max_new_tokens": 4}
        LocalSubject("it", model, tokenizer).generate(rows.rows, max_new_tokens=4, batch_size=2)
        asked = answer_rows(rows, tokenizer, section, "reward", knobs, training=True, note=print)
        loss = AnswerLoss("reward", knobs, sets=[asked], tokenizer=tokenizer)
        ids = torch.tensor([[5], [6]])
        loss._rewards(model, {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": torch.tensor([0, 1])})
        measured, rewarded = seen[-2:]
        assert measured == rewarded and (tokenizer("\n").input_ids[0] in measured) == line


# Likelihoods


@pytest.mark.parametrize("chat", [True, False])
def test_the_likelihood_of_a_completion_is_the_sum_over_its_tokens_given_the_prompt(chat):
    model, tokenizer = tiny_llama(initializer_range=0.3).eval(), byte_tokenizer(chat=chat)
    rows = [{"prompt": "abc", "completion": "de"}, {"prompt": "x", "completion": "yz and more"}]
    found = LocalSubject("it", model, tokenizer).likelihoods(rows)
    for row, (nats, tokens) in zip(rows, found, strict=True):
        ids, labels = encode(row, tokenizer, completion_only=True)
        asked = [i for i, label in enumerate(labels) if label != -100]
        with torch.no_grad():
            log = [model(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]].item() for i in asked]
        assert tokens == len(asked) and nats == pytest.approx(-sum(log), rel=1e-4)
