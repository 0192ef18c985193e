"""Pairs and choices: log-probabilities beside those of rows of their own, ties, groups, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.intervals import by_group, by_group_difference, paired_proportions, ratio, wilson
from modicum.evaluate.measures.choice import choice
from modicum.evaluate.measures.pairs import pairs
from modicum.evaluate.rows import Rows, answered
from modicum.evaluate.subject import Likelihood
from modicum.jobs import execute, plan
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.jobs.data.tokens import encode
from modicum.jobs.subject import LocalSubject
from modicum.recipe import parse
from modicum.record import read_record
from modicum.registry import row_kind
from oracles import preferences as oracle
from support import byte_tokenizer, tiny_llama

PAIRS = [
    {"prompt": "abc", "chosen": "de", "rejected": "fghij"},
    {"prompt": "abc", "chosen": "x", "rejected": "yy y"},
    {"messages": [{"role": "user", "content": "hi"}], "chosen": "12", "rejected": "3"},
    {"prompt": "long one", "chosen": "a" * 60, "rejected": "b"},
]
QUESTIONS = [
    {"prompt": "1 + 1?", "choices": ["2", "three", "44"], "answer": 0},
    {"prompt": "Which?", "choices": ["this", "that one"], "answer": 1},
]


def alone(model, tokenizer, row):
    """Return summed log-probability and tokens of the answer in a row of its own."""
    import torch

    ids, labels = encode(row, tokenizer, completion_only=True)
    asked = [i for i, label in enumerate(labels) if label != -100]
    ids = ids[: asked[-1] + 1]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    return oracle.answer_log_probability(logits, ids, asked[0]), len(asked)


@pytest.mark.oracle("measures", "pairs", "choice")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_that_share_a_prompt_get_what_each_gets_alone(attention):
    model = tiny_llama(initializer_range=0.3, attn_implementation=attention).eval()
    tokenizer = byte_tokenizer()
    subject = LocalSubject("it", model, tokenizer)
    for item, row in zip(pairs(Rows("preference", PAIRS), subject, max_length=256, reference_of=None), PAIRS):
        (a, n), (b, m) = (alone(model, tokenizer, answered(row, row[side])) for side in ("chosen", "rejected"))
        assert (item["tokens_chosen"], item["tokens_rejected"]) == (n, m)
        assert (item["logp_chosen"], item["logp_rejected"]) == pytest.approx((a, b), abs=1e-3)
        assert item["margin"] == pytest.approx(a / n - b / m, abs=1e-4)
        assert item["correct"] == float(a / n > b / m)
    for item, row in zip(choice(Rows("choice", QUESTIONS), subject, max_length=256, score="sum"), QUESTIONS):
        found = np.array([alone(model, tokenizer, answered(row, text))[0] for text in row["choices"]])
        assert item["scores"] == pytest.approx(found, abs=1e-3)
        assert item["picked"] == found.argmax() and item["correct"] == float(found.argmax() == row["answer"])
        assert item["confidence"] == pytest.approx(np.exp(found - np.logaddexp.reduce(found)).max(), abs=1e-3)


class Told:
    """A subject whose likelihoods are given."""

    def __init__(self, *found):
        self.found = found

    def alternatives(self, rows, **_):
        return [values and [Likelihood(*value) for value in values] for values in self.found]


def test_scores_of_pairs():
    rows = Rows("preference", PAIRS[:2])
    told = Told([(2.0, 2), (3.0, 6)], [(4.0, 4), (1.0, 1)])
    before = Told([(5.0, 2), (3.5, 6)], [(4.0, 4), (0.5, 1)])
    scores = {"mean": [0.0, 0.5], "sum": [1.0, 0.0], "reward": [1.0, 1.0]}
    for score, expected in scores.items():
        items = pairs(rows, told, score=score, max_length=99, reference="x", reference_of=lambda _: before)
        assert [item["correct"] for item in items] == expected
    assert (
        items[0]["question"]
        == items[1]["question"]
        != pairs(Rows("preference", [PAIRS[2]]), Told([(1.0, 1), (1.0, 1)]), max_length=9, reference_of=None)[0][
            "question"
        ]
    )


def test_a_tie_with_the_right_choice_counts_its_share():
    [item] = choice(Rows("choice", QUESTIONS[:1]), Told([(1.0, 1), (2.0, 2), (9.0, 3)]), max_length=9)
    assert item["correct"] == 0.5


def test_pairs_of_one_prompt_are_one_draw():
    assert by_group([1.0, 1.0, 0.0], "abc") == wilson(2, 3)
    grouped = by_group([1.0, 1.0, 1.0, 0.0, 0.0, 1.0], "aaabbc")
    assert grouped[:3] == (ratio([3.0, 0.0, 1.0], [3, 2, 1])[0], 0.0, 1.0) and grouped.n == 6
    assert by_group([1.0] * 4, "aabb")[1:] == (wilson(2, 2).low, 1.0, 4)
    assert by_group_difference([1.0, 0.0, 1.0], [0.0, 0.0, 1.0], "abc") == paired_proportions(
        [True, False, True], [False, False, True]
    )
    same = by_group_difference([1.0, 0.5], [1.0, 0.5], "aa")
    assert same.value == 0 and same.low < 0 < same.high  # one question cannot tell that two models are equal


@pytest.fixture
def recipe(tiny_model, tmp_path):
    written = [{"prompt": row.get("messages"), **row} for row in PAIRS]
    for name, rows in (("pairs", written), ("choice", QUESTIONS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {
        name: {"kind": name, "data": {"path": str(tmp_path / f"{name}.jsonl"), "max_length": 64}}
        for name in ("pairs", "choice")
    }
    tasks["gain"] = tasks["pairs"] | {"score": "reward", "reference": str(tiny_model)}
    return {"job": "evaluate", "model": str(tiny_model), "tasks": tasks}


def test_the_job_measures_them_and_records_what_was_left_out(recipe, tmp_path):
    assert "log-probabilities of 4 pairs" in plan(parse(recipe))[0]
    execute(parse(recipe), tmp_path / "run", quiet=True)
    cells = {cell["task"]: cell for cell in read_record(tmp_path / "run")["metrics"]["cells"]}
    assert cells["pairs"]["n"] == 3 and cells["pairs"]["left_out"] == 1  # the long pair, which is not cut
    assert cells["pairs"]["metric"] == "pair_accuracy" and 0 <= cells["pairs"]["value"] <= 1
    assert cells["gain"]["ties"] == 3 and cells["gain"]["value"] == 0.5  # the model has gained nothing on itself
    assert cells["choice"]["by_chance"] == pytest.approx((1 / 3 + 1 / 2) / 2) and 0 < cells["choice"]["brier"] < 1


def test_what_says_nothing_is_refused(recipe, tmp_path):
    recipe["tasks"]["pairs"]["data"]["max_length"] = 3
    with pytest.raises(CheckpointError, match="All 4 rows are longer than max_length 3"):
        execute(parse(recipe), tmp_path / "run", quiet=True)
    recipe["tasks"]["pairs"]["score"] = "reward"
    with pytest.raises(RecipeError, match="set score: reward and reference: MODEL, or neither"):
        parse(recipe)


@pytest.mark.parametrize(
    ("given", "answer", "place"),
    [
        (["a", "b"], 1, 1),
        (["a", "b"], "b", 1),
        (["x", "y", "z"], "C", 2),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ({"text": ["x", "y"], "label": [1, 2]}, 2, 1),
    ],
)
def test_forms_of_a_choice(given, answer, place):
    row = {"question": "q", "choices": given, "answer": answer}
    section = DataSection(path="f", fields={"prompt": "question"})
    assert row_kind["choice"].function(section, row, 0)["answer"] == place


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a"], "answer": 0}, "row 7: the choices are .*, expected a list of two or more texts"),
        ({"choices": ["a", " a"], "answer": 0}, "two choices are the same text"),
        ({"choices": ["a", ""], "answer": 0}, "two or more texts"),
        ({"choices": ["a", "b"], "answer": 2}, "the answer is 2, expected one of 2 choices"),
        ({"choices": ["a", "b"], "answer": True}, "the answer is True"),
        ({"choices": ["a", "b"]}, "the answer is None"),
        ({"choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answer": "A"}, "a label or the text"),
    ],
)
def test_bad_choices_are_named(row, message):
    with pytest.raises(RecipeError, match=message):
        row_kind["choice"].function(DataSection(path="f"), {"prompt": "q"} | row, 7)


def test_the_kind_that_a_task_needs_is_read_where_fields_fit_several(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(QUESTIONS[0] | {"completion": "2"}))
    section = DataSection(path=str(file))
    assert load_rows(section).kind == "completion"
    assert load_rows(section, prefer="choice").kind == "choice"
    assert load_rows(section, prefer="preference").kind == "completion"


def test_a_task_that_asks_what_was_learned_is_refused_with_both_rows(recipe, tmp_path):  # H18
    taught = tmp_path / "taught.jsonl"
    rows = [{"prompt": "other", "chosen": "a", "rejected": "b"}, {"prompt": " WHICH!", "chosen": "a", "rejected": "b"}]
    taught.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["trained_on"] = str(taught)
    assert str(taught) in parse(recipe).inputs()
    for look in (plan, lambda recipe: execute(recipe, tmp_path / "run", quiet=True)):
        with pytest.raises(RecipeError, match=r"tasks.choice, row 1 \('Which\?'\) asks what trained_on.0, row 1"):
            look(parse(recipe))
    taught.write_text(json.dumps(rows[0]) + "\n")
    assert len(plan(parse(recipe))) == 4


def test_names_that_are_one_but_for_white_space_are_refused(recipe):  # H17
    for key, value in (("tasks", recipe["tasks"]["pairs"]), ("models", "x")):
        names = {"a": value, "a ": value}
        changed = {k: v for k, v in recipe.items() if k != "model"} | {"models": {"m": "x"}, key: names}
        with pytest.raises(RecipeError, match="'a' and 'a ' are one name but for white space. Rename one"):
            parse(changed)
